"""A layout: marks on a ring that look the same from both sides."""

import torch
from torch import Tensor

from structgrad.structures import Layout


class Mirrored(Layout):
    """``[n]``, equal from both ends: the parts are the first half, and each is shown at both ends.

    The middle of an odd ring is shown once. Four methods say it. That the gradient of a part is the sum over the
    entries that show it follows from :meth:`mirror`.
    """

    def __init__(self) -> None:
        super().__init__("mirrored", ("n",))

    def parts(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """The first half."""
        n = scores.shape[-1]
        half = torch.arange(n, device=scores.device) < (n + 1) // 2
        return (half if mask is None else mask & half).expand(scores.shape)

    def mirror(self, parts: Tensor) -> Tensor:
        """The first half, then the same backwards."""
        return self.unflatten(self.flatten(parts), parts.shape[-1:])

    def flatten(self, parts: Tensor) -> Tensor:
        """Each part once."""
        return parts[..., : (parts.shape[-1] + 1) // 2]

    def unflatten(self, flat: Tensor, shape: torch.Size) -> Tensor:
        """Shown at both ends."""
        return torch.cat([flat, flat[..., : shape[-1] // 2].flip(-1)], -1)
