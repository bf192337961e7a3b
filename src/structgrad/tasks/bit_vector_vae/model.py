"""Encoder and decoder of the bit-vector VAE (Correia et al. 2020, section 5.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from structgrad.tasks.bit_vector_vae.likelihood import CHUNK, cross_entropy

#: Grey levels.
LEVELS = 256


class Encoder(nn.Module):
    """Scores of bits from pixels: one hidden layer, ReLU.

    Args:
        pixels: number of pixels of an image.
        bits: D, the number of bits.
        hidden: number of hidden units.
        centred: subtract an image, :attr:`centre`, from the inputs.

    Attributes:
        centre: float32 ``[pixels]``, values 0 to 1; with ``centred`` only; 0 until it is set.
    """

    centre: Tensor

    def __init__(self, pixels: int, bits: int, hidden: int, centred: bool = False) -> None:
        super().__init__()
        self.inner = nn.Linear(pixels, hidden)
        self.outer = nn.Linear(hidden, bits)
        self.centred = centred
        if centred:
            self.register_buffer("centre", torch.zeros(pixels))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores ``[batch, bits]`` and features ``[batch, hidden]`` of uint8 images ``[batch, pixels]``."""
        values = images / 255 - self.centre if self.centred else images / 255
        features = self.inner(values).relu()
        return self.outer(features), features


class Decoder(nn.Module):
    """Independent categorical distributions of 256 grey levels for every pixel, from bits.

    There is one hidden layer, ReLU. Each pixel gets ``rank`` features. One linear map, shared by
    all pixels, makes the logits of the grey levels from them.

    Args:
        pixels: number of pixels of an image.
        bits: D, the number of bits.
        hidden: number of hidden units.
        rank: number of features of a pixel.
    """

    def __init__(self, pixels: int, bits: int, hidden: int, rank: int = 5) -> None:
        super().__init__()
        self.pixels, self.rank = pixels, rank
        self.inner = nn.Linear(bits, hidden)
        self.outer = nn.Linear(hidden, pixels * rank)
        self.levels = nn.Linear(rank, LEVELS)

    def forward(self, vertices: Tensor, images: Tensor, rows: Tensor) -> Tensor:
        """``-log p(images[rows] | vertices)`` in nats: ``[N]``.

        Args:
            vertices: ``[N, bits]``, hard or relaxed.
            images: uint8 ``[batch, pixels]``.
            rows: int64 ``[N]``.
        """
        hidden = self.inner(vertices).relu()
        outer, levels = self.outer, self.levels
        return cross_entropy(hidden, outer.weight, outer.bias, levels.weight, levels.bias, targets=images, rows=rows)

    @torch.no_grad()
    def of_all_pairs(self, vertices: Tensor, images: Tensor) -> Tensor:
        """``-log p(image | vertex)`` in nats of every vertex with every image: ``[N, batch]``.

        Images differ only in the logits of their own grey levels, which are one product of matrices
        for all pairs. Normalising constants are computed once a vertex.

        Args:
            vertices: ``[N, bits]``, hard or relaxed.
            images: uint8 ``[batch, pixels]``.
        """
        black = torch.zeros_like(images[:1])
        # In float64: sums over all pixels whose difference is much smaller than they are.
        maps = torch.cat([self.levels.weight, self.levels.bias[:, None]], 1).double()
        excess = maps[0] - maps[images.long()]  # of black over an image's own levels: [batch, pixels, rank + 1]
        slopes, offsets = excess[..., :-1].flatten(1), excess[..., -1].sum(1)
        parts = []
        for some in vertices.split(CHUNK):
            features = self.outer(self.inner(some).relu())
            rows = torch.zeros(len(some), dtype=torch.int64, device=some.device)
            parts.append(self(some, black, rows)[:, None] + features.double() @ slopes.T + offsets)
        return torch.cat(parts)

    @torch.no_grad()
    def mean(self, vertices: Tensor) -> Tensor:
        """The expected grey levels, 0 to 255: ``[N, pixels]``."""
        values = torch.arange(LEVELS, device=vertices.device, dtype=vertices.dtype)
        parts = []
        for some in vertices.split(CHUNK):
            features = self.outer(self.inner(some).relu()).reshape(-1, self.pixels, self.rank)
            parts.append(self.levels(features).softmax(-1) @ values)
        return torch.cat(parts)
