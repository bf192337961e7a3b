"""Digits from few labels: a semi-supervised variational auto-encoder (Correia et al. 2020, section 5.1)."""

from structgrad.tasks.ssvae.data import SemiSupervisedImages as SemiSupervisedImages
from structgrad.tasks.ssvae.task import SemiSupervisedVAE as SemiSupervisedVAE
from structgrad.tasks.ssvae.warm_start import WarmStart as WarmStart
