"""Two players, one symbol: an emergent communication game (Correia et al. 2020, section 5.2)."""

from structgrad.tasks.communication_game.data import FeatureFile as FeatureFile
from structgrad.tasks.communication_game.data import Omniglot as Omniglot
from structgrad.tasks.communication_game.data import PublishedFeatures as PublishedFeatures
from structgrad.tasks.communication_game.image_folder import ImageFolder as ImageFolder
from structgrad.tasks.communication_game.task import CommunicationGame as CommunicationGame
