"""Toy problems: optimise the scores of one structure."""

from structgrad.tasks.toy.task import Toy

__all__ = ["Toy"]
