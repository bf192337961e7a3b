"""Batches of tensors, caches of generated data, and readers of images and of users' files."""

from structgrad.data.batches import Batch, Batches, Steps
from structgrad.data.errors import DamagedDataError, DataError, MissingDataError

__all__ = ["Batch", "Batches", "DamagedDataError", "DataError", "MissingDataError", "Steps"]
