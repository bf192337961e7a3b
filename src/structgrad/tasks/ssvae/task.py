"""The semi-supervised VAE: digits and styles from few labels (Correia et al. 2020, section 5.1)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from structgrad.common.ranges import check_choice, check_count, check_range
from structgrad.data import Batch, Batches
from structgrad.data.images import is_square
from structgrad.estimators.base import Estimator
from structgrad.structures.base import Structure
from structgrad.tasks.base import OptimizerFactory, Predictions, Prior, Split, StepOutput
from structgrad.tasks.history import CallsOverTime
from structgrad.tasks.pictures import draw_history, draw_samples
from structgrad.tasks.ssvae.data import SemiSupervisedImages, resample
from structgrad.tasks.ssvae.model import CLASSIFICATION_LOSSES, Networks
from structgrad.tasks.ssvae.pictures import draw_digits
from structgrad.tasks.ssvae.warm_start import WarmStart


class SemiSupervisedVAE(CallsOverTime):
    """Model images by a class z, known for few images, and a continuous style h (Kingma et al.
    2014).

    The objective of a class is ``-log p(x | z, h) + KL(q(h | x, z) || p(h))`` at one sample of h.
    The estimator's ``kl`` must be that of z from its prior: the uniform distribution, or one with
    learnt scores. Training minimises two terms. The first is the labelled images' loss at their
    true class, with the classifier's own loss. The second is ``weight`` times the unlabelled
    images' negative ELBO. Training starts from networks trained on the labelled images alone.
    Metrics are means over images, in nats:

    - ``elbo`` = -(objective + kl), with the class inferred; in training, of the unlabelled images;
    - ``accuracy`` of the class with the highest score;
    - ``decoder_calls``, evaluations an image; ``training_calls`` are those in training since the
      last validation.

    Args:
        structure: OneHot.
        estimator: its ``kl`` must be over the vertex, the class.
        optimizer: see :class:`~structgrad.tasks.base.Task`.
        data: the images.
        warm_start: the stage before training, which makes the first parameters.
        prior: the prior of the class. If ``learnt``, its scores are parameters, 0 at first. The
            labelled images' loss then has ``-log p(z)``, a constant that the uniform prior omits.
        classification_loss: ``cross_entropy``, or ``sparsemax`` if the estimator's distribution is
            sparsemax.
        weight: weight of the unlabelled images' loss; None is their number divided by that of the
            labelled images.
        pixels: number of pixels of an image; None counts them, for which the images are decoded.
        classes: K, the number of classes; None counts them likewise.
        style: size of h.
        hidden: number of units of the classifier's layers.
        vae_hidden: number of units of the encoder's and the decoder's layers.
        batch_size: number of labelled images, and of unlabelled ones, in a training batch.
        eval_batch_size: number of images in a validation or test batch.
        seed: seed of the order of training images.

    Raises:
        ValueError: for another structure, an estimator without that ``kl``, an unknown loss, or a
            size out of range; from :meth:`prepare_data`, for images of another size or of more
            classes.
    """

    monitor: ClassVar[str] = "val/elbo"
    mode: ClassVar[Literal["min", "max"]] = "max"
    test_metrics: ClassVar[tuple[str, ...]] = ("elbo", "accuracy", "training_calls")
    needs_full_precision = "its sparse distributions are those of float32 scores"
    progress: ClassVar[tuple[str, ...]] = ("elbo", "accuracy")

    def __init__(
        self,
        *,
        structure: Structure,
        estimator: Estimator | None,
        optimizer: OptimizerFactory,
        data: SemiSupervisedImages,
        warm_start: WarmStart,
        prior: Prior = "uniform",
        classification_loss: str = "cross_entropy",
        weight: float | None = None,
        pixels: int | None = 784,
        classes: int | None = 10,
        style: int = 8,
        hidden: int = 256,
        vae_hidden: int = 128,
        batch_size: int = 64,
        eval_batch_size: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__(structure=structure, estimator=estimator, optimizer=optimizer)
        if not structure.is_categorical or estimator is None:
            raise ValueError(f"ssvae needs one class an image, structure=one_hot; got {structure.name}")
        if estimator.kl_over != "vertex":
            raise ValueError(
                "ssvae needs the KL divergence of the class from the uniform distribution; that of "
                f"{type(estimator).__name__} is over {estimator.kl_over or 'nothing'} "
                "(estimator.kl=distribution, where an estimator has that option)"
            )
        check_choice("prior", prior, get_args(Prior))
        check_choice("classification_loss", classification_loss, CLASSIFICATION_LOSSES)
        pixels = data.pixels if pixels is None else pixels
        classes = data.classes if classes is None else classes
        self.sizes = {
            "pixels": pixels,
            "classes": classes,
            "style": style,
            "hidden": hidden,
            "vae_hidden": vae_hidden,
        }
        for name, size in {**self.sizes, "eval_batch_size": eval_batch_size}.items():
            check_count(name, size)
        # Shares are numbers once the images are read.
        labelled = data.labelled if isinstance(data.labelled, int) else None
        check_count("batch_size", batch_size, most=data.unlabelled)
        if warm_start.epochs:
            check_range("warm_start.batch_size", warm_start.batch_size, most=labelled)
        if weight is not None and not 0 <= weight < math.inf:
            raise ValueError(f"weight must be finite and not negative; got {weight}")
        self.data, self.warm_start, self.seed = data, warm_start, seed
        self.classification_loss = classification_loss
        if weight is None and labelled is not None and data.unlabelled is not None:
            weight = data.unlabelled / labelled
        self.weight = weight
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.networks = Networks(**self.sizes)
        self.prior = torch.nn.Parameter(torch.zeros(classes)) if prior == "learnt" else None

    # --- data -------------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Decode the images and train the warm start, unless they are cached."""
        self.source.prepare()
        for split in ("labelled", "val", "test"):
            images, labels = self.source.split(split).values()
            if images.shape[1] != self.sizes["pixels"]:
                raise ValueError(
                    f"pixels={self.sizes['pixels']}, but the images of {self.source.source} have {images.shape[1]}; "
                    "null counts them"
                )
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.sizes["classes"]:
                raise ValueError(
                    f"classes={self.sizes['classes']}, but the labels of {self.source.source} go from {low} to {high}; "
                    "null counts them"
                )
        if self.warm_start.epochs and self.evaluation is None:
            self._warm_start()

    def _warm_start(self) -> Path:
        labelled, validation = self.data.split("labelled"), self.data.split("val")
        return self.warm_start.prepare(self.sizes, self.classification_loss, labelled, validation, str(self.data.cache))

    def setup(self, stage: str) -> None:
        """Load the warm start, which a resumed checkpoint overwrites, and count the images of shares."""
        if self.weight is None:
            sizes = (len(self.data.split(part)["images"]) for part in ("unlabelled", "labelled"))
            self.weight = next(sizes) / next(sizes)
        if stage == "fit" and self.warm_start.epochs:
            self.warm_start.load(self._warm_start(), self.networks)

    def batches(self, split: Split) -> Batches:
        """``images`` and, for validation and test, ``labels``; in training, labelled images beside
        unlabelled ones.
        """
        if split != "train":
            return Batches(self.source.split(split), self.eval_batch_size)
        labelled = self.data.split("labelled")
        return Batches(
            {"images": self.data.split("unlabelled")["images"]},
            self.batch_size,
            shuffle=True,
            seed=self.seed,
            beside={"labelled": labelled["images"], "labels": labelled["labels"]},
        )

    # --- steps ------------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> StepOutput:
        """Negative ELBO of the images, and in training the loss of the labelled ones."""
        assert self.estimator is not None
        networks, labels = self.networks, batch["labels"]
        labelled = len(labels) if self.training else 0
        # The labelled images come first, so that all go through the first layers together.
        chosen = torch.cat([batch["labelled"], batch["images"]]) if self.training else batch["images"]
        images = resample(chosen).to(self.dtype)
        features = networks.encoder.image(images)
        known, scores = networks.classifier(images).split([labelled, len(images) - labelled])
        supervised: list[Tensor] = []

        def objective(vertices: Tensor, rows: Tensor) -> Tensor:
            rows = rows + labelled
            if supervised or not self.training:
                return networks.negative_elbo(images, features, vertices, rows)
            # The labelled images are included, each at its class, which gives fewer and larger
            # products.
            vertices = torch.cat([F.one_hot(labels, scores.shape[-1]).to(vertices), vertices])
            rows = torch.cat([torch.arange(labelled, device=rows.device), rows])
            both = networks.negative_elbo(images, features, vertices, rows)
            first, losses = torch.split(both, [labelled, len(rows) - labelled])
            supervised.append(first)
            return losses

        estimate = self.estimator(scores, objective, context=images[labelled:], prior_scores=self.prior)
        kl = self.latent_kl(estimate, scores, prior_scores=self.prior)
        negative_elbo = (estimate.surrogate + kl).mean()
        metrics = {"elbo": -(estimate.objective + kl.detach()).mean(), **estimate.metrics}
        if not self.training:
            metrics["accuracy"] = (scores.argmax(-1) == labels).float().mean()

            def predictions() -> Predictions:
                return Predictions(scores.argmax(-1), labels, estimate.most_probable_vertices())

            return StepOutput(negative_elbo, len(images), metrics, predictions)
        (loss,) = supervised
        loss = loss + CLASSIFICATION_LOSSES[self.classification_loss](known, labels)
        if self.prior is not None:
            loss = loss - self.prior.log_softmax(-1)[labels]
        assert self.weight is not None, "set before training"
        loss = torch.add(loss.mean(), negative_elbo, alpha=self.weight)
        return StepOutput(loss, len(batch["images"]), metrics)

    # --- pictures ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, count: int) -> tuple[Tensor, Tensor]:
        """Classes and styles drawn from their priors: int64 ``[count]``, and the decoder's
        probabilities of ink.

        The latter are ``[count, pixels]``.
        """
        prior = torch.zeros(self.sizes["classes"], device=self.device) if self.prior is None else self.prior
        vertices = self.structure.sample(prior.expand(count, -1))
        styles = torch.randn(count, self.sizes["style"], device=self.device)
        return vertices.argmax(-1), self.networks.decoder(styles, vertices).sigmoid()

    @torch.no_grad()
    def pictures(self, folder: Path) -> list[Path]:
        """Digits by class and style, and digits from the priors, if images are square; decoder
        calls over training.
        """
        styles = torch.randn(10, self.sizes["style"], device=self.device)
        classes = torch.eye(self.sizes["classes"], device=self.device)
        grid = [self.networks.decoder(styles, label.expand(len(styles), -1)).sigmoid() for label in classes]
        drawn = []
        if is_square(self.sizes["pixels"]):
            drawn.append(draw_digits(torch.stack(grid), folder / "digits.png"))
            drawn.append(draw_samples(self.generate(30)[1].reshape(3, 10, -1, 1), folder / "samples.png"))
        if self.history:
            titles = {"training_calls": "decoder calls an image"}
            drawn.append(draw_history(self.history, titles, folder / "decoder_calls.png"))
        return drawn
