"""Vector quantisation: the nearest word of a learnt codebook."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from structgrad.estimators.base import Divergence, Estimate, Estimator, Objective, Over, UnsupportedError, pathwise
from structgrad.structures import OneHot
from structgrad.structures.base import Structure


class VectorQuantization(Estimator):
    r"""The nearest word of a codebook, with its gradient passed straight to the encoder's vector (van den Oord et al.
    2017; Niculae et al., *Discrete Latent Structure in Neural Networks*, section 4.3.2).

    Scores are a vector z of any size; what the objective gets as vertices are *words*, ``[N, size]``: here the latent
    variable is embedded by the estimator and not by the decoder. With e the word nearest to z the surrogate is

    .. math:: L(e) + |sg(z) - e|^2 + commitment\, |z - sg(e)|^2,

    in whose first term the gradient for e is handed to z. The second moves words to what they stand for; they learn
    from nothing else. Without noise, in training and evaluation alike.

    ``kl`` is over the vertex and constant: a point mass is the logarithm of the number of words away from the uniform
    distribution. The metric ``code_perplexity`` is the exponential of the entropy of the words' use in the batch.

    Args:
        structure: ``OneHot``: one of the words.
        words: in the codebook.
        size: of the vectors, the last dimension of the scores.
        commitment: weight of the third term.

    Raises:
        UnsupportedError: for another structure.
        ValueError: for options out of range; from a call, for a mask, or vectors of another size.
    """

    needs_differentiable_objective: ClassVar[bool] = True
    kl_over: Over | None = "vertex"

    def __init__(self, structure: Structure, words: int, size: int, commitment: float = 0.25) -> None:
        super().__init__(structure)
        if not isinstance(structure, OneHot):
            raise UnsupportedError(f"estimator vector_quantization needs OneHot; got {structure.name}")
        if words < 1 or size < 1:
            raise ValueError(f"words and size must be at least 1; got {words} and {size}")
        if not 0 <= commitment < math.inf:
            raise ValueError(f"commitment must not be negative; got {commitment}")
        self.commitment = commitment
        self.codebook = nn.Parameter(torch.empty(words, size).uniform_(-1 / words, 1 / words))

    def estimate(
        self, scores: Tensor, objective: Objective, mask: Tensor | None, context: Tensor | None, kl_weight: float
    ) -> Estimate:
        """See :class:`~structgrad.estimators.base.Estimator`."""
        words, size = self.codebook.shape
        if mask is not None:
            raise ValueError("vector_quantization takes no mask: every entry of a vector exists")
        if scores.shape[1] != size:
            raise ValueError(f"the codebook has words of size {size}; got vectors {list(scores.shape)}")
        self.structure.check(scores)
        index = torch.cdist(scores.detach(), self.codebook.detach().to(scores.dtype)).argmin(-1)
        word = self.codebook.to(scores.dtype)[index]
        divergence = Divergence(scores.new_full((scores.shape[0],), math.log(words)), "vertex")
        use = index.bincount(minlength=words).to(scores.dtype) / max(1, len(index))
        metrics = {"code_perplexity": torch.special.entr(use).sum().exp()}
        if not self.training:
            return pathwise(objective, word.detach(), 1, divergence, metrics)
        passed = word.detach() + (scores - scores.detach())
        estimate = pathwise(objective, passed, 1, divergence, metrics)
        learnt = (scores.detach() - word).square().sum(1)
        committed = (scores - word.detach()).square().sum(1)
        estimate.surrogate = estimate.surrogate + learnt + self.commitment * committed
        return estimate


__all__ = ["VectorQuantization"]
