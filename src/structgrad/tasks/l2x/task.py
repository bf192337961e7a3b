"""Learning to explain: a rating from k words of a review (Paulus et al. 2020, section 8.3 and D.6)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LinearLR, LRScheduler

from structgrad.common.ranges import check_choice, check_count
from structgrad.data import Batch, Batches, DataError
from structgrad.estimators.base import Estimate, Estimator
from structgrad.structures.base import Structure
from structgrad.tasks.base import OptimizerFactory, Predictions, Split, StepOutput, Task
from structgrad.tasks.l2x.data import PAD, ReviewData
from structgrad.tasks.l2x.model import Decoder, EncoderName, WordEncoder, make_encoder
from structgrad.tasks.l2x.pictures import Explanation, draw, save, write_page
from structgrad.tasks.schedules import Schedule

#: The number of test reviews drawn after the test.
_DRAWN = 8


class L2X(Task):
    """Predict the rating of a review from some of its words, k of them in the paper.

    The encoder scores all words (and pairs of neighbours, if the structure has them). The decoder
    sees the embeddings of the chosen words in their places, and zeros elsewhere. As in the paper,
    the objective is the squared error of the rating and nothing else. With ``choose_padding`` any
    places may be chosen, as in the paper. Otherwise padding may be chosen only if a review has too
    few words for the structure to have a vertex (k for a k-subset).

    Metrics, means over reviews:

    - ``mse``, of reviews with a rating;
    - ``precision``, of reviews whose deciding words are known: the fraction of these words among
      the chosen words, without padding. It is 0 if none is chosen. In training it is that of the
      relaxed words;
    - ``words``, the number of chosen words that are not padding.

    Encoder and decoder share the embedding. It is made when the vocabulary is known, that is after
    the data.

    Args:
        structure: any structure over a vector of words, such as
            :class:`~structgrad.structures.KSubset`, or
            :class:`~structgrad.structures.CorrelatedKSubset`, whose pairs the decoder does not see.
        estimator: over that structure.
        optimizer: a function from parameters to an optimizer.
        data: the reviews.
        encoder: see :func:`~structgrad.tasks.l2x.model.make_encoder`.
        embedding_size: size of an embedding; it must be that of pretrained vectors if the data
            bring them.
        filters: number of filters of the convolutions.
        hidden: number of units of the decoder.
        dropout: dropout probability.
        batch_size: number of reviews in a training batch.
        eval_batch_size: number of reviews in a validation or test batch.
        eval_samples: number of subsets of a review in validation and test; metrics are means over
            them, but ``decoder_calls`` counts those of one. The paper has one. With few reviews,
            more of them take away noise of the estimator.
        choose_padding: whether padding may be chosen although words are left.
        decay_factor: the learning rate falls linearly to this fraction of its initial value ...
        decay_share: ... over this fraction of the training steps, and then stays constant.
        seed: seed of the order of training reviews.

    Raises:
        TypeError: if eval_samples is not a whole number.
        ValueError: for another structure, or an option out of range.
    """

    monitor: ClassVar[str] = "val/mse"
    mode: ClassVar[Literal["min", "max"]] = "min"
    test_metrics: ClassVar[tuple[str, ...]] = ("mse", "precision", "words")
    progress: ClassVar[tuple[str, ...]] = ("mse", "precision")

    def __init__(
        self,
        *,
        structure: Structure,
        estimator: Estimator | None,
        optimizer: OptimizerFactory,
        data: ReviewData,
        encoder: EncoderName = "simple",
        embedding_size: int = 200,
        filters: int = 100,
        hidden: int = 100,
        dropout: float = 0.1,
        batch_size: int = 100,
        eval_batch_size: int = 200,
        eval_samples: int = 1,
        choose_padding: bool = True,
        decay_factor: float = 0.1,
        decay_share: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(structure=structure, estimator=estimator, optimizer=optimizer)
        if estimator is None or structure.layout.ndim != 1 or not structure.is_linear:
            raise ValueError(f"l2x needs a latent structure over a vector, of words; got {structure!r}")
        self.check_structure(_shape(structure, data.words), f"{data.words} words")
        check_choice("encoder", encoder, get_args(EncoderName))
        if min(embedding_size, filters, hidden) < 1:
            raise ValueError("embedding_size, filters and hidden must be at least 1")
        if not (0 < decay_factor <= 1 and 0 < decay_share <= 1):
            raise ValueError(f"decay_factor and decay_share lie in (0, 1]; got {decay_factor} and {decay_share}")
        self.data, self.encoder_name, self.seed = data, encoder, seed
        check_count("eval_samples", eval_samples)
        self.batch_size, self.eval_batch_size, self.eval_samples = batch_size, eval_batch_size, eval_samples
        self.embedding_size, self.filters, self.dropout = embedding_size, filters, dropout
        self.choose_padding, self.least = choose_padding, _least(structure)
        self.decay_factor, self.decay_share = decay_factor, decay_share
        self.embedding: nn.Embedding | None = None
        self.encoder: WordEncoder | None = None
        self.decoder = Decoder(embedding_size, filters, hidden, dropout)

    # --- data -----------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """See :meth:`ReviewData.prepare`. An evaluation needs it too, because the words are those
        of the training.

        Raises:
            DataError: if pretrained vectors have another size than the embedding.
        """
        self.data.prepare()
        vectors = self.data.vocabulary.vectors
        if vectors is not None and vectors.shape[1] != self.embedding_size:
            size = vectors.shape[1]
            raise DataError(f"the pretrained vectors have {size} numbers; set task.embedding_size={size}")

    def batches(self, split: Split) -> Batches:
        """The tensors of :class:`~structgrad.tasks.l2x.data.Reviews`."""
        own = self.source is self.data
        reviews = self.data.split(split) if own else self.source.in_words_of(self.data.vocabulary, split)
        return Batches(
            reviews.tensors,
            self.batch_size if split == "train" else self.eval_batch_size,
            shuffle=split == "train",
            seed=self.seed,
        )

    def configure_model(self) -> None:
        """Make the modules that depend on the vocabulary: the embedding and the encoder."""
        if self.embedding is not None:
            return
        vocabulary = self.data.vocabulary
        words = len(vocabulary.words)
        if vocabulary.vectors is None:
            self.embedding = nn.Embedding(words, self.embedding_size, padding_idx=PAD)
        else:
            vectors = torch.from_numpy(vocabulary.vectors)
            self.embedding = nn.Embedding.from_pretrained(vectors, freeze=False, padding_idx=PAD)
        self.encoder = make_encoder(
            self.encoder_name,
            size=self.embedding_size,
            pairs=self.structure.has_neighbour_pairs,
            dropout=self.dropout,
            filters=self.filters,
            train=self.data.split("train"),
            val=self.data.split("val"),
            words=words,
        )

    def follow(self, schedule: Schedule) -> None:
        """Follow a schedule in the place of the linear decay, which must be switched off.

        Raises:
            ValueError: unless ``decay_factor`` is 1.
        """
        if self.decay_factor != 1:
            raise ValueError(
                f"decay_factor={self.decay_factor} is a schedule of the task's own; task.decay_factor=1 turns it off"
            )
        self.schedule = schedule

    def learning_rates(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """Linear decay."""
        steps = max(1, round(self.decay_share * self.trainer.max_steps))
        return LinearLR(optimizer, start_factor=1.0, end_factor=self.decay_factor, total_iters=steps)

    # --- step -----------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> StepOutput:
        """The squared error, and how well the deciding words were found."""
        estimate, predicted = self._estimate(batch)
        objective, precision, words = self._measured(batch, estimate)
        if not self.training and self.eval_samples > 1:
            more = [self._measured(batch, self._estimate(batch)[0]) for _ in range(self.eval_samples - 1)]
            samples = zip((objective, precision, words), *more, strict=True)
            objective, precision, words = (torch.stack(each).mean(0) for each in samples)
        rated, annotated = batch["ratings"].isfinite(), batch["annotated"]
        metrics: dict[str, Tensor | tuple[Tensor, Tensor]] = {
            "mse": (objective.sum(), rated.sum()),
            "precision": ((precision * annotated).sum(), annotated.sum()),
            "words": (words.sum(), torch.ones_like(annotated).sum()),
            **estimate.metrics,
        }
        if self.training:
            return StepOutput(estimate.surrogate.mean(), len(rated), metrics)
        # The annotated reviews of a test set may have no rating.
        count = int(rated.sum())
        return StepOutput(
            objective.sum() / max(1, count), count, metrics, lambda: self._predictions(batch, estimate, predicted)
        )

    def _measured(self, batch: Batch, estimate: Estimate) -> tuple[Tensor, Tensor, Tensor]:
        """Squared error, precision and number of the chosen words of each review, all ``[batch]``."""
        chosen = estimate.vertices[:, : batch["tokens"].shape[1]].detach()
        precision, words = word_metrics(chosen, batch["tokens"][estimate.rows], batch["relevant"][estimate.rows])
        return estimate.objective, estimate.mean(precision), estimate.mean(words)

    def _predictions(self, batch: Batch, estimate: Estimate, predicted: Tensor) -> Predictions:
        best, words = estimate.most_probable(), self.data.vocabulary.words
        texts = [" ".join(words[token] for token in row if token != PAD) for row in batch["tokens"].tolist()]
        return Predictions(predicted[best], batch["ratings"], estimate.vertices[best], texts)

    def _estimate(self, batch: Batch) -> tuple[Estimate, Tensor]:
        """The estimate of a batch, and the predicted ratings ``[N]`` of its vertices, detached."""
        assert self.estimator is not None
        assert self.embedding is not None
        assert self.encoder is not None
        tokens, ratings = batch["tokens"], batch["ratings"]
        embedded = self.embedding(tokens)
        shape = embedded.shape[1:]
        predicted: list[Tensor] = []

        def objective(vertices: Tensor, rows: Tensor) -> Tensor:
            # With as many vertices as reviews there is one each, in order. Otherwise use a lookup,
            # whose gradient is deterministic.
            each = embedded if len(rows) == len(tokens) else F.embedding(rows, embedded.flatten(1)).view(-1, *shape)
            rating = self.decoder(each, vertices[:, : tokens.shape[1]])
            predicted.append(rating.detach())
            truth = ratings[rows]
            losses: Tensor = (rating - torch.where(truth.isfinite(), truth, rating.detach())).square()
            return losses

        scores = self.encoder(tokens, embedded)
        mask = None if self.choose_padding else self._exist(tokens)
        estimate: Estimate = self.estimator(scores, objective, mask=mask, context=embedded.mean(1), kl_weight=0.0)
        (ratings_seen,) = predicted
        return estimate, ratings_seen

    def _exist(self, tokens: Tensor) -> Tensor:
        """The parts that may be chosen: words, and as many places of padding as a vertex needs
        beyond them.
        """
        places = torch.arange(tokens.shape[1], device=tokens.device)
        words = places < (tokens != PAD).sum(1, keepdim=True).clamp_min(self.least)
        if self.structure.has_neighbour_pairs:  # a pair exists if its words do
            return F.pad(words, (0, tokens.shape[1] - 1), value=True)
        return words

    # --- pictures -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def pictures(self, folder: Path) -> list[Path]:
        """A few annotated test reviews with the chosen words: as a page, a picture, and data for comparisons."""
        self.eval()
        test = self.data.split("test")
        first = test.annotated.nonzero().squeeze(1)[:_DRAWN]
        batch = {name: tensor[first].to(self.device) for name, tensor in test.tensors.items()}
        estimate, predicted = self._estimate(batch)
        texts = self.data.words_of(first.tolist())
        explanations = []
        for i, (row, best) in enumerate(zip(first.tolist(), estimate.most_probable().tolist(), strict=True)):
            length = len(texts[i])
            rating = float(test.ratings[row])
            explanations.append(
                Explanation(
                    words=texts[i],
                    relevant=test.relevant[row, :length].tolist(),
                    chosen=(estimate.vertices[best, :length] > 0).tolist(),
                    rating=rating if rating == rating else None,
                    prediction=float(predicted[best]),
                )
            )
        k = getattr(self.structure, "k", None)
        columns = {self.structure.name if k is None else f"{self.structure.name}, k = {k}": explanations}
        save(explanations, folder / "reviews.json")
        return [draw(columns, folder / "reviews.png"), write_page(columns, self.data.title, folder / "reviews.html")]


def _shape(structure: Structure, words: int) -> tuple[int]:
    """The shape of the parts for a number of words."""
    return (2 * words - 1 if structure.has_neighbour_pairs else words,)


def _least(structure: Structure) -> int:
    """The smallest number of words for which the structure has a vertex."""
    n = 1
    while True:
        try:
            structure.argmax(torch.zeros(1, *_shape(structure, n)))
        except ValueError:
            n += 1
        else:
            return n


def word_metrics(chosen: Tensor, tokens: Tensor, relevant: Tensor) -> tuple[Tensor, Tensor]:
    """Precision of the chosen words, and their number, without padding.

    Args:
        chosen: ``[N, n]``, hard or relaxed.
        tokens: int ``[N, n]``.
        relevant: bool ``[N, n]``.

    Returns:
        the fraction of relevant words among the chosen, with a denominator of at least 1: ``[N]``;
        and their number: ``[N]``.
    """
    words = chosen * (tokens != PAD)
    count = words.sum(1)
    return (words * relevant).sum(1) / count.clamp_min(1), count
