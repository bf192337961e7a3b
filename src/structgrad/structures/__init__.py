"""Structures: finite sets of vertices, known through their oracles."""

from structgrad.structures.alignment import Alignment
from structgrad.structures.arborescence import Arborescence
from structgrad.structures.base import ORACLES, SparseDistribution, Structure, Trace, UnsupportedError
from structgrad.structures.baselines import GroundTruth, NoStructure
from structgrad.structures.binary_tree import BinaryTree
from structgrad.structures.budget_subset import BudgetSubset
from structgrad.structures.constituency import Constituency
from structgrad.structures.correlated_k_subset import CorrelatedKSubset
from structgrad.structures.ctc import Ctc
from structgrad.structures.dag_path import DagPath
from structgrad.structures.derived import ActiveSetProjection, DynamicProgram, Gibbs, KBest
from structgrad.structures.factor_graph import (
    AtMostOne,
    BestVertex,
    Budget,
    FactorGraph,
    Implication,
    LabelPair,
    Or,
    Ordered,
    Pair,
    StructureFactor,
    Xor,
)
from structgrad.structures.grammar import Grammar
from structgrad.structures.hidden_markov import HiddenMarkov
from structgrad.structures.k_subset import KSubset
from structgrad.structures.labelled import Labelled
from structgrad.structures.layout import Directed, Layout, Matrix, Undirected, Vector
from structgrad.structures.linear_chain import LinearChain
from structgrad.structures.low_rank_grammar import LowRankGrammar
from structgrad.structures.matching import Matching
from structgrad.structures.one_hot import OneHot
from structgrad.structures.permutation import Permutation
from structgrad.structures.projective_tree import ProjectiveTree
from structgrad.structures.reading import brackets
from structgrad.structures.relaxation import Relaxation
from structgrad.structures.semi_markov import SemiMarkov
from structgrad.structures.spanning_tree import SpanningTree
from structgrad.structures.subset import Subset

__all__ = [
    "ORACLES",
    "ActiveSetProjection",
    "Alignment",
    "Arborescence",
    "AtMostOne",
    "BestVertex",
    "BinaryTree",
    "Budget",
    "BudgetSubset",
    "Constituency",
    "CorrelatedKSubset",
    "Ctc",
    "DagPath",
    "Directed",
    "DynamicProgram",
    "FactorGraph",
    "Gibbs",
    "Grammar",
    "GroundTruth",
    "HiddenMarkov",
    "Implication",
    "KBest",
    "KSubset",
    "LabelPair",
    "Labelled",
    "Layout",
    "LinearChain",
    "LowRankGrammar",
    "Matching",
    "Matrix",
    "NoStructure",
    "OneHot",
    "Or",
    "Ordered",
    "Pair",
    "Permutation",
    "ProjectiveTree",
    "Relaxation",
    "SemiMarkov",
    "SpanningTree",
    "SparseDistribution",
    "Structure",
    "StructureFactor",
    "Subset",
    "Trace",
    "Undirected",
    "UnsupportedError",
    "Vector",
    "Xor",
    "brackets",
]
