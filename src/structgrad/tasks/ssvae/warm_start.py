"""The stage before training: networks trained on the labelled images alone, made once and cached."""

from __future__ import annotations

import hashlib
import logging
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from structgrad.common.ranges import check_choice, check_count, check_range
from structgrad.data import Batch, Batches, cache
from structgrad.estimators import Marginalize
from structgrad.structures import OneHot
from structgrad.tasks.ssvae.data import resample
from structgrad.tasks.ssvae.model import Networks

Select = Literal["best", "last"]

log = logging.getLogger("structgrad")

#: Part of the key of a cache. Raise it when the same configuration would give other parameters.
_VERSION = 1
#: The number of images whose ELBO is computed at once.
_AT_ONCE = 500


@dataclass
class WarmStart:
    """Training on labelled images alone, as a stage before the run (Correia et al. 2020, released
    code).

    One warm start serves all seeds of a run and all estimators with the same classification loss.
    It is stored completely or not at all; if it is killed, it is done again. The networks are those
    of the last epoch, or of the epoch with the best ELBO on the validation images. That ELBO sums
    over all classes under the classifier's distribution.

    Args:
        epochs: number of epochs over the labelled images; 0 starts from random parameters.
        batch_size: number of labelled images in a batch.
        lr: learning rate of Adam.
        weight_decay: weight decay of Adam.
        seed: seed of parameters, order and pixels.
        select: ``best`` or ``last``, see above.

    Raises:
        ValueError: for numbers out of range.
    """

    epochs: int = 100
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 1e-5
    seed: int = 0
    select: Select = "best"

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_count("warm_start.epochs", self.epochs, least=0)
        check_count("warm_start.batch_size", self.batch_size)
        check_choice("warm_start.select", self.select, get_args(Select))
        check_range("warm_start.lr", self.lr, above=0)
        check_range("warm_start.weight_decay", self.weight_decay, least=0)

    def prepare(self, sizes: dict[str, int], loss: str, labelled: Batch, validation: Batch, folder: str) -> Path:
        """Train and store the networks, unless that is done already.

        Args:
            sizes: the sizes for :class:`~structgrad.tasks.ssvae.model.Networks`.
            loss: the classification loss, see there.
            labelled: ``images`` uint8 ``[n, pixels]``, ``labels`` ``[n]``.
            validation: ``images``.
            folder: ``paths.cache``.

        Returns:
            the folder of the parameters, for :meth:`load`.
        """
        key = {"version": _VERSION, "loss": loss, "data": _digest(labelled), **sizes, **vars(self)}
        if self.select == "best":
            key["validation"] = _digest(validation)
        place = cache.folder_of(folder, "ssvae_warm_start", key)
        cache.ensure(place, key, lambda: {"parameters": self._train(sizes, loss, labelled, validation)})
        return place

    @staticmethod
    def load(place: Path, networks: Networks) -> None:
        """Load the parameters that :meth:`prepare` stored into the networks."""
        table = cache.load(place, "parameters")
        vector = torch.tensor(table["value"].to_numpy(), dtype=torch.float32)
        vector_to_parameters(vector.to(next(networks.parameters()).device), networks.parameters())

    def _train(self, sizes: dict[str, int], loss: str, labelled: Batch, validation: Batch) -> pa.Table:
        """Train on the CPU, so that every device starts from the same. The caller's random state
        does not change.
        """
        log.info("warm start: %d epochs on %d labelled images", self.epochs, len(labelled["labels"]))
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(self.seed)
            networks = Networks(**sizes)
            optimizer = torch.optim.Adam(networks.parameters(), lr=self.lr, weight_decay=self.weight_decay, fused=True)
            batches = Batches(labelled, self.batch_size, shuffle=True, seed=self.seed)
            best, parameters = -math.inf, parameters_to_vector(networks.parameters()).detach()
            for _ in range(self.epochs):
                for batch in batches:
                    images = resample(batch["images"])
                    features, scores = networks.encoder.image(images), networks.classifier(images)
                    value: Tensor = networks.labelled_loss(images, features, scores, batch["labels"], loss).mean()
                    optimizer.zero_grad()
                    value.backward()
                    optimizer.step()
                elbo = math.inf if self.select == "last" else _elbo(networks, loss, validation)
                if elbo >= best:
                    best, parameters = elbo, parameters_to_vector(networks.parameters()).detach()
            return pa.table({"value": parameters.numpy()})


@torch.no_grad()
def _elbo(networks: Networks, loss: str, validation: Batch) -> float:
    """The mean over the images, with the class summed out."""
    distribution = Marginalize(OneHot(), "sparsemax" if loss == "sparsemax" else "softmax").eval()
    total = 0.0
    for batch in Batches(validation, _AT_ONCE):
        images = resample(batch["images"])
        features = networks.encoder.image(images)
        objective = partial(networks.negative_elbo, images, features)
        estimate = distribution(networks.classifier(images), objective)
        total -= float((estimate.objective + estimate.kl).sum())
    return total / len(validation["images"])


def _digest(labelled: Batch) -> str:
    """A hash of the images themselves, because other images may come under the same name."""
    digest = hashlib.sha256()
    for name in sorted(labelled):
        digest.update(labelled[name].contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
