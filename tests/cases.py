"""One small case of every structure, which every suite reads: structures, estimators, losses, limits, derivatives, toy,
and the scripts that write tables.

A new structure is one entry here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from structgrad.structures import (
    Alignment,
    Arborescence,
    BinaryTree,
    BudgetSubset,
    Constituency,
    CorrelatedKSubset,
    Ctc,
    DagPath,
    FactorGraph,
    Grammar,
    HiddenMarkov,
    KSubset,
    Labelled,
    LinearChain,
    LowRankGrammar,
    Matching,
    OneHot,
    Permutation,
    ProjectiveTree,
    SemiMarkov,
    SpanningTree,
    Subset,
)
from structgrad.testing import Case, Problem, length_masks, vector_masks


def first(length: int, *shape: int) -> list[Tensor]:
    """The mask of a sequence of so many positions."""
    position = torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return [(position < length).expand(shape)]


def pairs(n: int, *lengths: int) -> list[Tensor]:
    """Masks of the first so many of n items, and of their pairs."""
    return [torch.cat([torch.arange(n) < length, torch.arange(n - 1) < length - 1]) for length in lengths]


#: Name -> the structure, the shape of its scores, and the mask of a second, smaller example.
CASES: dict[str, Case] = {
    "one_hot": Case(OneHot(), (4,), vector_masks(4, 3)),
    "subset": Case(Subset(), (4,), vector_masks(4, 3)),
    "undirected_edges": Case(Subset("undirected"), (4, 4), length_masks(4, 3)),
    "directed_edges": Case(Subset("directed"), (3, 3), length_masks(3, 2)),
    "k_subset": Case(KSubset(2), (4,), vector_masks(4, 3)),
    "top_edges": Case(KSubset(2, "undirected"), (4, 4), length_masks(4, 3)),
    "budget_subset": Case(BudgetSubset(2), (4,), vector_masks(4, 3)),
    "correlated_k_subset": Case(CorrelatedKSubset(2), (7,), [torch.ones(7, dtype=torch.bool)]),
    "spanning_tree": Case(SpanningTree(), (4, 4), length_masks(4, 3)),
    "arborescence": Case(Arborescence(), (4, 4), length_masks(4, 3)),
    "projective_tree": Case(ProjectiveTree(), (4, 4), length_masks(4, 3)),
    "labelled_arborescence": Case(
        Labelled(Arborescence(), 2), (2, 2, 2), [m[..., None].expand(2, 2, 2) for m in length_masks(2, 1)]
    ),
    # Sinkhorn's derivatives are exact up to the tolerance of its sums.
    "matching": Case(Matching(tolerance=1e-12), (3, 3), length_masks(3, 2)),
    "permutation": Case(Permutation(), (4,), vector_masks(4, 3)),
    "binary_tree": Case(BinaryTree(), (4,), vector_masks(4, 3)),
    "linear_chain": Case(LinearChain(2), (2, 2, 2), first(1, 2, 2, 2)),
    "hidden_markov": Case(HiddenMarkov(2), (3, 2, 2), first(2, 3, 2, 2)),
    "semi_markov": Case(
        SemiMarkov(2, 2),
        (2, 2, 2, 2),
        [torch.tensor([[True, False], [False, False]])[..., None, None].expand(2, 2, 2, 2)],
    ),
    "alignment": Case(Alignment(), (3, 3), length_masks(3, 2)),
    "ctc": Case(Ctc(), (3, 3, 3), first(2, 3, 3, 3)),
    "constituency": Case(Constituency(), (4, 4, 1), [m[..., None] for m in length_masks(4, 3)]),
    "grammar": Case(Grammar(1, 1), (3, 3, 4), [m[..., None].expand(3, 3, 4) for m in length_masks(3, 2)]),
    "low_rank_grammar": Case(
        LowRankGrammar(1, 1, 1), (3, 3, 6), [m[..., None].expand(3, 3, 6) for m in length_masks(3, 2)]
    ),
    "factor_graph": Case(FactorGraph.partial_matching(2, 2), (4,), vector_masks(4, 2)),
    "dag_path": Case(DagPath([[0, 1], [0, 2], [1, 2], [0, 2]]), (4,), vector_masks(4, 3)),
}


def without_labels(*shape: int) -> Tensor:
    """A mask without the last label of every second part."""
    mask = torch.ones(shape, dtype=torch.bool)
    mask.flatten(0, -2)[::2, -1] = False
    return mask


#: Further sizes, for the contract of structures alone.
MORE: dict[str, list[Case]] = {
    "labelled_arborescence": [
        Case(Labelled(SpanningTree(), 2), (3, 3, 2), [without_labels(3, 3, 2)]),
        Case(Labelled(ProjectiveTree(single_root=True), 2), (3, 3, 2)),
        Case(Labelled(Matching(), 2), (2, 2, 2)),
        Case(Labelled(KSubset(2), 2), (3, 2)),
        Case(Labelled(Arborescence(), 2), (1, 1, 2)),
    ],
    "budget_subset": [
        Case(BudgetSubset(2), (5,), [*vector_masks(5, 3, 1, 0), torch.tensor([False, True, False, True, True])]),
        Case(BudgetSubset(4), (2,)),
        Case(BudgetSubset(3), (4,)),
        Case(BudgetSubset(1), (1,)),
        Case(BudgetSubset(2, "undirected"), (4, 4), length_masks(4, 3, 2, 1)),
    ],
    "correlated_k_subset": [
        Case(CorrelatedKSubset(2), (9,), pairs(5, 4, 3, 2)),
        Case(CorrelatedKSubset(1), (1,)),
        Case(CorrelatedKSubset(1), (7,), pairs(4, 2, 1)),
        Case(CorrelatedKSubset(3), (5,)),
    ],
}


def problem(name: str, **options: Any) -> Problem:
    """A problem over that case: two examples, the second smaller."""
    case = CASES[name]
    return Problem.make(case.plain, case.shape, **{"mask": case.mask} | options)
