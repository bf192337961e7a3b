"""One of K categories."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from structgrad.algorithms.capped_simplex import project_capped_simplex
from structgrad.algorithms.eager import refuse, values_can_be_read
from structgrad.algorithms.entmax import entmax
from structgrad.algorithms.noise import wide_exponentials
from structgrad.algorithms.plackett_luce import plackett_luce_conditional
from structgrad.common.ranges import check_count
from structgrad.structures.base import Noise, SparseDistribution, Trace, repeated
from structgrad.structures.derived import Gibbs
from structgrad.structures.layout import Vector
from structgrad.structures.relaxation import Relaxation, negative_entropy


class OneHot(Gibbs):
    """One-hot vectors of K categories (Paulus et al. 2020, B.2; Correia et al. 2020, section 3).

    Everything is O(K) or O(K log K) an example. The exponential-family and categorical-entropy
    relaxations are the softmax. The Euclidean one is sparsemax (Martins and Astudillo 2016), and
    :meth:`entmax` lies between the two.

    Raises:
        ValueError: from every oracle, in eager CPU code, if an example has no category to choose.
    """

    constant_size: ClassVar[bool] = True
    is_categorical: ClassVar[bool] = True
    is_ordinal: ClassVar[bool] = True
    noise: ClassVar[str | None] = "gumbel"

    def __init__(self) -> None:
        self.layout = Vector()

    def own_relaxations(self) -> dict[str, Relaxation]:
        """The relaxation ``categorical``, which is the softmax again."""
        return {"categorical": Relaxation("marginals", regularizer=negative_entropy, symmetric=True)}

    def _read(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Checked scores, lowest where a category is missing, and the categories that exist (None
        for all).
        """
        self.check(scores, mask)
        if mask is None and scores.shape[-1]:
            return scores, None
        exists = self.parts(scores, mask)
        refuse(~exists.any(-1), "has no category to choose from")
        # The lowest number, not -inf: so an example without categories gives zeros on devices that
        # do not read values.
        return scores.masked_fill(~exists, torch.finfo(scores.dtype).min), exists

    def _one_hot(self, index: Tensor, like: Tensor, exists: Tensor | None) -> Tensor:
        """``[*batch]`` -> ``[*batch, K]``."""
        return _where(exists, torch.zeros_like(like, requires_grad=False).scatter(-1, index[..., None], 1.0))

    def argmax(self, utility: Tensor, mask: Tensor | None = None) -> Tensor:
        """The category of highest utility, among ties the first: ``[*batch, K]``."""
        utility, exists = self._read(utility.detach(), mask)
        return self._one_hot(utility.argmax(-1), utility, exists)

    def check_vertex(self, vertex: Tensor, scores: Tensor, mask: Tensor | None = None) -> None:
        """As for every structure. Good vertices without a mask, those of a training step, are recognised sooner."""
        if mask is None and vertex.shape == scores.shape and vertex.numel() and values_can_be_read(vertex):
            x = vertex.detach().to(scores.dtype)
            if torch.equal(self._one_hot(x.argmax(-1), x, None), x):
                return
        super().check_vertex(vertex, scores, mask)

    def top_k(self, scores: Tensor, k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k categories of highest score, exact: ``[*batch, k, K]`` and ``[*batch, k]``."""
        check_count("k", k)
        scores, _ = self._read(scores, mask)
        size = min(k, scores.shape[-1])
        values, index = scores.topk(size, dim=-1)
        real = self.parts(scores, mask).gather(-1, index)
        values = torch.nn.functional.pad(values.masked_fill(~real, -math.inf), (0, k - size), value=-math.inf)
        vertices = scores.new_zeros(*scores.shape[:-1], k, scores.shape[-1])
        vertices[..., :size, :].scatter_(-1, index[..., None], real[..., None].to(scores.dtype))
        return vertices, values

    def log_partition(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``logsumexp(scores)``: ``[*batch]``."""
        return self._read(scores, mask)[0].logsumexp(-1)

    def marginals(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``softmax(scores) = argmax_p <p, scores> - sum p log p``: ``[*batch, K]``."""
        scores, exists = self._read(scores, mask)
        return _where(exists, scores.softmax(-1))

    def _moments(self, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.log_partition(scores, mask), self.marginals(scores, mask)

    def sample(self, scores: Tensor, mask: Tensor | None = None, n: int | None = None) -> Tensor:
        """The Gumbel-max trick: ``[*batch, K]``."""
        scores, exists = self._read(repeated(scores.detach(), n), mask)
        return self._one_hot((scores - wide_exponentials(scores).log()).argmax(-1), scores, exists)

    def log_prob(self, vertex: Tensor, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``<vertex, log_softmax(scores)>``: ``[*batch]``."""
        self.check_vertex(vertex, scores, mask)
        scores, exists = self._read(scores, mask)
        return _where(exists, vertex.to(scores.dtype) * scores.log_softmax(-1)).sum(-1)

    def entropy(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """``-sum p log p``: ``[*batch]``."""
        scores, exists = self._read(scores, mask)
        log_p = scores.log_softmax(-1)
        return -_where(exists, log_p.exp() * log_p).sum(-1)

    def project(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Sparsemax, ``argmin_p ||p - scores||^2`` over the simplex: ``[*batch, K]`` (Correia et al. 2020, eq. 2)."""
        scores, _ = self._read(scores, mask)
        return project_capped_simplex(scores, self.parts(scores, mask), 1)

    def entmax(self, scores: Tensor, alpha: float | Tensor = 1.5, mask: Tensor | None = None) -> Tensor:
        """``argmax_p <p, scores> + H_alpha(p)``: ``[*batch, K]`` (Peters et al. 2019).

        Args:
            scores: ``[*batch, K]``.
            alpha: 1 is softmax, 2 is sparsemax. A tensor, broadcastable to ``[*batch, 1]``, may be
                learnt.
            mask: which categories exist.

        Raises:
            ValueError: for an alpha below 1 (for a tensor, in eager CPU code only).
        """
        if not isinstance(alpha, Tensor):
            if not 1 <= alpha < math.inf:
                raise ValueError(f"alpha must be at least 1; got {alpha}")
            if alpha == 1:
                return self.marginals(scores, mask)
            if alpha == 2:
                return self.project(scores, mask)
        elif values_can_be_read(alpha) and not bool(((alpha >= 1) & alpha.isfinite()).all()):
            raise ValueError(f"alpha must be at least 1; got {alpha.tolist()}")
        scores, _ = self._read(scores, mask)
        return entmax(scores, alpha, self.parts(scores, mask))

    def relaxed_log_density(
        self, point: Tensor, scores: Tensor, temperature: float | Tensor = 1.0, mask: Tensor | None = None
    ) -> Tensor:
        """Log-density at ``point`` of the relaxed sample ``softmax((scores + Gumbel) /
        temperature)``.

        This is the Concrete distribution (Maddison et al. 2017, equation 10). The result is
        ``[*batch]``, differentiable in all three arguments.

        Args:
            point: ``[*batch, K]``, inside the simplex of the categories that exist, 0 elsewhere.
            scores: ``[*batch, K]``.
            temperature: positive; a tensor broadcasts to ``[*batch]``.
            mask: which categories exist.

        The density is one of all existing categories except the last, as in
        ``torch.distributions.RelaxedOneHotCategorical``. At a corner it is infinite or 0, so it is
        of no use there.
        """
        self._read(scores, mask)
        exists = self.parts(scores, mask)
        scale = torch.as_tensor(temperature, dtype=torch.float64, device=scores.device).unsqueeze(-1)
        log_x = torch.where(exists, point, 1.0).double().log()
        shifted = torch.where(exists, torch.where(exists, scores, 0.0).double() - scale * log_x, -torch.inf)
        count = exists.sum(-1).double()
        each = torch.where(exists, shifted - shifted.logsumexp(-1, keepdim=True) - log_x, 0.0).sum(-1)
        return (torch.lgamma(count) + (count - 1) * scale.squeeze(-1).log() + each).to(scores.dtype)

    def sparsemap(self, scores: Tensor, mask: Tensor | None = None) -> SparseDistribution:
        """The support of sparsemax; the weights are its positive entries."""
        point = self.project(scores, mask).flatten(0, -2) if scores.dim() > 1 else self.project(scores, mask)[None]
        rows, index = (point > 0).nonzero(as_tuple=True)
        vertices = torch.nn.functional.one_hot(index, point.shape[-1]).to(point.dtype)
        return SparseDistribution(vertices, rows, point[rows, index])

    def trace(self, exponentials: Tensor, mask: Tensor | None = None) -> Trace:
        """Choose the smallest: ``choices`` ``[*batch, 1]`` is its index."""
        vertex = self.argmax(-exponentials, mask)
        return Trace(vertex, vertex.argmax(-1, keepdim=True))

    def trace_log_prob(self, trace: Trace, log_rates: Tensor, mask: Tensor | None = None) -> Tensor:
        """``log_softmax(log_rates)`` at the choice: ``[*batch]``."""
        return self.log_prob(trace.vertex, log_rates, mask)

    def conditional(
        self, trace: Trace, log_rates: Tensor, mask: Tensor | None = None, noise: Noise | None = None
    ) -> Tensor:
        """``E | argmin E``, reparameterised (Struminsky et al. 2021, Algorithm 6; Tucker et al. 2017, appendix)."""
        self._read(log_rates, mask)
        exists = self.parts(log_rates, mask)
        rates = torch.where(exists, log_rates, 0.0).double()
        return plackett_luce_conditional(
            trace.choices, rates, exists, *(noise or self.conditional_noise(trace, log_rates))
        )

    def read(self, vertex: Tensor) -> Tensor:
        """The category: int64 ``[*batch]``."""
        on = vertex.detach() > 0
        return (
            torch.where(on.any(-1), on.int().argmax(-1), -1) if on.shape[-1] else on.new_full(on.shape[:-1], -1).long()
        )

    def _entries(self, reading: Tensor, shape: torch.Size) -> Tensor:
        return reading[..., None]

    def enumerate(self, *shape: int) -> Tensor:
        """The identity matrix: ``[K, K]``."""
        (n,) = shape
        return torch.eye(n, dtype=torch.float64)


def _where(exists: Tensor | None, values: Tensor) -> Tensor:
    """``values``, and 0 for a missing category."""
    return values if exists is None else torch.where(exists, values, 0.0)
