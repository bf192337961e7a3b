"""Structures: finite sets of vertices, known through their oracles."""

from structgrad.structures.base import ORACLES, SparseDistribution, Structure, Trace, UnsupportedError
from structgrad.structures.baselines import GroundTruth, NoStructure
from structgrad.structures.layout import Layout
from structgrad.structures.one_hot import OneHot
from structgrad.structures.subset import Subset

__all__ = [
    "ORACLES",
    "GroundTruth",
    "Layout",
    "NoStructure",
    "OneHot",
    "SparseDistribution",
    "Structure",
    "Subset",
    "Trace",
    "UnsupportedError",
]

from structgrad.structures.binary_tree import BinaryTree as BinaryTree
from structgrad.structures.permutation import Permutation as Permutation
