"""Any subset of independent parts: bit vectors, independent edges."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from structgrad.algorithms.capped_simplex import nested_decomposition, systematic_decomposition
from structgrad.algorithms.k_best import best_first
from structgrad.algorithms.noise import wide_exponentials
from structgrad.common.ranges import check_count
from structgrad.structures.base import SparseDistribution, repeated
from structgrad.structures.derived import Gibbs
from structgrad.structures.family_subsets import Flat
from structgrad.structures.layout import Layout, LayoutName, make_layout
from structgrad.structures.relaxation import Relaxation, negative_binary_entropy, negative_entropy


class Subset(Flat, Gibbs):
    """All 0/1 vectors over D independent parts (Paulus et al. 2020, B.3; Correia et al. 2020,
    section 4).

    With Gibbs scores ``s`` each bit is Bernoulli(sigmoid(s)), which is ``[U > 0]`` for utilities
    ``U = s + Logistic``. The smallest of several exponentials does not decide a bit, so there is no
    ``trace``. The bits are their own trace, and ``log_prob`` is its probability.
    :meth:`conditional_utility` is the reparameterised ``U | x`` of REBAR and RELAX.

    Relaxations: ``exp_family`` and ``binary`` are the sigmoid, ``euclidean`` is ``clip(u, 0, 1)``,
    and ``categorical`` is ``min(1, exp(u))``. The cost is O(D) an example, O(D log D) for
    :meth:`sparsemap` and O(D + k^2) for :meth:`top_k`.

    Args:
        layout: ``"vector"`` (bit vectors), ``"matrix"``, ``"directed"`` or ``"undirected"``
            (independent edges).
    """

    is_independent: ClassVar[bool] = True

    #: The noise of the Gibbs distribution: a sample is the argmax of the scores plus this noise.
    noise: ClassVar[str | None] = "logistic"

    def __init__(self, layout: LayoutName | Layout = "vector") -> None:
        self.layout = make_layout(layout)

    def __repr__(self) -> str:
        return f"Subset(layout={self.layout.name!r})"

    def own_relaxations(self) -> dict[str, Relaxation]:
        """The relaxations ``binary``, which is the sigmoid again, and ``categorical``."""
        return {
            "binary": Relaxation("marginals", regularizer=negative_binary_entropy, symmetric=True),
            "categorical": Relaxation("categorical", regularizer=negative_entropy, symmetric=True),
        }

    def argmax(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[utility > 0]``: ``[*batch, *parts]``."""
        flat, _ = self._read(utility.detach(), mask)
        return self._show((flat > 0).to(utility.dtype), utility)

    def top_k(self, scores: Tensor, k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k best subsets, exact, by merging.

        The k best subsets differ from the argmax in few bits, which are among the k - 1 cheapest
        ones to flip. The list of the k cheapest sets of flips grows one bit at a time: it is merged
        with itself plus that bit. This is O(D + k^2), one pass for the whole batch.
        """
        check_count("k", k)
        flat, exists = self._read(scores, mask)
        with torch.no_grad():
            cost = flat.abs().masked_fill(~exists, math.inf)
            steps = min(k - 1, cost.shape[-1])
            cheapest, bit = cost.topk(steps, dim=-1, largest=False)
            total = cost.new_full((*cost.shape[:-1], k), math.inf)
            total[..., 0] = 0
            flips = torch.zeros(*total.shape, steps, dtype=torch.bool, device=flat.device)
            for step in range(steps):
                both = torch.cat([total, total + cheapest[..., step, None]], -1)
                total, origin = both.topk(k, dim=-1, largest=False)
                flips = flips.gather(-2, (origin % k)[..., None].expand_as(flips))
                flips[..., step] = origin >= k
            real = total < math.inf
            flipped = torch.zeros(*total.shape, cost.shape[-1], dtype=torch.bool, device=flat.device)
            flipped = flipped.scatter(-1, bit[..., None, :].expand_as(flips), flips)
            vertices = ((flat > 0)[..., None, :] ^ flipped) & real[..., None]
        vertices, values = best_first(vertices, real, flat)
        return self._show(vertices.to(flat.dtype), scores), values

    def log_partition(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``sum softplus(scores)``: ``[*batch]``."""
        flat, exists = self._read(scores, mask)
        return torch.where(exists, torch.nn.functional.softplus(flat), 0.0).sum(-1)

    def marginals(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``sigmoid(scores) = argmax_x <x, scores> - sum x log x + (1 - x) log(1 - x)``: ``[*batch, *parts]``."""
        flat, exists = self._read(scores, mask)
        return self._show(flat.sigmoid() * exists, scores)

    def _moments(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.log_partition(scores, mask), self.marginals(scores, mask)

    def categorical(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        """``min(1, exp(utility))``, the categorical-entropy relaxation
        ``argmax_x <x, u> - sum (x log x - x)``.

        Returns:
            ``[*batch, *parts]`` (Paulus et al. 2020, B.3).
        """
        flat, exists = self._read(utility, mask)
        return self._show(flat.clamp(max=0).exp() * exists, utility)

    def sample(self, scores: Tensor, mask: Tensor | None = None, n: int | None = None) -> Tensor:
        """Independent Bernoulli(sigmoid(scores)): ``[*batch, *parts]``."""
        flat, exists = self._read(scores.detach(), mask)
        return self._show(repeated(flat.sigmoid(), n).bernoulli() * exists, scores)

    def log_prob(self, vertex: Tensor, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``sum_i log sigmoid(+-scores_i)``: ``[*batch]``."""
        self.check_vertex(vertex, scores, mask)
        flat, exists = self._read(scores, mask)
        sign = 2 * self.layout.flatten(vertex).to(flat) - 1
        return torch.where(exists, torch.nn.functional.logsigmoid(sign * flat), 0.0).sum(-1)

    def entropy(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Sum of the entropies of the bits: ``[*batch]``."""
        flat, exists = self._read(scores, mask)
        # Even in the score. It is written with |score|, so that nothing cancels, but not with
        # abs(), whose second derivative autograd does not know at 0.
        size = flat * torch.where(flat >= 0, 1.0, -1.0)
        each = torch.nn.functional.softplus(-size) + size * (-size).sigmoid()
        return torch.where(exists, each, 0.0).sum(-1)

    def project(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``clip(scores, 0, 1)``, the nearest point of the unit cube: ``[*batch, *parts]``."""
        flat, _ = self._read(scores, mask)
        return self._show(flat.clamp(0, 1), scores)

    def sparsemap(
        self,
        scores: Tensor,
        mask: Tensor | None = None,
        method: Literal["nested", "systematic"] = "nested",
    ) -> SparseDistribution:
        """SparseMAP on the bits (Correia et al. 2020, eq. 4): at most D + 1 subsets whose mean is
        :meth:`project`.

        The mean is unique, the distribution is not. Both methods give a distribution in closed
        form, O(D log D).

        Args:
            scores: ``[*batch, *parts]``.
            mask: which parts exist.
            method: ``nested`` takes level sets of the projection, a chain of subsets.
                ``systematic`` takes cumulative sums modulo 1, which gives subsets whose sizes
                differ by at most one.
        """
        flat, _ = self._read(scores, mask)
        point = flat.clamp(0, 1).reshape(flat.shape[:-1].numel(), flat.shape[-1])
        if method == "nested":
            vertices, rows, weights = nested_decomposition(point)
        elif method == "systematic":
            vertices, rows, weights = systematic_decomposition(point, 0, point.shape[-1])
        else:
            raise ValueError(f"method must be nested or systematic; got {method!r}")
        return SparseDistribution(self._show(vertices, scores), rows, weights)

    def conditional_utility(
        self, vertex: Tensor, scores: Tensor, mask: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """A sample of ``U | [U > 0] = vertex`` for ``U = scores + Logistic``, reparameterised in
        the scores.

        The logistic is truncated at 0 by inverting its survival function (Tucker et al. 2017,
        appendix C; Grathwohl et al. 2018, section 3.2). Let ``a = s`` for a bit of 1 and ``a = -s``
        for a bit of 0. Then ``P(|U| > m | x) = sigmoid(a - m) / sigmoid(a)``, so ``|U| =
        softplus(softplus(a) + Logistic)``, which cannot overflow.

        The result is positive exactly where the vertex is 1, and is shown like a vertex.
        """
        flat, exists = self._read(scores, mask)
        sign = 2 * self.layout.flatten(vertex) - 1
        e = self.layout.flatten(wide_exponentials(scores) if noise is None else noise)
        logistic = -(e + torch.log(-torch.expm1(-e))).to(flat)  # exp(-e) is uniform
        softplus = torch.nn.functional.softplus
        size = softplus(softplus(sign * flat) + logistic)
        return self._show(torch.where(exists, sign * size, 0.0), scores)

    def enumerate(self, *shape: int) -> Tensor:
        """All subsets: ``[2^D, *parts]``."""
        count = int(self.parts(torch.empty(shape)).sum())
        self.check_listable(2**count, *shape)
        corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=count)), dtype=torch.float64)
        corners = corners.reshape(2**count, count)
        full = corners.new_zeros(len(corners), *shape)
        full[:, self.parts(full[0])] = corners
        return self.layout.mirror(full)
