"""The communication game: one symbol says which image is meant (Correia et al. 2020, section 5.2)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from structgrad.common.ranges import check_choice
from structgrad.data import Batch, Batches
from structgrad.estimators.base import Estimator
from structgrad.structures.base import Structure
from structgrad.tasks.base import OptimizerFactory, Predictions, Split, StepOutput
from structgrad.tasks.communication_game.data import SPLITS, ConceptData, draw_games
from structgrad.tasks.communication_game.model import Receiver, Sender, SymbolMap
from structgrad.tasks.communication_game.pictures import draw_symbols
from structgrad.tasks.history import CallsOverTime
from structgrad.tasks.pictures import draw_history

Loss = Literal["nll", "zero_one"]


class CommunicationGame(CallsOverTime):
    """A sender sees an image and sends one symbol; a receiver picks the image out of several.

    The objective of a symbol z is ``-log p(y | V, z)`` (``nll``) or ``1 - p(y | V, z)``
    (``zero_one``). The second is the expected 0/1 loss of a receiver that draws its choice.
    Training adds ``entropy_bonus`` times the estimator's ``kl`` of the symbol from the uniform
    distribution. Up to a constant, this is minus the entropy. Training games are drawn on the
    device of the features. Validation and test games are drawn once and are the same for all runs.
    Metrics:

    - ``success``: the receiver's best candidate is the right one, for the vertices that the
      estimator evaluates. They are a sampled symbol, a relaxed message (see the estimator's
      ``evaluation``), or all symbols, weighted by their probabilities;
    - ``success_most_likely``: the same for the sender's most likely symbol;
    - ``objective``, under the estimator's distribution; ``entropy`` of the symbol, in nats;
    - ``decoder_calls``, symbols evaluated a game; ``training_calls``, those in training since the
      last validation.

    Args:
        structure: OneHot.
        estimator: its ``kl`` must be over the vertex, the symbol.
        optimizer: see :class:`~structgrad.tasks.base.Task`.
        data: images with features and concepts.
        symbols: number of symbols in the vocabulary.
        candidates: number of images in a game, all of different concepts.
        embedding: size of the embeddings of images and symbols.
        hidden: number of units of the sender's network for each value.
        temperature: divides the sender's scores.
        symbol_map: how the receiver's symbols are initialised, see
            :class:`~structgrad.tasks.communication_game.model.Receiver`.
        loss: see above.
        entropy_bonus: see above.
        batch_size: number of games in a training batch.
        eval_batch_size: number of games in a validation or test batch.
        eval_games: number of validation games.
        test_games: number of test games.

    Raises:
        ValueError: for another structure, an estimator without that ``kl``, or options out of
            range; from :meth:`setup`, if the data have other features or too few concepts.
    """

    monitor: ClassVar[str] = "val/success"
    mode: ClassVar[Literal["min", "max"]] = "max"
    test_metrics: ClassVar[tuple[str, ...]] = (
        "success",
        "success_most_likely",
        "entropy",
        "objective",
        "training_calls",
    )
    needs_full_precision = "its sparse distributions are those of float32 scores"
    progress: ClassVar[tuple[str, ...]] = ("success", "objective")

    def __init__(
        self,
        *,
        structure: Structure,
        estimator: Estimator | None,
        optimizer: OptimizerFactory,
        data: ConceptData,
        symbols: int = 256,
        candidates: int = 16,
        embedding: int = 256,
        hidden: int = 512,
        temperature: float = 10.0,
        symbol_map: SymbolMap = "embedding",
        loss: Loss = "nll",
        entropy_bonus: float = 0.1,
        batch_size: int = 64,
        eval_batch_size: int = 64,
        eval_games: int = 1024,
        test_games: int = 9984,
    ) -> None:
        super().__init__(structure=structure, estimator=estimator, optimizer=optimizer)
        if not structure.is_categorical or estimator is None:
            raise ValueError(f"communication_game sends one symbol, structure=one_hot; got {structure.name}")
        if estimator.kl_over != "vertex":
            raise ValueError(
                "communication_game needs the KL divergence of the symbol from the uniform distribution; that of "
                f"{type(estimator).__name__} is over {estimator.kl_over or 'nothing'} "
                "(estimator.kl=distribution, where an estimator has that option)"
            )
        check_choice("loss", loss, get_args(Loss))
        sizes = {"features": data.features, "symbols": symbols, "embedding": embedding, "hidden": hidden}
        sizes |= {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "eval_games": eval_games}
        sizes["test_games"] = test_games
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1; got {size}")
        if candidates < 2:
            raise ValueError(f"a game needs at least 2 candidates; got {candidates}")
        if not (0 < temperature < math.inf and 0 <= entropy_bonus < math.inf):
            raise ValueError(
                f"temperature must be positive and entropy_bonus not negative; got {temperature} and {entropy_bonus}"
            )
        self.data, self.candidates = data, candidates
        self.loss, self.entropy_bonus = loss, entropy_bonus
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.games = {"val": eval_games, "test": test_games}
        self.sender = Sender(data.features, embedding, hidden, symbols, temperature)
        self.receiver = Receiver(data.features, embedding, symbols, symbol_map)

    # --- data -------------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Raise an error if data are missing."""
        self.source.prepare()

    def setup(self, stage: str) -> None:
        """Load the features. They move with the model but are not part of it."""
        if hasattr(self, "train_features"):
            return
        for split in SPLITS:
            concepts = self.source.split(split)
            sizes = concepts.concept.bincount(minlength=len(concepts.names))
            size, number = concepts.features.shape[1], int((sizes > 0).sum())
            if size != self.data.features:
                raise ValueError(f"the images have {size} features; data.features={self.data.features} must be that")
            if number < self.candidates:
                raise ValueError(f"{number} concepts in {split} are too few for games of {self.candidates} candidates")
            self.register_buffer(f"{split}_features", concepts.features, persistent=False)
            self.register_buffer(f"{split}_sizes", sizes[sizes > 0], persistent=False)

    def batches(self, split: Split) -> Batches:
        """Images (under the name of the split) and target. Training games are drawn in
        :meth:`step`.
        """
        self.setup("fit")  # data are requested before there is a trainer, to refuse what does not fit
        if split == "train":
            # Candidates are in random order, so any place of the target is as good as another.
            none = torch.zeros(self.batch_size, dtype=torch.int64)
            return Batches({"train": none, "target": none}, self.batch_size)
        generator = torch.Generator().manual_seed({"val": 20200724, "test": 20200725}[split])
        games = self.games[split]
        images = draw_games(self.get_buffer(f"{split}_sizes").cpu(), games, self.candidates, generator)
        target = torch.randint(self.candidates, (games,), generator=generator)
        return Batches({split: images, "target": target}, self.eval_batch_size)

    # --- steps ------------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> StepOutput:
        """The expected objective and the entropy bonus."""
        assert self.estimator is not None
        split = next(name for name in SPLITS if name in batch)
        images, target = batch[split], batch["target"]
        if split == "train":
            images = draw_games(self.get_buffer("train_sizes"), len(images), self.candidates)
        seen = F.embedding(images, self.get_buffer(f"{split}_features"))  # three times as fast as an index
        games = torch.arange(len(images), device=images.device)
        meant = seen[games, target]
        scores, candidates = self.sender(meant), self.receiver.embed(seen)
        estimate = self.estimator(
            scores,
            lambda vertices, rows: self._losses(vertices, rows, candidates, target),
            context=meant,
            kl_weight=self.entropy_bonus,
        )
        kl = self.latent_kl(estimate, scores)
        loss = (estimate.surrogate + self.entropy_bonus * kl).mean()
        metrics = {
            "objective": estimate.objective.mean(),
            "entropy": math.log(scores.shape[-1]) - kl.detach().mean(),
            **estimate.metrics,
        }
        with torch.no_grad():
            right = self._right(estimate.vertices, estimate.rows, candidates, target)
            metrics["success"] = estimate.mean(right).mean()
            if not self.training:
                most_likely = self.structure.argmax(scores.detach())
                metrics["success_most_likely"] = self._right(most_likely, games, candidates, target).mean()

        def predictions() -> Predictions:
            symbols = estimate.most_probable_vertices()
            return Predictions(self.receiver(symbols, games, candidates).argmax(-1), target, symbols)

        return StepOutput(loss, len(images), metrics, None if self.training else predictions)

    def _right(self, vertices: Tensor, rows: Tensor, candidates: Tensor, target: Tensor) -> Tensor:
        """Whether the receiver's best candidate is the right one: 0 or 1, ``[N]``."""
        choice: Tensor = self.receiver(vertices, rows, candidates).argmax(-1)
        return (choice == target[rows]).float()

    def _losses(self, vertices: Tensor, rows: Tensor, candidates: Tensor, target: Tensor) -> Tensor:
        log_p = self.receiver(vertices, rows, candidates).log_softmax(-1)
        right = log_p.gather(1, target[rows][:, None])[:, 0]
        return -right if self.loss == "nll" else -torch.expm1(right)

    # --- pictures ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def pictures(self, folder: Path) -> list[Path]:
        """The most used symbols with the test images that they name; success and decoder calls over
        training.
        """
        concepts = self.data.split("test")
        # In portions, because on a GPU the sender keeps its hidden units for all values of all
        # images in memory.
        parts = concepts.features.split(self.eval_batch_size)
        used = torch.cat([self.sender(part.to(self.device)).argmax(-1).cpu() for part in parts])
        drawn = [draw_symbols(used, concepts, self.data.pixels("test"), folder / "symbols.png")]
        if self.history:
            titles = {"success": "success", "training_calls": "decoder calls a game"}
            drawn.append(draw_history(self.history, titles, folder / "history.png"))
        return drawn
