"""Generation of balanced parentheses in fixed and in learnt orders (Struminsky et al. 2021, section 5.4)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from structgrad.data import Batch, Batches
from structgrad.estimators.base import Estimate, Estimator, PerturbAndMap
from structgrad.estimators.utilities import Gumbel
from structgrad.structures.base import Structure
from structgrad.tasks.base import OptimizerFactory, Predictions, Split, StepOutput, Task
from structgrad.tasks.parentheses import trees
from structgrad.tasks.parentheses.data import PAD, ParenthesesData, keys_of, to_text
from structgrad.tasks.parentheses.model import TokenEncoder, TreeDecoder
from structgrad.tasks.parentheses.pictures import Growth, draw

#: The number of generated trees drawn after the test, the number to choose from, and their largest
#: number of tokens.
_DRAWN, _DRAWN_OF, _DRAWN_LENGTH = 4, 256, 14


@dataclass
class Generation:
    """The amount of generation after the test.

    Args:
        unique: wanted number of distinct sequences.
        limit: largest number of sequences drawn; those found by then are judged.
        length: number of tokens at which a tree is cut off (at ``2 length + 1`` places); it then
            counts as unbalanced.
        batch_size: number of sequences that grow together.

    Raises:
        ValueError: unless all are positive and the limit is at least ``unique``.
    """

    unique: int = 200_000
    limit: int = 2_000_000
    length: int = 40
    batch_size: int = 2048

    def __post_init__(self) -> None:
        """Check the numbers."""
        if min(self.unique, self.length, self.batch_size) < 1 or self.limit < self.unique:
            raise ValueError(
                "generation.unique, length, batch_size must be positive and limit at least unique; got "
                f"{self.unique}, {self.length}, {self.batch_size}, {self.limit}"
            )


class Parentheses(Task):
    """A language model over balanced brackets that generates each sequence together with a binary
    tree over it.

    The structure decides where the trees of the training sequences come from:

    - ``NoStructure``: left to right, every token has a right child only;
    - ``GroundTruth``: the smart tree (see :func:`~structgrad.tasks.parentheses.trees.smart`);
    - ``BinaryTree``: a fraction of the training sequences comes with the smart tree. For the others
      T is latent: an encoder scores their tokens, and ``E_q[log q(T | x) - log p(x, T)]`` replaces
      ``-log p(x, T)``. The model p generates the tree as well, so it includes the trees' prior.
      From a given tree, the encoder learns by ``-log q(T | x)`` (Kingma et al. 2014, equation 9).

    Metrics:

    - ``nll``, in nats a token, of the sequence with its tree (for the latent tree the bound, with
      one sampled tree), and ``perplexity``, its exponential;
    - for the latent tree also its ``entropy`` a token, and ``smart_parents``, the fraction of
      tokens whose parent is that of the smart tree;
    - at test, of ``unique`` generated sequences out of ``drawn``, the fractions ``old`` (in the
      training set), ``new_balanced`` and ``unbalanced``.

    Args:
        structure: ``BinaryTree``, or one of the two stand-ins.
        estimator: over that structure; None for the stand-ins.
        optimizer: a function from parameters to an optimizer.
        data: the sequences.
        generation: the amount of generation at test.
        batch_size: number of sequences in a training batch, over all processes.
        eval_batch_size: number of sequences in a validation or test batch.
        embedding: size of token embeddings.
        hidden: number of units of the decoder's LSTM; also the size of the context that estimators
            get.
        labelled: fraction of the training sequences that come with the smart tree, with
            ``BinaryTree``.
        label_weight: weight of the encoder's ``-log q(T | x)`` for these; ``1 / labelled`` counts
            them as if all sequences had a tree.
        seed: seed of the order of training sequences and of generation.

    Raises:
        ValueError: for another structure, for an estimator that evaluates relaxed trees or draws
            them differently from the structure, or for numbers out of range.
    """

    monitor: ClassVar[str] = "val/perplexity"
    mode: ClassVar[Literal["min", "max"]] = "min"
    test_metrics: ClassVar[tuple[str, ...]] = (
        "perplexity",
        "old",
        "new_balanced",
        "unbalanced",
        "unique",
        "nll",
        "drawn",
        "entropy",
        "smart_parents",
    )
    needs_full_precision = "its structures' probabilities enter the loss"
    progress: ClassVar[tuple[str, ...]] = ("nll", "perplexity")

    def __init__(
        self,
        *,
        structure: Structure,
        estimator: Estimator | None,
        optimizer: OptimizerFactory,
        data: ParenthesesData,
        generation: Generation,
        batch_size: int = 64,
        eval_batch_size: int = 500,
        embedding: int = 128,
        hidden: int = 256,
        labelled: float = 0.1,
        label_weight: float = 10.0,
        seed: int = 0,
    ) -> None:
        super().__init__(structure=structure, estimator=estimator, optimizer=optimizer)
        if (estimator is not None) != structure.is_latent:
            raise ValueError(f"{structure.name} takes {'an' if structure.is_latent else 'no'} estimator")
        if structure.is_latent and not structure.is_binary_tree:
            raise ValueError(f"parentheses needs a binary tree over the tokens or a fixed order; got {structure.name}")
        if estimator is not None and estimator.needs_differentiable_objective:
            raise ValueError(
                f"parentheses generates along a tree, for which there is no relaxation; {type(estimator).__name__} "
                "evaluates relaxed ones: take a score function, e.g. relax or t_reinforce_plus"
            )
        distribution = None if estimator is None else estimator.vertex_distribution
        noise = distribution.utility if isinstance(distribution, PerturbAndMap) else None
        if noise is not None and not isinstance(noise, Gumbel):
            raise ValueError(
                "parentheses needs log q(T | x), which a binary tree has for Gumbel utilities, "
                f"not {type(noise).__name__}"
            )
        if not 0 <= labelled <= 1:
            raise ValueError(f"labelled must lie in [0, 1]; got {labelled}")
        if generation.length < data.max_length:
            raise ValueError(
                f"generation.length={generation.length} would cut off sequences of the data, which have up to "
                f"{data.max_length} tokens"
            )
        self.data, self.generation, self.seed = data, generation, seed
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.labelled, self.label_weight = labelled, label_weight
        self.decoder = TreeDecoder(data.types, embedding, hidden)
        if structure.is_latent:
            self.encoder = TokenEncoder(data.types, embedding, hidden)

    # --- data -----------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """See :meth:`ParenthesesData.prepare`. An evaluation needs it too, to compare generated
        sequences with them.
        """
        self.data.prepare()
        self.source.prepare()

    def batches(self, split: Split) -> Batches:
        """``labelled`` ``[b, n]``, tokens of the sequences with a tree, and ``unlabelled``
        ``[c, n]``, the others.

        Both are cut to the longest sequence of the batch.
        """
        if self.source.types != self.data.types:
            raise ValueError(f"the model has data.types={self.data.types}; got sequences of {self.source.types} types")
        tokens = self.source.split(split)
        training = split == "train"
        share = 1.0 if self.estimator is None else self.labelled if training else 0.0
        return Batches(
            # The order of the sequences is random.
            {"tokens": tokens, "labelled": torch.arange(len(tokens)) < round(share * len(tokens))},
            self.batch_size if training else self.eval_batch_size,
            shuffle=training,
            seed=self.seed,
            collate=_divide,
        )

    # --- step -----------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> StepOutput:
        """Negative log-likelihood, or its bound."""
        labelled, unlabelled = batch["labelled"], batch["unlabelled"]
        first, size = len(labelled), len(labelled) + len(unlabelled)  # known without waiting for the device
        tokens = torch.cat([labelled, unlabelled])
        given = self._known_order(labelled)
        metrics: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
        if self.estimator is not None:
            scores, summary = self.encoder(tokens)
        if len(unlabelled):
            estimate, parents, of_given, metrics = self._latent(
                unlabelled, scores[first:], summary[first:], labelled, given
            )
            nlls = [of_given, estimate.objective]
            losses = [of_given, estimate.surrogate if self.training else estimate.objective]
        else:
            parents = given
            nlls = losses = [self._nll(labelled, given)]
        if len(labelled) and self.estimator is not None:
            losses = [*losses, -self.label_weight * self._log_q(labelled, given, scores[:first])]
        metrics["nll"] = (torch.cat(nlls).detach().sum(), (tokens != PAD).sum())

        def predictions() -> Predictions:  # of a batch that has one kind of sequences
            lengths = (tokens != PAD).sum(1).tolist()
            found, vertices = parents, None
            if len(unlabelled):
                best = estimate.most_probable()
                found = parents[best]
                vertices = [v[:n, :n] for v, n in zip(estimate.vertices[best], lengths, strict=True)]
            rows, smart = found.tolist(), trees.smart(tokens, self.data.types).tolist()
            prediction, target = ([row[:n] for row, n in zip(some, lengths, strict=True)] for some in (rows, smart))
            texts = [" ".join(to_text(row, self.data.types)) for row in tokens.cpu()]
            return Predictions(prediction, target, vertices, texts)

        told = None if self.training else predictions
        return StepOutput(torch.cat(losses).sum() / size, size, metrics, told)

    def summarize(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the perplexity a token."""
        return {**means, "perplexity": means["nll"].exp()}

    def _known_order(self, tokens: Tensor) -> Tensor:
        """Parents ``[batch, n]`` of the given trees, also of those that come with latent ones."""
        smart = self.structure.is_given or self.structure.is_latent
        return trees.smart(tokens, self.data.types) if smart else trees.left_to_right(tokens)

    def _nll(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """``-log p(x, T)`` ``[batch]``."""
        losses: Tensor = self.decoder(trees.level_order(tokens, parents), (tokens != PAD).sum(1))
        return losses

    def _log_q(self, tokens: Tensor, parents: Tensor, scores: Tensor) -> Tensor:
        """``log q(T | x)`` ``[batch]``."""
        own = torch.arange(tokens.shape[1], device=tokens.device)
        vertices = (parents[:, None] == own[:, None]) & (own[:, None] != own)
        return self.structure.log_prob(vertices.to(scores), scores, tokens != PAD)

    def _latent(
        self, tokens: Tensor, scores: Tensor, summary: Tensor, labelled: Tensor, given: Tensor
    ) -> tuple[Estimate, Tensor, Tensor, dict[str, Tensor | tuple[Tensor, Tensor]]]:
        """The estimate of the bound, the parents ``[N, n]`` in its trees, the losses of labelled
        sequences, and metrics.

        The bound is for sequences whose tree is latent. One call of the decoder serves both kinds,
        because few sequences take almost as long as many.
        """
        assert self.estimator is not None
        exists = tokens != PAD
        evaluated: list[tuple[Tensor, Tensor, Tensor]] = []

        def objective(vertices: Tensor, rows: Tensor) -> Tensor:
            parents = trees.parents_of(vertices, exists[rows])
            # Held fixed: the mean of the gradient of log q is 0, and the estimator handles all
            # other effects of the trees' distribution.
            log_q = self.structure.log_prob(vertices, scores.detach()[rows], exists[rows])
            nll = self._nll(torch.cat([labelled, tokens[rows]]), torch.cat([given, parents]))
            evaluated.append((parents, log_q, nll[: len(labelled)]))
            return nll[len(labelled) :] + log_q

        estimate: Estimate = self.estimator(scores, objective, mask=exists, context=summary, kl_weight=0.0)
        ((parents, log_q, of_given),) = evaluated
        with torch.no_grad():
            smart = trees.smart(tokens, self.data.types)[estimate.rows]
            found = ((parents == smart) & exists[estimate.rows]).sum(1).to(scores)
        count = exists.sum()
        metrics: dict[str, Tensor | tuple[Tensor, Tensor]] = {
            "entropy": (-estimate.mean(log_q).sum(), count),
            "smart_parents": (estimate.mean(found).sum(), count),
            **estimate.metrics,
        }
        return estimate, parents, of_given, metrics

    # --- generation -----------------------------------------------------------------------------------------------

    def on_test_epoch_end(self) -> None:
        """Also generate sequences and log their quality."""
        super().on_test_epoch_end()
        for name, value in self.judge(progress=self.trainer.is_global_zero).items():
            self.log(f"test/{name}", value)

    def judge(self, *, progress: bool = False) -> dict[str, float]:
        """Generate and judge: the fractions ``old``, ``new_balanced``, ``unbalanced``, and
        ``unique`` out of ``drawn``.

        The result is the same for every process, because the task's seed is used.

        Args:
            progress: show a progress bar, on a terminal.
        """
        wanted, width = self.generation.unique, 2 * self.generation.length + 1
        generator = torch.Generator(self.device).manual_seed(self.seed)
        train = torch.nn.functional.pad(self.data.split("train"), (0, width - self.data.max_length))
        known = set(keys_of(train.numpy()))
        seen: set[bytes] = set()
        drawn = old = new_balanced = 0
        with tqdm(total=wanted, desc="Generating", unit="seq", disable=None if progress else True) as bar:
            while len(seen) < wanted and drawn < self.generation.limit:
                # Never more than are missing, so the result does not depend on the size of the last
                # batch.
                size = min(self.generation.batch_size, wanted - len(seen), self.generation.limit - drawn)
                tokens, balanced = self.generate(size, generator)
                keys = keys_of(tokens.short().cpu().numpy())
                fresh = {key: right for key, right in zip(keys, balanced.tolist(), strict=True) if key not in seen}
                seen |= fresh.keys()
                drawn += size
                old += len(fresh.keys() & known)
                new_balanced += sum(right for key, right in fresh.items() if key not in known)
                bar.update(len(fresh))
        unique = len(seen)
        return {
            "old": old / unique,
            "new_balanced": new_balanced / unique,
            "unbalanced": (unique - old - new_balanced) / unique,
            "unique": float(unique),
            "drawn": float(drawn),
        }

    def generate(self, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sample sequences.

        Args:
            samples: number of sequences, all at once.
            generator: source of randomness, on the model's device.

        Returns:
            int64 ``[samples, 2 length + 1]``, padded with 0; and bool ``[samples]``: which are
            complete and balanced.
        """
        places, complete = self.decoder.generate(samples, 2 * self.generation.length + 1, generator)
        tokens, _ = trees.in_order(places)
        return tokens, complete & trees.is_balanced(tokens, self.data.types)

    # --- pictures -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def pictures(self, folder: Path) -> list[Path]:
        """Draw a few generated trees, with the order in which their nodes were generated."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        places, _ = self.decoder.generate(_DRAWN_OF, 2 * _DRAWN_LENGTH + 1, generator)
        tokens, positions = trees.in_order(places)
        # The longest legible ones, each of another length if possible.
        length = (tokens != PAD).sum(1)
        legible = (length <= _DRAWN_LENGTH).nonzero().squeeze(1)
        by_length = legible[length[legible].argsort(descending=True, stable=True)]
        chosen = by_length[torch.linspace(0, max(len(by_length) // 2, 0), min(_DRAWN, len(by_length))).long()]
        growths = [Growth(places[i].cpu(), positions[i].cpu(), tokens[i].cpu()) for i in chosen.tolist()]
        balanced = trees.is_balanced(tokens, self.data.types)[chosen].tolist()
        return [draw(growths, balanced, self.data.types, folder / "trees.png")] if growths else []


def _divide(batch: Batch) -> Batch:
    """Sequences with and without their tree, divided on the host. So the numbers of both are known
    without waiting.
    """
    tokens, labelled = batch["tokens"].long(), batch["labelled"]
    n = int((tokens != PAD).sum(1).max())
    return {"labelled": tokens[labelled, :n], "unlabelled": tokens[~labelled, :n]}
