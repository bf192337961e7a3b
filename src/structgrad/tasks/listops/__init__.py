"""Unsupervised parsing on ListOps (Paulus et al. 2020, section 8.2)."""

from structgrad.tasks.listops.data import ListOpsData
from structgrad.tasks.listops.task import ListOps

__all__ = ["ListOps", "ListOpsData"]
