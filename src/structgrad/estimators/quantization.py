"""Vector quantisation: the nearest word of a learnt codebook."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from structgrad.algorithms.products import product
from structgrad.common.ranges import check_count
from structgrad.estimators.base import (
    Estimate,
    Estimator,
    Objective,
    Over,
    SizeMismatchError,
    UnsupportedError,
    pathwise,
)
from structgrad.structures.base import Structure


class VectorQuantization(Estimator):
    r"""The nearest word of a codebook. Its gradient is passed straight to the encoder's vector.

    See van den Oord et al. (2017) and Niculae et al., *Discrete Latent Structure in Neural
    Networks*, section 4.3.2. Scores are a vector z of any size. The objective gets *words*,
    ``[N, size]``, as vertices, because the estimator embeds the latent variable and not the
    decoder. With e the word nearest to z the surrogate is

    .. math:: L(e) + |sg(z) - e|^2 + commitment\, |z - sg(e)|^2.

    In the first term the gradient for e is passed to z. The second term moves words towards the
    vectors for which they stand; words learn from nothing else. There is no noise, in training and
    in evaluation.

    Masked entries are 0 in every word and count in no distance. There is no ``kl``: the word is a
    point mass, a constant away from the uniform distribution. The metric ``code_perplexity`` is the
    exponential of the entropy of the use of words in the batch.

    Args:
        structure: ``OneHot``: one of the words.
        words: number of words in the codebook.
        size: size of the vectors, the last dimension of the scores.
        commitment: weight of the third term.

    Raises:
        UnsupportedError: for another structure.
        TypeError: for words or a size that are not whole numbers.
        ValueError: for options out of range.
        SizeMismatchError: from a call, for vectors of another size.
    """

    needs_differentiable_objective: ClassVar[bool] = True
    kl_over: Over | None = None

    def __init__(self, structure: Structure, words: int, size: int, commitment: float = 0.25) -> None:
        super().__init__(structure)
        if not structure.is_categorical:
            raise UnsupportedError(
                f"estimator vector_quantization needs one category out of all (OneHot); got {structure.name}"
            )
        check_count("words", words)
        check_count("size", size)
        if not 0 <= commitment < math.inf:
            raise ValueError(f"commitment must not be negative; got {commitment}")
        self.commitment = commitment
        self.codebook = nn.Parameter(torch.empty(words, size).uniform_(-1 / words, 1 / words))

    def estimate(
        self,
        scores: Tensor,
        objective: Objective,
        mask: Tensor | None,
        context: Tensor | None,
        kl_weight: float,
        prior_scores: Tensor | None,
    ) -> Estimate:
        """See :class:`~structgrad.estimators.base.Estimator`."""
        words, size = self.codebook.shape
        if scores.shape[1] != size:
            raise SizeMismatchError(f"the codebook has words of size {size}; got vectors {list(scores.shape)}")
        self.structure.check(scores, mask)
        exists = self.structure.parts(scores, mask)
        z, codebook = torch.where(exists, scores, 0.0), self.codebook.to(scores.dtype)
        with torch.no_grad():
            # Squared distances over the entries that exist, up to |z|^2.
            index = (product(exists.to(z), codebook.square().T) - product(2 * z, codebook.T)).argmin(-1)
        word = torch.where(exists, codebook[index], 0.0)
        use = index.bincount(minlength=words).to(scores.dtype) / max(1, len(index))
        metrics = {"code_perplexity": torch.special.entr(use).sum().exp()}
        if not self.training:
            return pathwise(objective, word.detach(), 1, None, metrics)
        passed = word.detach() + (z - z.detach())
        estimate = pathwise(objective, passed, 1, None, metrics)
        learnt = (z.detach() - word).square().sum(1)
        committed = (z - word.detach()).square().sum(1)
        estimate.surrogate = estimate.surrogate + learnt + self.commitment * committed
        return estimate


__all__ = ["VectorQuantization"]
