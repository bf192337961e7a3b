"""Subsets of exactly k parts."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from structgrad.algorithms.capped_simplex import binary_multiplier, decompose_by_size, project_capped_simplex
from structgrad.algorithms.counted_bits import Chain
from structgrad.algorithms.derivatives import implicit
from structgrad.algorithms.eager import refuse
from structgrad.algorithms.k_best import best_first, best_of_cardinality, largest
from structgrad.algorithms.plackett_luce import plackett_luce_conditional, plackett_luce_terms
from structgrad.common.ranges import check_count
from structgrad.structures.base import Noise, SparseDistribution, Trace
from structgrad.structures.family_subsets import Counted
from structgrad.structures.layout import Layout, LayoutName, make_layout
from structgrad.structures.relaxation import Relaxation, negative_binary_entropy, negative_entropy


class KSubset(Counted):
    """All 0/1 vectors with exactly k ones (Paulus et al. 2020, B.4; Struminsky et al. 2021, section
    2.1).

    Gumbel utilities, or exponentials through :meth:`trace`, choose k parts without replacement
    (Plackett-Luce). This is not the Gibbs distribution of :meth:`sample` and :meth:`log_prob`,
    which is that of independent bits given their sum.

    | relaxation | problem, over ``0 <= x <= 1, sum x = k`` | cost of one example |
    |---|---|---|
    | ``exp_family`` | mean of the Gibbs distribution | O(n k) |
    | ``euclidean`` | ``min ||x - u||^2`` | O(n log n) |
    | ``categorical`` | ``max <x, u> - sum x log x`` | O(n + k log k) |
    | ``binary`` | ``max <x, u> - sum x log x + (1 - x) log(1 - x)`` | O(n) |
    | ``l2x`` | none: maximum of k Concrete samples (Chen et al. 2018) | O(n k) |
    | ``softsub`` | none: k successive softmaxes (Xie and Ermon 2019) | O(n k) |

    Args:
        k: number of ones, at least 1.
        layout: how the parts lie; ``"undirected"`` with ``k = n - 1`` gives the top edges of a
            graph.

    Raises:
        TypeError: if k is not a whole number.
        ValueError: for k < 1; from every oracle, in eager CPU code, if an example has fewer than k
            parts.
    """

    constant_size: ClassVar[bool] = True
    is_ordinal: ClassVar[bool] = True

    def __init__(self, k: int, layout: LayoutName | Layout = "vector") -> None:
        check_count("k", k)
        self.k = k
        self.layout = make_layout(layout)

    def __repr__(self) -> str:
        return f"KSubset(k={self.k}, layout={self.layout.name!r})"

    def own_relaxations(self) -> dict[str, Relaxation]:
        """The last four relaxations of the table above. L2X takes k independent utilities."""
        return {
            "categorical": Relaxation("categorical", regularizer=negative_entropy, symmetric=True),
            "binary": Relaxation("binary", regularizer=negative_binary_entropy, symmetric=True),
            "l2x": Relaxation("l2x", draws=self.k),
            "softsub": Relaxation("softsub", takes_temperature=True),
        }

    def _read(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Checked flat scores and existing parts; also refuses examples of fewer than k parts."""
        flat, exists = super()._read(scores, mask)
        if flat.shape[-1] < self.k:
            raise ValueError(f"k = {self.k} parts must be chosen, but scores {list(scores.shape)} have fewer")
        if mask is not None or not self.layout.is_full:
            refuse(exists.sum(-1) < self.k, f"has fewer than k = {self.k} parts")
        return flat, exists

    def _largest(self, flat: Tensor, exists: Tensor) -> Tensor:
        """Indices of the k largest existing parts, largest first: ``[*batch, k]``."""
        return flat.detach().masked_fill(~exists, -math.inf).topk(self.k, dim=-1).indices

    def _chain(self, flat: Tensor, exists: Tensor) -> Chain:
        return Chain(flat.double(), None, exists, self.k, self.k)

    def argmax(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        """The k largest; among ties the first: ``[*batch, *parts]``."""
        flat, exists = self._read(utility.detach(), mask)
        return self._show(largest(flat.masked_fill(~exists, -math.inf), self.k).to(flat.dtype), utility)

    def top_k(self, scores: Tensor, k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k best subsets (of ``self.k`` parts each), exact: see :func:`best_of_cardinality`."""
        flat, exists = self._read(scores, mask)
        size = torch.full(flat.shape[:-1], self.k, device=flat.device)
        vertices, real = best_of_cardinality(flat, exists, k, size, self.k, exact=True)
        vertices, values = best_first(vertices, real, flat)
        return self._show(vertices.to(flat.dtype), scores), values

    def project(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``argmin ||x - scores||^2`` over ``0 <= x <= 1, sum x = k``, exact: ``[*batch, *parts]``."""
        flat, exists = self._read(scores, mask)
        return self._show(project_capped_simplex(flat, exists, self.k), scores)

    def sparsemap(
        self, scores: Tensor, mask: Tensor | None = None, method: Literal["systematic", "sorted"] = "systematic"
    ) -> SparseDistribution:
        """At most n subsets whose mean is :meth:`project`, in closed form: systematic sampling, O(n
        log n).

        The level sets of :class:`Subset` have the wrong size here. The parts may be sorted before
        sampling.

        Args:
            scores: ``[*batch, *parts]``.
            mask: which parts exist.
            method: ``systematic`` takes cumulative sums modulo 1 in the order of the parts,
                ``sorted`` with the largest first.
        """
        flat, exists = self._read(scores, mask)
        point = project_capped_simplex(flat, exists, self.k).reshape(flat.shape[:-1].numel(), flat.shape[-1])
        vertices, rows, weights = decompose_by_size(point, self.k, self.k, method)
        return SparseDistribution(self._show(vertices, scores), rows, weights)

    # --- further relaxations --------------------------------------------------------------------------------------

    def categorical(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        """``x = min(1, exp(u - nu))`` with ``sum x = k``: ``[*batch, *parts]`` (Martins and
        Kreutzer 2017).

        If the a largest parts are capped, the rest is a softmax of mass k - a. The solution has the
        smallest a at which no part exceeds 1. The gradient differentiates the softmax, which is
        exact.
        """
        flat, exists = self._read(utility, mask)
        dtype, flat = flat.dtype, flat.double()
        with torch.no_grad():
            largest = self._largest(flat, exists)
            _, rest = plackett_luce_terms(largest, flat, exists)
            mass = self.k - torch.arange(self.k, device=flat.device)
            fits = flat.gather(-1, largest) <= rest - mass.to(flat.dtype).log()
            # The last candidate always fits, up to rounding.
            fits[..., -1] = True
            capped = fits.int().argmax(-1, keepdim=True)
            is_capped = torch.zeros_like(exists).scatter(-1, largest, torch.arange(self.k, device=flat.device) < capped)
            free = exists & ~is_capped
        shared = flat.masked_fill(~free, -math.inf).softmax(-1) * (self.k - capped)
        return self._show(torch.where(free, shared.clamp(max=1), is_capped.to(flat.dtype)).to(dtype), utility)

    def binary(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        """``x = sigmoid(u - nu)`` with ``sum x = k``: ``[*batch, *parts]`` (Amos et al. 2019).

        Safeguarded Newton steps in float64 find nu, and it is differentiated as the root of ``sum x
        = k``.
        """
        flat, exists = self._read(utility, mask)
        wide = flat.double()
        nu = binary_multiplier(wide.detach(), exists, self.k)
        with torch.no_grad():
            slope = torch.where(exists, (wide - nu).sigmoid() * (nu - wide).sigmoid(), 0.0).sum(-1, keepdim=True)

        def size(nu: Tensor) -> Tensor:
            return torch.where(exists, (wide - nu).sigmoid(), 0.0).sum(-1, keepdim=True)

        # If the slope underflows, all parts are 0 or 1 and stay so.
        nu = implicit(nu, size, lambda excess: torch.where(slope > 0, excess / torch.where(slope > 0, slope, 1.0), 0.0))
        every = exists.sum(-1, keepdim=True) == self.k
        solution = torch.where(every, 1.0, (wide - nu).sigmoid())
        return self._show(torch.where(exists, solution, 0.0).to(flat.dtype), utility)

    def l2x(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        """Elementwise maximum of k Concrete samples (Chen et al. 2018, L2X).

        The result is not a point of conv(X): its sum is at most k.

        Args:
            utility: ``[k, *batch, *parts]``, independent along the first dimension, divided by the
                temperature.
            mask: which parts exist, broadcastable to ``[*batch, *parts]``.

        Returns:
            ``[*batch, *parts]``.
        """
        if utility.dim() <= self.layout.ndim or utility.shape[0] != self.k:
            raise ValueError(f"l2x takes utilities [{self.k}, *batch, *parts]; got {list(utility.shape)}")
        flat, exists = self._read(utility, mask)
        soft = flat.masked_fill(~exists, torch.finfo(flat.dtype).min).softmax(-1) * exists
        return self._show(soft.amax(0), utility)

    def softsub(self, utility: Tensor, mask: Tensor | None = None, temperature: float | Tensor = 1.0) -> Tensor:
        """Successive softmaxes; each one discounts what was taken before (Xie and Ermon 2019,
        Algorithm 1, eq. 7).

        With ``p = softmax(a / t)`` the next ``a`` is ``a + log(1 - p)``. The result is the sum of
        the k softmaxes. It sums to k, but its entries may exceed 1.

        Args:
            utility: ``[*batch, *parts]``, divided by the temperature, ``a / t``.
            mask: which parts exist.
            temperature: t, by which the discount must be divided: a number, or ``[*batch, 1,
                ...]``.
        """
        flat, exists = self._read(utility, mask)
        if isinstance(temperature, Tensor) and temperature.dim():
            temperature = temperature.flatten(-self.layout.ndim)
        dtype, flat = flat.dtype, flat.double()  # large utilities leave float32 nothing of a discount
        total = torch.zeros_like(flat)
        for step in range(self.k):
            seen = flat.masked_fill(~exists, -math.inf)
            log_all = seen.logsumexp(-1, keepdim=True)
            p = (seen - log_all).exp()
            total = total + p
            if step + 1 == self.k:
                break
            # log(1 - p) of the largest comes from the sum of the others, as p may round to 1. As k
            # > 1, there is another.
            largest = seen.argmax(-1, keepdim=True)
            others = seen.scatter(-1, largest, -math.inf)
            is_largest = torch.zeros_like(exists).scatter(-1, largest, True)
            discount = torch.where(
                is_largest, others.logsumexp(-1, keepdim=True) - log_all, torch.log1p(-p.masked_fill(is_largest, 0.0))
            )
            flat = torch.where(exists, flat + discount / temperature, 0.0)
        return self._show(total.to(dtype), utility)

    # --- trace ----------------------------------------------------------------------------------------------------

    def trace(self, exponentials: Tensor, mask: Tensor | None = None) -> Trace:
        """The k smallest, in ascending order: ``choices`` ``[*batch, k]`` index the flattened parts."""
        flat, exists = self._read(exponentials.detach(), mask)
        choices = self._largest(-flat, exists)
        return Trace(self._show(torch.zeros_like(flat).scatter(-1, choices, 1.0), exponentials), choices)

    def trace_log_prob(self, trace: Trace, log_rates: Tensor, mask: Tensor | None = None) -> Tensor:
        """Plackett-Luce probability of the ordered choices: ``[*batch]``, O(n + k)."""
        flat, exists = self._read(log_rates, mask)
        chosen, rest = plackett_luce_terms(trace.choices, flat, exists)
        return (chosen - rest).sum(-1)

    def conditional(
        self, trace: Trace, log_rates: Tensor, mask: Tensor | None = None, noise: Noise | None = None
    ) -> Tensor:
        """``E`` given the ordered k smallest, reparameterised (Struminsky et al. 2021, Algorithm 6)."""
        flat, exists = self._read(log_rates, mask)
        steps, parts = noise or self.conditional_noise(trace, log_rates)
        sample = plackett_luce_conditional(trace.choices, flat.double(), exists, steps, self.layout.flatten(parts))
        shown = self._show(sample, log_rates)
        return torch.where(self.layout.mirror(self.parts(log_rates, mask).to(shown.dtype)) > 0, shown, 1.0)

    def enumerate(self, *shape: int) -> Tensor:
        """All ``n choose k`` subsets: ``[V, *parts]``."""
        parts = self.parts(torch.empty(shape)).flatten().nonzero()[:, 0].tolist()
        self.check_listable(math.comb(len(parts), self.k), *shape)
        chosen = torch.tensor(list(itertools.combinations(parts, self.k)), dtype=torch.int64).reshape(-1, self.k)
        full = torch.zeros(len(chosen), math.prod(shape), dtype=torch.float64).scatter(-1, chosen, 1.0)
        return self.layout.mirror(full.reshape(len(chosen), *shape))
