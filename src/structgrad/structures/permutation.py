"""Orderings of n items under the Plackett-Luce distribution."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import torch
from torch import Tensor

from structgrad.algorithms.products import product
from structgrad.structures import reading as readings
from structgrad.structures.family_item_recursions import ItemRecursion
from structgrad.structures.layout import Layout, Matrix, Vector
from structgrad.structures.relaxation import Relaxation


class Permutation(ItemRecursion):
    """Orderings of n items, best first.

    Scores are ``[*batch, n]``. Vertices are permutation matrices ``[*batch, n, n]`` with ``x[i, j]
    = 1`` if item j is at position i. Missing items (``mask`` bool ``[*batch, n]``) are in no
    ordering: if m items are present, positions m and later are zero rows. ``argmax`` sorts, which
    solves ``max_x sum_i rho_i (x s)_i`` for any decreasing rho (Paulus et al. 2020, B.6). Ties keep
    the order of the items.

    The distribution is Plackett-Luce: items are drawn without replacement in proportion to their
    rates. The trace is the ordering itself (Struminsky et al. 2021, sections 2.1 and 2.3):
    ``choices[i]`` is the item at position i, and -1 beyond the present items.

    The relaxations are ``neuralsort`` and ``softsort``. Their rows sum to one, but their columns
    need not. So they are unimodal row-stochastic matrices and not points of the Birkhoff polytope.
    """

    layout = Vector()
    vertex_layout: ClassVar[Layout] = Matrix()

    def own_relaxations(self) -> dict[str, Relaxation]:
        """Both relaxations have a Jacobian that is not square, and no regularizer."""
        return {name: Relaxation(name) for name in ("neuralsort", "softsort")}

    def _recurse(self, keys: Tensor, exists: Tensor) -> Tensor:
        order = torch.where(exists, keys, torch.inf).sort(dim=-1, stable=True).indices
        return torch.where(exists.gather(-1, order), order, -1)

    def _show(self, choices: Tensor) -> Tensor:
        return choices.unsqueeze(-1) == torch.arange(choices.shape[-1], device=choices.device)

    def _within(self, vertex: Tensor) -> Tensor:
        places = torch.arange(vertex.shape[-1], device=vertex.device, dtype=vertex.dtype)
        place = product(places.unsqueeze(0), vertex.detach()).squeeze(-2)
        return place.unsqueeze(-1) <= place.unsqueeze(-2)

    def read(self, vertex: Tensor) -> Tensor:
        """The item at every position: int64 ``[*batch, n]``, -1 after the last one."""
        return readings.heads(vertex.mT)

    def _entries(self, reading: Tensor, shape: torch.Size) -> Tensor:
        readings.without_gaps(reading, "items")
        place = torch.arange(shape[0], device=reading.device).expand(reading.shape)
        at = torch.stack([torch.where(reading < 0, reading, place), reading], -1)
        return readings.entries(at, self._shown(shape))

    def covered(self, vertex: Tensor) -> Tensor:
        return (vertex > 0).any(-2)

    def neuralsort(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        """NeuralSort (Grover et al. 2019, equation 5): ``[*batch, n, n]``, differentiable, O(n^2).

        Row i (from 1) of m present items is ``softmax_j((m + 1 - 2 i) s_j - sum_k |s_j - s_k|)``.
        The utility is already divided by the temperature.
        """
        self.check(utility, mask)
        exists = self.parts(utility, mask)
        # In float64: distances between the lowest numbers, and multiples of what utilities share.
        items = torch.where(exists, utility, 0.0).double()
        distance = (items.unsqueeze(-1) - items.unsqueeze(-2)).abs()
        spread = torch.where(exists.unsqueeze(-2), distance, 0.0).sum(-1)
        count = exists.sum(-1)[..., None, None]
        place = torch.arange(1, utility.shape[-1] + 1, device=utility.device).unsqueeze(-1)
        logits = (count + 1 - 2 * place).to(items.dtype) * items.unsqueeze(-2) - spread.unsqueeze(-2)
        return self._rows(logits, exists).to(utility.dtype)

    def softsort(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        """SoftSort (Prillo and Eisenschlos 2020, equation 3): ``[*batch, n, n]``, differentiable,
        O(n^2).

        Row i is ``softmax_j(-|s_[i] - s_j|)`` with ``s_[i]`` the i-th largest utility. The utility
        is already divided by the temperature.
        """
        self.check(utility, mask)
        exists = self.parts(utility, mask)
        items = torch.where(exists, utility, 0.0)
        order = torch.where(exists, -items.detach(), torch.inf).sort(dim=-1, stable=True).indices
        ranked = items.gather(-1, order)
        return self._rows(-(ranked.unsqueeze(-1) - items.unsqueeze(-2)).abs(), exists)

    @staticmethod
    def _rows(logits: Tensor, exists: Tensor) -> Tensor:
        """Softmax over the present items in as many rows as there are items, and zero elsewhere."""
        place = torch.arange(exists.shape[-1], device=exists.device)
        used = (place < exists.sum(-1, keepdim=True)).unsqueeze(-1)
        items = exists.unsqueeze(-2)
        rows = torch.where(items | ~used, logits, -torch.inf).softmax(-1)
        return torch.where(used & items, rows, 0.0)

    def enumerate(self, *shape: int) -> Tensor:
        """All n! permutation matrices: ``[n!, n, n]``, float64; ``shape`` is ``(n,)``."""
        (n,) = shape
        self.check_listable(math.factorial(n), n, n)
        orders = torch.tensor(list(itertools.permutations(range(n))), dtype=torch.int64).reshape(math.factorial(n), n)
        return self._show(orders).double()
