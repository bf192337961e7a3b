"""Balanced parentheses at the paper's sizes: training steps of the three orders, and generation
against a loop over single sequences, there and at the sizes of the quick budget.
"""

from __future__ import annotations

import math
import tempfile
from collections import deque
from collections.abc import Callable
from functools import partial

import torch
from benchmarks.harness import Row, measure, report, settings, training_step
from torch import Tensor
from torch.nn import functional as F

from structgrad.estimators import RELAX, Reinforce
from structgrad.estimators.base import Estimator
from structgrad.structures import BinaryTree, GroundTruth, NoStructure, Structure
from structgrad.tasks.parentheses import Parentheses, ParenthesesData, trees
from structgrad.tasks.parentheses.model import TreeDecoder
from structgrad.tasks.parentheses.task import Generation
from structgrad.training.runtime import tune_allocator

BATCH, EMBEDDING, HIDDEN = 64, 128, 256
SAMPLES = 4  # of T-REINFORCE+, on a quarter of the sequences
GENERATED, ALONE = 2048, 32  # sequences generated together, and one after the other
PLACES = 81  # at which a tree is cut off
BOUND = 50  # milliseconds of a RELAX step that we ask of ourselves, on one core


Step = Callable[[Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]


def by_layer(model: TreeDecoder) -> Step:
    """A step of one sequence by the layer, which prepares its weights again at every call."""

    def step(token: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        following: tuple[Tensor, Tensor] = model.lstm(token, state)[1]
        return following

    return step


def by_cell(model: TreeDecoder) -> Step:
    """The same by the function of one step, the fastest way."""
    weights = list(model.lstm.parameters())
    return lambda token, state: torch.lstm_cell(token, state, *weights)


def single(model: TreeDecoder, step: Step) -> list[int]:
    """Generate one sequence, node by node: the loop that batches replace."""
    children: list[list[int]] = []  # of every node: its children that exist, by number, left then right; -1 for none
    tokens: list[int] = []
    open_places: deque[tuple[int, int]] = deque([(-1, 0)])  # parent, side
    token = model.vocabulary
    state = (torch.zeros(1, model.lstm.hidden_size), torch.zeros(1, model.lstm.hidden_size))
    for place in range(PLACES):
        parent, side = open_places.popleft()
        state = step(model.embedding.weight[token, None], state)
        scores = F.linear(F.relu(model.project(state[0][0])), model.embedding.weight[: model.vocabulary], model.bias)
        if place == 0:
            scores[0] = -torch.inf
        token = int(torch.multinomial(scores.softmax(0), 1))
        if token:
            if parent >= 0:
                children[parent][side] = len(tokens)
            open_places += [(len(tokens), 0), (len(tokens), 1)]
            tokens.append(token)
            children.append([-1, -1])
        if not open_places:
            break

    def read(node: int) -> list[int]:
        return [] if node < 0 else [*read(children[node][0]), tokens[node], *read(children[node][1])]

    return read(0)


def level_order(row: list[int], parents: list[int]) -> list[int]:
    """The level order of one tree, by a queue."""
    below = {(above, j > above): j for j, above in enumerate(parents) if above != j}
    queue = deque([next(j for j, above in enumerate(parents) if above == j)])
    places = []
    while queue:
        node = queue.popleft()
        places.append(row[node] if node >= 0 else 0)
        if node >= 0:
            queue += [below.get((node, False), -1), below.get((node, True), -1)]
    return places


def generation(types: int, embedding: int, hidden: int) -> list[Row]:
    """The time of a sequence."""
    model = TreeDecoder(types, embedding, hidden)
    with torch.no_grad():
        # A little more than half of the places have no child, so that trees have about as many tokens as the data's.
        model.bias[0] += math.log(model.vocabulary - 1) + 0.2
    generator = torch.Generator().manual_seed(0)

    def together() -> None:
        places, _ = model.generate(GENERATED, PLACES, generator)
        trees.in_order(places)

    rows = []
    with torch.no_grad():
        ours = measure(together, repeats=5, warmup=1) / GENERATED
        for name, step in (("nn.LSTM", by_layer(model)), ("lstm_cell", by_cell(model))):
            theirs = measure(lambda: [single(model, step) for _ in range(ALONE)], repeats=5, warmup=1) / ALONE  # noqa: B023
            size, opponent = f"{GENERATED} together, d={hidden}", f"one after the other, {name}"
            rows.append(Row("generation, a sequence", size, ours, opponent, theirs, bound=theirs.processor / 50))
    return rows


def measured() -> list[Row]:
    """Training steps of the three orders, then generation."""
    torch.manual_seed(0)
    tree = BinaryTree()
    orders: dict[str, tuple[Structure, Estimator | None, int]] = {
        "left to right": (NoStructure(), None, BATCH),
        "smart": (GroundTruth(), None, BATCH),
        "RELAX": (tree, RELAX(tree), BATCH),
        f"T-REINFORCE+, K = {SAMPLES}": (tree, Reinforce(tree, "T", "loo", n_samples=SAMPLES), BATCH // SAMPLES),
    }
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        data = ParenthesesData(cache, train=4000, val=5, test=5)
        data.prepare()
        for name, (structure, estimator, batch_size) in orders.items():
            task = Parentheses(
                structure=structure,
                estimator=estimator,
                optimizer=partial(torch.optim.Adam, lr=3e-3),
                data=data,
                generation=Generation(),
                batch_size=batch_size,
                embedding=EMBEDDING,
                hidden=HIDDEN,
            )
            batch = next(iter(task.batches("train")))
            optimizer = task.configure_optimizers()
            assert isinstance(optimizer, torch.optim.Optimizer)

            step = training_step(optimizer, lambda task=task, batch=batch: task.step(batch).loss)  # type: ignore[misc]
            what, size = f"training step, {name}", f"{batch_size} x 20, d={HIDDEN}"
            rows.append(Row(what, size, measure(step, repeats=5, warmup=1), bound=BOUND if name == "RELAX" else None))
        sequences = data.split("train")[:BATCH].long()
        parents = trees.smart(sequences, data.types)
        lists = [
            ([t for t in row if t], [p for p in above if p >= 0])
            for row, above in zip(sequences.tolist(), parents.tolist(), strict=True)
        ]
        rows.append(
            Row(
                "smart trees in level order",
                f"{BATCH} x 20",
                measure(lambda: trees.level_order(sequences, parents)),
                "plain loop over trees",
                measure(lambda: [level_order(*each) for each in lists]),
            )
        )
    return [*rows, *generation(data.types, EMBEDDING, HIDDEN), *generation(data.types, 64, 96)]


if __name__ == "__main__":
    tune_allocator()
    report("parentheses_step", [row for _ in settings() for row in measured()])
