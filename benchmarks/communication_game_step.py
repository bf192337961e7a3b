"""Training step of the communication game at the paper's size against plain PyTorch: a sum over the
256 symbols.

Run from the root of the checkout: ``python -m benchmarks.communication_game_step``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from benchmarks.harness import Row, matmul_rate, measure, report, settings, training_step
from torch import Tensor
from torch.nn import functional as F

from structgrad.estimators import Marginalize, Reinforce
from structgrad.estimators.base import Estimator
from structgrad.structures import OneHot
from structgrad.tasks.communication_game import CommunicationGame
from structgrad.tasks.communication_game.data import ConceptData, Concepts, draw_games
from structgrad.training.runtime import tune_allocator

GAMES, CANDIDATES, SYMBOLS, FEATURES, EMBEDDING, HIDDEN = 64, 16, 256, 4096, 256, 512


class Noise(ConceptData):
    """Random features: 100 concepts of ten images."""

    features = FEATURES

    def prepare(self) -> None:
        """Nothing to prepare."""

    def split(self, split: str) -> Concepts:
        """The same for all splits."""
        generator = torch.Generator().manual_seed(0)
        features = F.normalize(torch.rand(1000, FEATURES, generator=generator))
        return Concepts(features, torch.arange(100).repeat_interleave(10), [str(k) for k in range(100)])


def flops(calls: float) -> float:
    """Multiplications and additions of the matrix products of a step; no gradient for features.

    The sender's network for each number counts one product forward and two backward.
    """
    embed = 2 * 2.0 * GAMES * (CANDIDATES + 1) * FEATURES * EMBEDDING
    sender = 3 * 2.0 * GAMES * EMBEDDING * (SYMBOLS + HIDDEN)
    return embed + sender + 3 * 2.0 * GAMES * CANDIDATES * EMBEDDING * calls


def plain_step(task: CommunicationGame, probabilities: Callable[[Tensor], Tensor]) -> Tensor:
    """Loss of a step, one symbol after another; symbols that no game uses are left out."""
    images = draw_games(task.get_buffer("train_sizes"), GAMES, CANDIDATES)
    seen = task.get_buffer("train_features")[images]
    sender = task.sender
    numbers = sender.embed(seen[:, 0])
    hidden = torch.sigmoid(numbers[:, :, None] * sender.inward)
    scores = sender.score(torch.sigmoid(hidden @ sender.outward)) / sender.temperature
    return plain_marginal(task, probabilities(scores), task.receiver.embed(seen))


def plain_marginal(task: CommunicationGame, p: Tensor, candidates: Tensor) -> Tensor:
    """The part of a step that depends on the number of symbols; the first candidate is the right one."""
    receiver = task.receiver
    total = task.entropy_bonus * p.clamp_min(1e-30).log().mul(p).sum(1)
    for symbol in range(SYMBOLS):
        if bool((p[:, symbol] > 0).any()):
            choice = (candidates @ receiver.symbols.weight[symbol]).log_softmax(1)
            total = total - p[:, symbol] * choice[:, 0]
    return total.mean()


def measured() -> list[Row]:
    """Dense, and sparsemax with large, medium and small support."""
    torch.manual_seed(0)
    structure = OneHot()
    none = torch.zeros(GAMES, dtype=torch.int64)
    batch = {"train": none, "target": none}
    lines, product = [], matmul_rate()
    for name, estimator, temperature in (
        ("dense", Marginalize(structure), 10.0),
        ("sparsemax, at first", Marginalize(structure, "sparsemax"), 10.0),
        ("sparsemax, later", Marginalize(structure, "sparsemax"), 0.3),
        ("sparsemax, certain", Marginalize(structure, "sparsemax"), 0.05),
        ("sfe", Reinforce(structure, baseline="ema"), 10.0),
    ):
        task = CommunicationGame(
            structure=structure,
            estimator=estimator,
            optimizer=torch.optim.Adam,
            data=Noise(),
            temperature=temperature,
        ).train()
        task.setup("fit")
        # Without learning, so that the support does not change.
        fused = torch.optim.Adam(task.parameters(), lr=0.0, fused=True)
        default = torch.optim.Adam(task.parameters(), lr=0.0)
        mapping: Callable[[Tensor], Tensor] = partial(torch.softmax, dim=1) if name == "dense" else structure.project
        calls = float(task.step(batch).metrics["decoder_calls"])  # type: ignore[arg-type]

        ours = training_step(fused, lambda task=task: task.step(batch).loss)  # type: ignore[misc]
        theirs = training_step(default, partial(plain_step, task, mapping))
        # The part of the step that depends on the symbols. The rest, embedding the images, is the same for all.
        meant = task.get_buffer("train_features")[:GAMES]
        scores = task.sender(meant).detach().requires_grad_()
        candidates = torch.randn(GAMES, CANDIDATES, EMBEDDING, requires_grad=True)

        def ours_alone(
            task: CommunicationGame = task,
            estimator: Estimator = estimator,
            scores: Tensor = scores,
            candidates: Tensor = candidates,
        ) -> None:
            estimate = estimator(scores, lambda vertices, rows: task._losses(vertices, rows, candidates, none))
            (estimate.surrogate + task.entropy_bonus * task.latent_kl(estimate, scores)).mean().backward()

        def theirs_alone(
            task: CommunicationGame = task,
            mapping: Callable[[Tensor], Tensor] = mapping,
            scores: Tensor = scores,
            candidates: Tensor = candidates,
        ) -> None:
            plain_marginal(task, mapping(scores), candidates).backward()

        mine, mine_alone = measure(ours, repeats=11), measure(ours_alone, repeats=11)
        other, other_alone = None, None
        if name != "sfe":
            other, other_alone = measure(theirs, repeats=7), measure(theirs_alone, repeats=7)
        size, opponent = f"calls={calls:.1f}", "a loop over the symbols" if other else ""
        share = round(mine.rate(flops(calls)) / product, 2)
        lines += [
            Row(f"step, {name}", size, mine, opponent, other, share=share),
            Row(f"symbols alone, {name}", size, mine_alone, opponent, other_alone),
        ]
    return lines


if __name__ == "__main__":
    tune_allocator()
    report("communication_game_step", [row for _ in settings() for row in measured()])
