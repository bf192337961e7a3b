"""Classifier, Gaussian encoder and decoder of the semi-supervised VAE (architecture of Liu et al. 2019)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from structgrad import losses
from structgrad.tasks.ssvae.likelihood import negative_log_likelihood


class Classifier(nn.Sequential):
    """Scores of the classes: three hidden layers, ReLU.

    Args:
        pixels: number of pixels of an image.
        classes: K, the number of classes.
        hidden: number of units of each layer.
    """

    def __init__(self, pixels: int, classes: int, hidden: int) -> None:
        sizes = (pixels, hidden, hidden, hidden)
        layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU(True))]
        super().__init__(*layers, nn.Linear(hidden, classes))


class Encoder(nn.Module):
    """``q(h | x, z)``: mean and logarithm of the standard deviation of a Gaussian, from image and
    class.

    The input of the first layer is the image and the one-hot class. Here its image part is a layer
    of its own, so that it is computed once an image, however many classes are evaluated.

    Args:
        pixels: number of pixels of an image.
        classes: K, the number of classes.
        style: size of h.
        hidden: number of units of each of two hidden layers, ReLU.
    """

    def __init__(self, pixels: int, classes: int, style: int, hidden: int) -> None:
        super().__init__()
        self.image = nn.Linear(pixels, hidden)
        self.label = nn.Linear(classes, hidden, bias=False)
        self.inner = nn.Linear(hidden, hidden)
        self.outer = nn.Linear(hidden, 2 * style)
        # Initialise it like one layer with pixels + classes inputs.
        bound = 1 / math.sqrt(pixels + classes)
        for parameter in (self.image.weight, self.image.bias, self.label.weight):
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, features: Tensor, vertices: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation, ``[N, style]`` each.

        Args:
            features: ``self.image(images)`` for the image of each vertex, ``[N, hidden]``.
            vertices: ``[N, classes]``, hard or relaxed.
        """
        hidden = self.inner((features + self.label(vertices)).relu()).relu()
        mean, log_deviation = self.outer(hidden).chunk(2, -1)
        return mean, log_deviation


class Decoder(nn.Module):
    """``p(x | z, h)``: logits of independent Bernoulli pixels; two hidden layers, ReLU.

    Args:
        pixels: number of pixels of an image.
        classes: K, the number of classes.
        style: size of h.
        hidden: number of units of each layer.
    """

    def __init__(self, pixels: int, classes: int, style: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Linear(style + classes, hidden), nn.ReLU(True), nn.Linear(hidden, hidden), nn.ReLU(True)
        )
        self.outer = nn.Linear(hidden, pixels)

    def forward(self, styles: Tensor, vertices: Tensor) -> Tensor:
        """Logits ``[N, pixels]`` of ``[N, style]`` and ``[N, classes]``."""
        logits: Tensor = self.outer(self.inner(torch.cat([styles, vertices], -1)))
        return logits


class Networks(nn.Module):
    """The three networks together.

    Args:
        pixels: number of pixels of an image.
        classes: K, the number of classes.
        style: size of h.
        hidden: number of units of the classifier's layers.
        vae_hidden: number of units of the encoder's and the decoder's layers.
    """

    def __init__(self, pixels: int, classes: int, style: int, hidden: int, vae_hidden: int) -> None:
        super().__init__()
        self.classifier = Classifier(pixels, classes, hidden)
        self.encoder = Encoder(pixels, classes, style, vae_hidden)
        self.decoder = Decoder(pixels, classes, style, vae_hidden)

    def negative_elbo(self, images: Tensor, features: Tensor, vertices: Tensor, rows: Tensor) -> Tensor:
        """``-log p(x | z, h) + KL(q(h | x, z) || N(0, I))`` for one sample of h a vertex, in nats:
        ``[N]``.

        This is Correia et al. (2020), equation 5, without the term of the class's own prior.

        Args:
            images: 0 or 1, ``[batch, pixels]``.
            features: ``encoder.image(images)``, ``[batch, vae_hidden]``.
            vertices: ``[N, classes]``, hard or relaxed.
            rows: int64 ``[N]``: the image of each vertex.
        """
        mean, log_deviation = self.encoder(features[rows], vertices)
        deviation = log_deviation.exp()
        moments = torch.addcmul(mean.square(), deviation, deviation)
        twice_kl = torch.sub(moments, log_deviation, alpha=2).sum(-1) - mean.shape[-1]
        logits = self.decoder(torch.addcmul(mean, deviation, torch.randn_like(mean)), vertices)
        return torch.add(negative_log_likelihood(logits, images, rows), twice_kl, alpha=0.5)

    def labelled_loss(self, images: Tensor, features: Tensor, scores: Tensor, labels: Tensor, loss: str) -> Tensor:
        """Negative ELBO at the true class plus the loss of the classifier: ``[batch]``.

        Args:
            images: 0 or 1, ``[batch, pixels]``.
            features: ``encoder.image(images)``.
            scores: ``classifier(images)``.
            labels: int64 ``[batch]``.
            loss: a key of :data:`CLASSIFICATION_LOSSES`.
        """
        vertices = F.one_hot(labels, scores.shape[-1]).to(scores)
        rows = torch.arange(len(images), device=images.device)
        return self.negative_elbo(images, features, vertices, rows) + CLASSIFICATION_LOSSES[loss](scores, labels)


#: Losses of scores ``[batch, classes]`` and labels ``[batch]``, one for each mapping from scores to
#: probabilities. The sparsemax loss is 0 where sparsemax is certain of the label (Martins and
#: Astudillo 2016).
CLASSIFICATION_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": partial(F.cross_entropy, reduction="none"),
    "sparsemax": losses.sparsemax_loss,
}
