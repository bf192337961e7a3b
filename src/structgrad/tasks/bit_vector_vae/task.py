"""The bit-vector VAE: images compressed into bits (Correia et al. 2020, section 5.3)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from structgrad.common.ranges import check_choice, check_count
from structgrad.data import Batch, Batches
from structgrad.data.images import is_square
from structgrad.estimators.base import Estimate, Estimator
from structgrad.structures import Subset
from structgrad.structures.base import Structure, UnsupportedError
from structgrad.tasks.base import OptimizerFactory, Predictions, Prior, Split, StepOutput, Task
from structgrad.tasks.bit_vector_vae.data import ImageData
from structgrad.tasks.bit_vector_vae.model import Decoder, Encoder
from structgrad.tasks.bit_vector_vae.pictures import draw_reconstructions
from structgrad.tasks.pictures import draw_samples

#: The number of vertices that the importance sampler draws or decodes at once.
_AT_ONCE = 1024


class BitVectorVAE(Task):
    """Compress images into D bits.

    The encoder scores the bits. The objective is ``-log p(x | z)``, an independent categorical
    distribution over 256 grey levels for every pixel. The prior is uniform over all ``2^D`` bit
    vectors, whatever the structure. So the rate is ``D log 2 - H(q)``. It is the estimator's ``kl``
    over the vertex plus ``D log 2 - log |X|``, a constant that is not 0 for structures with a
    budget. An estimator without ``kl`` gets that of a point mass, ``log |X|``, hence a rate of
    ``D log 2``.

    A learnt prior has independent bits with its own scores s, again over all ``2^D``. The rate is
    then the estimator's ``kl`` from the Gibbs distribution of s over the structure's vertices,
    minus the logarithm of the prior probability of these vertices. Metrics are means over images,
    in nats:

    - ``rate``; ``distortion``, the objective; ``elbo``, minus their sum;
    - ``varying_bits``: the fraction of bits whose more likely value is not the same for all images
      of a batch; 0 if the code says nothing about the image;
    - ``decoder_calls``; in training also its quartiles over the images of every epoch;
    - ``bits_per_dim``, at test: ``-log2 p(x)`` by :meth:`log_likelihood`, divided by the number of
      pixels.

    Args:
        structure: over a vector of parts.
        estimator: its ``kl``, if any, must be over the vertex.
        optimizer: see :class:`~structgrad.tasks.base.Task`.
        data: the images.
        bits: D, the number of bits.
        pixels: number of values of an image; None counts them, for which the images are decoded.
        hidden: number of units of encoder and decoder.
        rank: number of features of a pixel in the decoder.
        batch_size: number of images in a training batch.
        eval_batch_size: number of images in a validation or test batch.
        prior: the prior of the bits. If ``learnt``, its scores s are parameters, 0 at first.
        centre_inputs: subtract the mean training image from the encoder's inputs, so that scores of
            different images do not move together. The paper does not.
        importance_samples: number of samples for ``bits_per_dim``.
        importance_images: number of test images for ``bits_per_dim``, the first ones.
        seed: seed of the order of training images.

    Raises:
        UnsupportedError: if the structure lacks ``sample``, ``log_prob`` or ``log_partition``, or
            the estimator's ``kl`` is over parts, or it has none and the prior is learnt.
        ValueError: if the structure's parts are no vector, or a size is below 1.
    """

    monitor: ClassVar[str] = "val/elbo"
    mode: ClassVar[Literal["min", "max"]] = "max"
    test_metrics: ClassVar[tuple[str, ...]] = ("elbo", "bits_per_dim", "distortion", "rate", "varying_bits")
    needs_full_precision = "its likelihood of pixels is a kernel for float32 and float64"
    progress: ClassVar[tuple[str, ...]] = ("rate", "distortion")

    def __init__(
        self,
        *,
        structure: Structure,
        estimator: Estimator | None,
        optimizer: OptimizerFactory,
        data: ImageData,
        bits: int = 32,
        pixels: int | None = 784,
        hidden: int = 128,
        rank: int = 5,
        prior: Prior = "uniform",
        centre_inputs: bool = False,
        batch_size: int = 64,
        eval_batch_size: int = 64,
        importance_samples: int = 1024,
        importance_images: int = 10_000,
        seed: int = 0,
    ) -> None:
        super().__init__(structure=structure, estimator=estimator, optimizer=optimizer)
        if structure.layout.ndim != 1 or not structure.is_linear or estimator is None:
            raise ValueError(f"bit_vector_vae needs a latent vector of bits; got {structure.name}")
        structure.require("sample", "log_prob", "log_partition", by="task bit_vector_vae")
        if estimator.kl_over == "parts":
            raise UnsupportedError(
                "task bit_vector_vae needs the KL of the bit vectors, and this estimator has that of utilities, which "
                "is larger; relaxations with estimator.utility=gibbs have estimator.kl=distribution"
            )
        check_choice("prior", prior, get_args(Prior))
        if prior == "learnt" and estimator.kl_over is None:
            raise UnsupportedError(
                "task bit_vector_vae (prior=learnt) learns the prior from the KL divergence, and "
                f"{type(estimator).__name__} has none"
            )
        check_count("batch_size", batch_size, most=data.train)
        pixels = data.pixels if pixels is None else pixels
        sizes = {"bits": bits, "pixels": pixels, "hidden": hidden, "rank": rank, "eval_batch_size": eval_batch_size}
        for name, size in (sizes | {"importance_samples": importance_samples}).items():
            check_count(name, size)
        check_count("importance_images", importance_images)
        self.check_structure((bits,), f"{bits} bits")
        self.data, self.bits, self.pixels, self.seed = data, bits, pixels, seed
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.importance_samples, self.importance_images = importance_samples, importance_images
        self.encoder = Encoder(pixels, bits, hidden, centred=centre_inputs)
        self.decoder = Decoder(pixels, bits, hidden, rank)
        self.prior = torch.nn.Parameter(torch.zeros(bits)) if prior == "learnt" else None
        log_size = float(structure.log_partition(torch.zeros(bits, dtype=torch.float64)))
        self._outside = bits * math.log(2) - log_size
        self._calls: list[Tensor] = []
        #: Whether a training step computes ``varying_bits``: only if it is logged, as it takes ten launches.
        self._shows_bits = False

    def prepare_data(self) -> None:
        """Decode the images, unless they are cached."""
        self.source.prepare()

    def setup(self, stage: str) -> None:
        """Set the mean training image, if the encoder subtracts it. A checkpoint's own image is
        kept.
        """
        if self.encoder.centred and self.evaluation is None:
            self.encoder.centre.copy_((self.data.split("train").double().mean(0) / 255).float())

    def batches(self, split: Split) -> Batches:
        """Grey levels and the number of each image within its split."""
        images = self.source.split(split)
        if images.shape[1] != self.pixels:
            raise ValueError(
                f"pixels={self.pixels}, but the images of {self.source.source} have {images.shape[1]}; null counts them"
            )
        return Batches(
            {"images": images, "number": torch.arange(len(images))},
            self.batch_size if split == "train" else self.eval_batch_size,
            shuffle=split == "train",
            seed=self.seed,
        )

    def step(self, batch: Batch) -> StepOutput:
        """The negative ELBO."""
        return self._step(batch)[0]

    def _step(self, batch: Batch) -> tuple[StepOutput, Tensor, Estimate]:
        """Also return the scores and the estimate."""
        assert self.estimator is not None
        images = batch["images"]
        scores, features = self.encoder(images)
        prior = self.prior
        estimate = self.estimator(
            scores,
            lambda vertices, rows: self.decoder(vertices, images, rows),
            context=features,
            prior_scores=prior,
        )
        rate = self.latent_kl(estimate, scores, prior_scores=prior) + self.outside()
        metrics = {
            "rate": rate.detach().mean(),
            "distortion": estimate.objective.mean(),
            "elbo": -(estimate.objective + rate.detach()).mean(),
            **estimate.metrics,
        }
        if not self.training or self._shows_bits:
            metrics["varying_bits"] = self._varying_bits(scores.detach(), estimate)

        def predictions() -> Predictions:
            greys = estimate.mean(self.decoder.mean(estimate.vertices))
            return Predictions(greys, images, estimate.most_probable_vertices())

        rows = estimate.rows
        calls = rows.new_zeros(len(images)).index_add(0, rows, torch.ones_like(rows))
        told = None if self.training else predictions
        return StepOutput((estimate.surrogate + rate).mean(), len(images), metrics, told, calls), scores, estimate

    def outside(self) -> Tensor | float:
        """Minus the logarithm of the prior probability of the structure's vertices among all bit
        vectors.
        """
        if self.prior is None:
            return self._outside
        return Subset().log_partition(self.prior) - self.structure.log_partition(self.prior)

    def log_prior(self, vertices: Tensor) -> Tensor:
        """``log p(z)`` of bit vectors ``[..., bits]``, among all of them: ``[...]``."""
        if self.prior is None:
            return vertices.new_full(vertices.shape[:-1], -self.bits * math.log(2))
        return Subset().log_prob(vertices, self.prior.expand(vertices.shape))

    def sample_prior(self, *shape: int) -> Tensor:
        """Bit vectors ``[*shape, bits]`` drawn from the prior."""
        if self.prior is None:
            return torch.rand(*shape, self.bits, device=self.device).lt(0.5).to(self.dtype)
        return Subset().sample(self.prior.detach().expand(*shape, -1))

    def _varying_bits(self, scores: Tensor, estimate: Estimate) -> Tensor:
        ones = estimate.mean(estimate.vertices.detach()) > 0.5 if estimate.exact else self.structure.argmax(scores) > 0
        return (ones.any(0) & ~ones.all(0)).float().mean()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step. At the end of an epoch of the data, also the quartiles of the decoder calls."""
        self._shows_bits = self.is_logged()
        out = self.training_output(batch)
        assert out.calls is not None
        self._calls.append(out.calls)
        if (batch_idx + 1) % (self.data.train // self.batch_size) == 0:
            # A resumed run only has the calls since it was resumed.
            calls = torch.cat(self._calls).float()
            quartiles = calls.quantile(calls.new_tensor([0.25, 0.5, 0.75])).tolist()
            names = ("lower_quartile", "median", "upper_quartile")
            for logger in self.loggers:
                logger.log_metrics(
                    {f"train/decoder_calls_{n}": q for n, q in zip(names, quartiles, strict=True)}, self.global_step
                )
            self._calls = []
        return out.loss

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Also compute ``bits_per_dim`` of the first images."""
        out, scores, estimate = self._step(batch)
        scored = batch["number"] < self.importance_images
        total = torch.zeros((), device=scores.device, dtype=torch.float64)
        if bool(scored.any()):
            log_p = self.log_likelihood(batch["images"], scores, estimate, self.importance_samples)
            total = -log_p[scored].double().sum() / (math.log(2) * batch["images"].shape[1])
        out.metrics["bits_per_dim"] = (total, scored.sum())
        self._accumulate(out)

    @torch.no_grad()
    def log_likelihood(self, images: Tensor, scores: Tensor, estimate: Estimate, samples: int) -> Tensor:
        """Estimate ``log p(x) = log sum_z p(z) p(x | z)``. The estimate of p(x) itself is unbiased.

        If ``estimate`` is a whole distribution, the sum over its support is exact. The rest of the
        sum is estimated from bit vectors of the prior, the same ones for all images, where those of
        the support count 0. Otherwise this is importance sampling from the Gibbs distribution of
        the scores (Burda et al. 2016), where equal samples of an image are decoded once. If the
        structure does not contain all bit vectors, that misses the others and is a lower bound.

        Args:
            images: uint8 ``[batch, pixels]``.
            scores: ``[batch, bits]``.
            estimate: the estimate for these scores.
            samples: number of samples an image, drawn and decoded in portions of bounded size.

        Returns:
            ``[batch]``, in nats.
        """
        batch = len(images)
        if not estimate.exact:
            drawn = self._posterior_samples(scores.detach(), samples)
            vertices, rows, ratios = (torch.cat(parts) for parts in zip(*drawn, strict=True))
            joint = ratios - self._losses_of(vertices, images, rows)
            return joint.reshape(samples, batch).logsumexp(0) - math.log(samples)
        vertices = self.sample_prior(samples).to(scores)
        outside = (-self.decoder.of_all_pairs(vertices, images)).where(~_contains(estimate, vertices), -math.inf)
        losses = self.decoder(estimate.vertices, images, estimate.rows)
        joint = self.log_prior(estimate.vertices).double() - losses.double()
        top = joint.new_full((batch,), -math.inf).scatter_reduce(0, estimate.rows, joint, "amax")
        shares = (joint - top[estimate.rows]).exp()
        inside = top + torch.zeros_like(top).index_add(0, estimate.rows, shares).log()
        return torch.logaddexp(outside.logsumexp(0) - math.log(samples), inside)

    def _posterior_samples(self, scores: Tensor, samples: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Portions of the samples: bit vectors ``[N, bits]``, their rows, and ``log p(z) - log q(z)``."""
        batch = len(scores)
        portion = max(1, _AT_ONCE // batch)
        for start in range(0, samples, portion):
            expanded = scores.expand(min(portion, samples - start), batch, self.bits)
            vertices = self.structure.sample(expanded)
            ratio = self.log_prior(vertices) - self.structure.log_prob(vertices, expanded)
            yield (
                vertices.flatten(0, 1),
                torch.arange(batch, device=scores.device).repeat(len(expanded)),
                ratio.flatten(),
            )

    def _losses_of(self, vertices: Tensor, images: Tensor, rows: Tensor) -> Tensor:
        """``-log p(images[rows] | vertices)``: ``[N]``, in float64. Each pair is decoded once, as a
        trained encoder is sure of most bits and draws the same ones again and again.
        """
        pairs, places = torch.cat([rows[:, None].int(), vertices.int()], 1).unique(dim=0, return_inverse=True)
        rows, bits = pairs[:, 0].long(), pairs[:, 1:].to(vertices)
        parts = [self.decoder(v, images, r) for v, r in zip(bits.split(_AT_ONCE), rows.split(_AT_ONCE), strict=True)]
        return torch.cat(parts).double()[places]

    @torch.no_grad()
    def generate(self, count: int) -> Tensor:
        """The mean grey levels, 0 to 255, of bit vectors drawn from the prior: ``[count, pixels]``."""
        return self.decoder.mean(self.sample_prior(count))

    def pictures(self, folder: Path) -> list[Path]:
        """A few test images, if they are square, and their reconstructions.

        A reconstruction is the mean grey levels under the latent distribution. A second picture has
        the mean grey levels of bit vectors drawn from the prior.
        """
        channels = 3 if self.data.colour == "channels" else 1
        if self.pixels % channels or not is_square(self.pixels // channels):
            return []
        assert self.estimator is not None
        images = self.data.split("test")[:10].to(self.device)
        scores, features = self.encoder(images)
        estimate = self.estimator(scores, lambda vertices, rows: self.decoder(vertices, images, rows), context=features)
        means = estimate.mean(self.decoder.mean(estimate.vertices))
        samples = self.generate(30).reshape(3, 10, -1, channels) / 255
        return [
            draw_reconstructions(images, means, channels, folder / "reconstructions.png"),
            draw_samples(samples, folder / "samples.png"),
        ]


def _contains(estimate: Estimate, vertices: Tensor) -> Tensor:
    """Whether ``vertices`` ``[samples, bits]`` are in the support of each row: bool ``[samples, batch]``."""
    support, rows = estimate.vertices, estimate.rows
    same = (vertices[:, None] == support).all(-1)
    counts = torch.zeros(len(vertices), estimate.objective.shape[0], dtype=torch.int64, device=rows.device)
    return counts.index_add(1, rows, same.long()) > 0
