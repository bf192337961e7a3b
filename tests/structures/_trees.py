"""What the tests of both tree structures share."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from structgrad.structures.base import Structure, Trace


class CoversWhatIsPresent:
    """Vertices under a mask: trees of the present nodes, found by enumerating the smaller graph."""

    def vertices(self, case, mask: Tensor) -> Tensor:
        structure, n = case.structure, case.shape[-1]
        parts = structure.parts(torch.zeros(case.shape), mask)
        present = (parts.any(0) | parts.any(1)).nonzero()[:, 0]
        if not len(present):
            return torch.zeros(1, n, n, dtype=torch.float64)
        # The root has to keep its name.
        assert getattr(structure, "root", 0) == 0 or len(present) == n
        small = structure.enumerate(len(present), len(present))
        full = torch.zeros(len(small), n, n, dtype=torch.float64)
        full[:, present[:, None], present[None, :]] = small
        exists = structure.layout.mirror(parts.double())
        return full[((full == 0) | (exists > 0)).flatten(1).all(-1)]


def all_traces(structure: Structure, n: int, mask: Tensor, draws: int = 20_000) -> Trace:
    """Distinct traces of random exponentials on one example, of very different rates so that rare ones turn up."""
    rates = torch.exp(1.5 * torch.randn(draws, n, n, dtype=torch.float64))
    exponentials = torch.empty(draws, n, n, dtype=torch.float64).exponential_() / rates
    trace = structure.trace(exponentials, mask.expand(draws, n, n))
    flat = trace.choices.flatten(1)
    _, first = flat.unique(dim=0, return_inverse=True)
    representative = torch.full((int(first.max()) + 1,), draws).scatter_reduce(0, first, torch.arange(draws), "amin")
    return Trace(trace.vertex[representative], trace.choices[representative])


def repeat(trace: Trace, times: int) -> Trace:
    """One trace for a batch of that size."""
    return Trace(trace.vertex.expand(times, *trace.vertex.shape), trace.choices.expand(times, *trace.choices.shape))


def random_masks(n: int, count: int, structure: Structure) -> list[Tensor]:
    """Random sparse masks under which a tree exists."""
    masks: list[Tensor] = []
    for density in itertools.cycle((0.4, 0.6, 0.8)):
        if len(masks) == count:
            return masks
        mask = torch.rand(n, n) < density
        try:
            structure.argmax(torch.zeros(n, n), mask)
        except ValueError:
            continue
        masks.append(mask)
    raise AssertionError
