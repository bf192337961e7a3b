"""Neural relational inference of the graph behind a layout (Paulus et al. 2020, section 8.1)."""

from structgrad.tasks.graph_layout.data import GraphLayoutData as GraphLayoutData
from structgrad.tasks.graph_layout.task import GraphLayout as GraphLayout
from structgrad.tasks.graph_layout.trajectories import Trajectories as Trajectories
