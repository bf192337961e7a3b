from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import networkx as nx
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.nn import functional as F

from structgrad.algorithms import bfloat16
from structgrad.estimators import SST
from structgrad.estimators.base import Over
from structgrad.estimators.baselines import ElboAverage
from structgrad.estimators.score_function import UtilitiesAction, VertexAction
from structgrad.experiments import tables
from structgrad.structures import GroundTruth, NoStructure, Subset
from structgrad.tasks.graph_layout import GraphLayout, GraphLayoutData, messages
from structgrad.tasks.graph_layout import model as models
from structgrad.tasks.graph_layout.data import force_step, generate, random_trees, simulate
from structgrad.tasks.graph_layout.model import Decoder, Encoder
from structgrad.tasks.graph_layout.rollout import rollout
from structgrad.tasks.graph_layout.task import complement, edge_agreement
from structgrad.training.run import assemble
from tests.tasks.given import SURROGATE, Given, weighted_sums
from tests.tasks.trainers import quiet_trainer

# --- data ----------------------------------------------------------------------------------------------------------


def test_trees_are_maximum_spanning_trees() -> None:
    trees = random_trees(np.random.default_rng(3), 20, 10)
    weights = np.random.default_rng(3).gumbel(size=(20, 10, 10))
    for tree, w in zip(trees, weights, strict=True):
        upper = np.triu(w, 1)
        graph = nx.from_numpy_array(upper + upper.T)
        expected = nx.to_numpy_array(nx.maximum_spanning_tree(graph), weight=None)
        np.testing.assert_array_equal(tree, expected > 0)


@pytest.mark.parametrize("n", [2, 5, 10])
def test_force_step_is_one_iteration_of_networkx(n: int) -> None:
    rng = np.random.default_rng(n)
    trees = random_trees(rng, 8, n)
    start = rng.standard_normal((8, n, 2))
    ours = force_step(start, trees)
    for tree, positions, moved in zip(trees, start, ours, strict=True):
        graph = nx.from_numpy_array(tree.astype(float))
        theirs = nx.spring_layout(graph, pos=dict(enumerate(positions)), iterations=1, threshold=0)
        np.testing.assert_allclose(moved, np.stack([theirs[i] for i in range(n)]), atol=1e-12)


def test_short_forces_count_as_longer_ones() -> None:
    # Two linked vertices at their equilibrium distance k: the force is zero, and so is the move.
    k = 0.5**0.5
    start = np.array([[[-k / 2, 0.0], [k / 2, 0.0]]])
    tree = np.array([[[False, True], [True, False]]])
    np.testing.assert_allclose(force_step(start, tree), [[[-1.0, 0.0], [1.0, 0.0]]], atol=1e-12)
    # Slightly nearer: force f = k^2/d - d^2/k < 0.01, so the move is step * f / 0.1.
    d = k - 1e-3
    start = np.array([[[0.0, 0.0], [d, 0.0]]])
    f = k * k / d - d * d / k
    assert 0 < f < 0.01
    moved = start + np.array([[[-1.0], [1.0]]]) * [0.1 * d * f / 0.1, 0.0]
    moved -= moved.mean(1, keepdims=True)
    np.testing.assert_allclose(force_step(start, tree), moved / np.abs(moved).max(), atol=1e-12)
    assert (np.ptp(moved, axis=1)[0, 0] - d) < 2 * 0.1 * d  # shorter than a whole step


def test_simulation_drops_the_initial_frame() -> None:
    trees = random_trees(np.random.default_rng(0), 3, 10)
    frames = simulate(np.random.default_rng(1), trees, 4)
    assert frames.shape == (3, 4, 10, 2)
    start = np.random.default_rng(1).standard_normal((3, 10, 2))
    np.testing.assert_allclose(frames[:, 0], force_step(start, trees))
    np.testing.assert_allclose(frames[:, 3], force_step(frames[:, 2], trees))


def small_data(folder: Path, **options: int) -> GraphLayoutData:
    return GraphLayoutData(folder, **({"train": 48, "val": 12, "test": 12, "steps": 4} | options))


def test_cache_holds_what_was_generated_and_survives_damage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = small_data(tmp_path)
    data.prepare()
    expected = generate(data)
    for name, (positions, adjacency) in expected.items():
        split = data.split(name)
        np.testing.assert_array_equal(split["positions"].numpy(), positions)
        np.testing.assert_array_equal(split["adjacency"].numpy(), adjacency)
    assert expected["train"][0].min() == -1
    assert expected["train"][0].max() == 1
    manifest = json.loads((data.folder / "manifest.json").read_text())
    assert manifest["configuration"]["train"] == 48

    calls = []
    monkeypatch.setattr("structgrad.tasks.graph_layout.data.generate", lambda d: calls.append(d) or generate(d))
    small_data(tmp_path).prepare()
    assert not calls  # found
    arrow = next((data.folder / "val").glob("*.arrow"))
    content = bytearray(arrow.read_bytes())
    content[len(content) // 2] ^= 1
    arrow.write_bytes(content)
    again = small_data(tmp_path)
    again.prepare()
    assert len(calls) == 1
    assert "damaged" in caplog.text
    assert torch.equal(again.split("val")["positions"], torch.from_numpy(expected["val"][0]))
    assert [p.name for p in data.folder.parent.iterdir() if p.suffix == ".part"] == []


def test_configurations_have_caches_of_their_own(tmp_path: Path) -> None:
    folders = {small_data(tmp_path, **o).folder for o in ({}, {"seed": 1}, {"steps": 5}, {"val": 13})}
    assert len(folders) == 4
    with pytest.raises(ValueError, match="steps must be at least 2"):
        small_data(tmp_path, steps=1)


# --- model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("n", [2, 3, 6])
def test_edges_and_windows(n: int, on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_launches_count", lambda device: on_gpu)
    matrix = torch.randn(4, n, n)
    off_diagonal = ~torch.eye(n, dtype=torch.bool)
    edges = models.to_edges(matrix)
    assert torch.equal(models.to_matrix(edges), torch.where(off_diagonal, matrix, 0.0))
    sends = models.senders(n)
    per_vertex = torch.randn(4, n, 5, requires_grad=True)
    window = models.windows(per_vertex)
    assert torch.equal(window, per_vertex[:, sends])
    weight = torch.randn_like(window)
    (expected,) = torch.autograd.grad((per_vertex[:, sends] * weight).sum(), per_vertex)
    torch.testing.assert_close(models.sum_to_senders(weight), expected)


def naive_decoder(decoder: Decoder, positions: Tensor, vertices: Tensor, every: int) -> Tensor:
    """The definition: edge by edge, type by type, ends concatenated."""
    hidden, n = decoder.hidden, positions.shape[2]
    frames = []
    state = positions[:, 0]
    for t in range(positions.shape[1] - 1):
        if t % every == 0:
            state = positions[:, t]
        received = []
        for j in range(n):
            total = state.new_zeros(len(state), hidden)
            for i in (i for i in range(n) if i != j):
                ends = torch.cat((state[:, i], state[:, j]), -1)
                for kind, weight in enumerate((1 - vertices[:, i, j], vertices[:, i, j])):
                    own = slice(kind * hidden, (kind + 1) * hidden)
                    h = F.relu(F.linear(ends, decoder.message1.weight[own], decoder.message1.bias[own]))
                    total = total + weight[:, None] * F.relu(h @ decoder.message2[kind] + decoder.message2_bias[kind])
            received.append(total)
        state = state + decoder.update(torch.cat((state, torch.stack(received, 1)), -1))
        frames.append(state)
    return torch.stack(frames, 1)


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("every", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("n", [2, 5])
def test_decoder_is_its_definition(
    n: int, every: int, hard: bool, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_launches_count", lambda device: on_gpu)
    monkeypatch.setattr(messages, "_TOGETHER", 3 * n * (n - 1))  # several chunks, the last one smaller
    decoder = Decoder(7).double()
    positions = torch.randn(5, 6, n, 2, dtype=torch.float64, requires_grad=True)
    vertices = torch.rand(5, n, n, dtype=torch.float64)
    if hard:
        vertices = vertices.round()
        vertices[0], vertices[1] = 0, 1  # one type only
    else:
        vertices.requires_grad_()
    leaves = [positions, *decoder.parameters(), *([] if hard else [vertices])]
    weight = torch.randn(5, 5, n, 2, dtype=torch.float64)
    results = [f(positions, vertices, every) for f in (decoder, lambda *a: naive_decoder(decoder, *a))]
    torch.testing.assert_close(results[0], results[1])
    grads = [torch.autograd.grad((r * weight).sum(), leaves) for r in results]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_relaxed_graphs_are_decoded_as_such_where_a_task_is_tested(context: Any) -> None:
    """``estimator.evaluation=relaxed``: the estimator marks weights between 0 and 1 by ``requires_grad``."""
    torch.manual_seed(0)
    decoder, positions = Decoder(7).double(), torch.randn(3, 6, 5, 2, dtype=torch.float64)
    vertices = torch.rand(3, 5, 5, dtype=torch.float64)
    expected = naive_decoder(decoder, positions, vertices, 2)
    with context():
        found = decoder(positions, vertices.clone().requires_grad_(), 2)
    torch.testing.assert_close(found, expected)


def message_inputs(dtype: torch.dtype, hidden: int = 3, graphs: int = 5, n: int = 4) -> list[Tensor]:
    """Sender, receiver, weight, bias."""
    shapes = (2, graphs, n, hidden), (2, graphs, n, hidden), (2, hidden, hidden), (2, hidden)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def test_messages_have_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "_TOGETHER", 24)
    torch.manual_seed(0)
    inputs = message_inputs(torch.float64)
    soft = torch.rand(5, 4, 3, dtype=torch.float64, requires_grad=True)

    def of_soft(*leaves: Tensor) -> Tensor:
        return messages.sum_messages(*leaves[:4], messages.Graphs(leaves[4], hard=False))

    assert torch.autograd.gradcheck(of_soft, (*inputs, soft))
    assert torch.autograd.gradgradcheck(of_soft, (*inputs, soft))
    hard = messages.Graphs(soft.detach().round(), hard=True)
    assert torch.autograd.gradcheck(lambda *leaves: messages.sum_messages(*leaves, hard), inputs)
    assert torch.autograd.gradgradcheck(lambda *leaves: messages.sum_messages(*leaves, hard), inputs)


@pytest.mark.parametrize("hard", [False, True])
def test_messages_in_bfloat16_differ_by_its_rounding(hard: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "has_bfloat16_units", lambda: True)
    torch.manual_seed(0)
    inputs = message_inputs(torch.float32, hidden=64, graphs=40, n=5)
    edges = torch.rand(40, 5, 4).round() if hard else torch.rand(40, 5, 4, requires_grad=True)
    leaves = [*inputs, *([] if hard else [edges])]
    upstream = torch.randn(40, 5, 64)

    def results() -> list[Tensor]:
        heard = messages.sum_messages(*inputs, messages.Graphs(edges, hard))
        return [heard.detach(), *torch.autograd.grad(heard, leaves, upstream)]

    exact = results()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        rounded = results()
    finally:
        torch.set_float32_matmul_precision(before)
    assert {t.dtype for t in rounded} == {torch.float32}
    value, *gradients = (float((a - b).norm() / b.norm()) for a, b in zip(rounded, exact, strict=True))
    assert 1e-4 < value < 1e-2  # bfloat16 has 8 bits; 0 would mean that it was not used
    # A relu near 0 switches: of gradients a share is lost whose root is what this norm sees.
    assert min(gradients) > 1e-4
    assert max(gradients) < 0.1


def test_vectorised_jacobian_of_messages() -> None:
    inputs, soft = message_inputs(torch.float64), torch.rand(5, 4, 3, dtype=torch.float64, requires_grad=True)
    heard = messages.sum_messages(*inputs, messages.Graphs(soft, hard=False))
    expected = messages._in_torch(*inputs, soft)
    upstream = torch.randn(2, *heard.shape, dtype=torch.float64)
    leaves = [*inputs, soft]
    found = [torch.autograd.grad(value, leaves, upstream, is_grads_batched=True) for value in (heard, expected)]
    torch.testing.assert_close(*found)


def test_messages_pass_a_nan_on() -> None:
    inputs = message_inputs(torch.float32)
    with torch.no_grad():
        inputs[0][1, 2, 0, 0] = torch.nan
    edges = torch.full((5, 4, 3), 0.5, requires_grad=True)
    assert messages.sum_messages(*inputs, messages.Graphs(edges, hard=False)).isnan().any((1, 2)).tolist() == [
        g == 2 for g in range(5)
    ]


def test_rollout_has_second_derivatives_and_compiles() -> None:
    decoder = Decoder(3).double()
    parameters = [p.detach().requires_grad_() for p in decoder.parameters_of_steps()]
    state = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    edges = torch.rand(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda s, e, *p: rollout(s, e, [*p], 2), (state, edges, *parameters))
    compiled = torch.compile(rollout, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(state, edges, parameters, 2), rollout(state, edges, parameters, 2))


def test_vectorised_jacobian_of_the_sums_of_edges() -> None:
    ends = [torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    edges = models._EdgeSum.apply(*ends)
    upstream = torch.randn(3, *edges.shape, dtype=torch.float64)
    together = torch.autograd.grad(edges, ends, upstream, is_grads_batched=True, retain_graph=True)
    one_by_one = zip(*[torch.autograd.grad(edges, ends, u, retain_graph=True) for u in upstream], strict=True)
    for ours, expected in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(ours, torch.stack(expected))


def test_vectorised_jacobian_of_the_rollout() -> None:
    parameters = [p.detach().requires_grad_() for p in Decoder(3).double().parameters_of_steps()]
    state, edges = torch.randn(2, 3, 2, dtype=torch.float64), torch.rand(2, 3, 2, dtype=torch.float64)
    leaves = [state.requires_grad_(), edges.requires_grad_(), *parameters]
    following = rollout(state, edges, parameters, 2)
    upstream = torch.randn(2, *following.shape, dtype=torch.float64)
    together = torch.autograd.grad(following, leaves, upstream, is_grads_batched=True, retain_graph=True)
    one_by_one = zip(*[torch.autograd.grad(following, leaves, u, retain_graph=True) for u in upstream], strict=True)
    for ours, expected in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(ours, torch.stack(expected))


def test_hard_and_soft_paths_agree_in_float32() -> None:
    decoder, positions = Decoder(32), torch.rand(20, 10, 10, 2) * 2 - 1
    hard = torch.rand(20, 10, 10).round()
    sparse = decoder(positions, hard, 10)
    dense = decoder(positions, hard.clone().requires_grad_(), 10)
    torch.testing.assert_close(sparse, dense, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(decoder(positions, hard, 1), decoder(positions, hard, 1))


def naive_encoder(encoder: Encoder, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Kipf et al. (2018): incidence matrices and concatenation."""

    def mlp(first: nn.Linear, block: models._Block, x: Tensor) -> Tensor:
        y = F.elu(block.linear(F.elu(first(x))))
        return block.norm(y.flatten(0, 1)).view(y.shape)

    n = positions.shape[2]
    sends, receives = (~torch.eye(n, dtype=torch.bool)).nonzero().T
    x = mlp(encoder.vertex1, encoder.block1, positions.transpose(1, 2).flatten(2))
    edges = mlp(encoder.edge1, encoder.block2, torch.cat((x[:, sends], x[:, receives]), -1))
    one_hot = F.one_hot(receives, n).to(x)
    x = mlp(encoder.vertex2, encoder.block3, one_hot.T @ edges / n)
    features = mlp(encoder.edge2, encoder.block4, torch.cat((x[:, sends], x[:, receives], edges), -1))
    scores = x.new_zeros(len(x), n, n)
    scores[:, sends, receives] = encoder.out(features).squeeze(-1)
    return scores, features.mean(1)


@pytest.mark.parametrize("training", [True, False])
def test_encoder_is_its_definition(training: bool) -> None:
    encoder = Encoder(8, 6).double().train(training)
    positions = torch.randn(5, 4, 4, 2, dtype=torch.float64)
    results = [encoder(positions), naive_encoder(encoder, positions)]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    weight = torch.randn(5, 4, 4, dtype=torch.float64)
    parameters = list(encoder.parameters())
    grads = [torch.autograd.grad((scores * weight).sum(), parameters) for scores, _ in results]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


# --- task ----------------------------------------------------------------------------------------------------------


def test_edge_agreement() -> None:
    true = torch.zeros(1, 4, 4)
    for i, j in ((0, 1), (1, 2), (2, 3)):
        true[0, i, j] = true[0, j, i] = 1
    found = torch.zeros(1, 4, 4)
    found[0, 0, 1] = found[0, 1, 0] = found[0, 0, 3] = found[0, 3, 2] = 1
    values = {name: value.item() for name, value in edge_agreement(found, true).items()}
    assert values == pytest.approx(
        {
            "edge_precision": 3 / 4,
            "edge_recall": 3 / 6,
            "complement_edge_precision": 3 / 8,
            "complement_edge_recall": 3 / 6,
        }
    )
    assert complement(found).diagonal(dim1=1, dim2=2).sum() == 0
    assert edge_agreement(torch.zeros(1, 4, 4), true)["edge_precision"].item() == 0


def make_task(root: Path, cache: Path, *overrides: str) -> GraphLayout:
    with initialize_config_dir(str(root / "configs"), version_base="1.3"):
        config = compose("config", ["task=graph_layout", "budget=smoke", f"paths.cache={cache}", *overrides])
    structure = instantiate(config.structure)
    estimator = instantiate(config.estimator, structure=structure) if structure.is_latent else None
    task: GraphLayout = instantiate(config.task, structure=structure, estimator=estimator)
    return task


def moving_points() -> tuple[Tensor, Tensor]:
    """Two graphs of four vertices in five layouts, and edges that differ from their transposes and complements."""
    positions = torch.randn(2, 5, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    true = torch.zeros(2, 4, 4)
    true[0, [0, 0, 2], [1, 2, 3]] = 1
    true[1, [3, 3], [0, 1]] = 1
    return positions, true


def nll_by_hand(task: GraphLayout, positions: Tensor, graph: Tensor) -> float:
    """(x - y)^2 / (2 variance), over all later layouts, for each of four vertices: the true layout comes every 3 steps
    in training, and every step otherwise.
    """
    every = 3 if task.training else 1
    predicted = naive_decoder(task.decoder, positions[None], graph[None].double(), every)[0]
    return float((predicted - positions[1:]).detach().square().sum() / (2 * 0.01) / 4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("over", "kind", "count"), [("vertex", "directed", 1), ("parts", "undirected", 2)])
def test_loss_and_metrics_of_given_graphs_by_hand(
    tmp_path: Path, training: bool, over: Over, kind: Literal["directed", "undirected"], count: int
) -> None:
    """Two sampled graphs for each of two examples, in mixed order."""
    torch.manual_seed(0)
    positions, true = moving_points()
    rows, weights = torch.tensor([1, 0, 1, 0]), torch.tensor([0.3, 0.6, 0.7, 0.4]).double()
    found = torch.zeros(4, 4, 4, dtype=torch.float64)
    found[0, [3, 3, 1], [0, 1, 2]] = 1
    found[1, [0, 2], [1, 3]] = 1
    found[2, [0, 1, 0], [3, 3, 2]] = 1
    found[3, [0, 2, 3, 1], [1, 3, 2, 0]] = 1
    structure, kl = Subset(kind), torch.tensor([2.0, 7.0]).double()
    estimator = Given(structure, found, rows, weights, kl, over)
    data = small_data(tmp_path, steps=5)
    options = {"batch_size": 2, "hidden": 7, "variance": 0.01, "teacher_forcing": 3}
    task = GraphLayout(structure=structure, estimator=estimator, optimizer=torch.optim.Adam, data=data, **options)  # type: ignore[arg-type]
    out = task.double().train(training).step({"positions": positions, "adjacency": true})

    nlls = [nll_by_hand(task, positions[row], graph) for row, graph in zip(rows.tolist(), found, strict=True)]
    nll = weighted_sums(rows, nlls, weights)
    kl = count * kl / 4
    torch.testing.assert_close(out.loss, (SURROGATE * nll + kl).mean())
    values = {name: float(value) for name, value in out.metrics.items() if isinstance(value, Tensor)}
    assert values["reconstruction"] == pytest.approx(float(nll.mean()))
    assert values["kl"] == pytest.approx(float(kl.mean()))
    assert values["elbo"] == pytest.approx(-float((nll + kl).mean()))
    assert estimator.kl_weight == count / 4
    if not training:
        # By example: hits 2 of 3 and 0 of 3 of two edges; 2 of 2 and 2 of 4 of three edges.
        precision = weighted_sums(rows, [2 / 3, 2 / 2, 0, 2 / 4], weights).mean()
        recall = weighted_sums(rows, [2 / 2, 2 / 3, 0, 2 / 3], weights).mean()
        assert values["edge_precision"] == pytest.approx(float(precision))
        assert values["edge_recall"] == pytest.approx(float(recall))


@pytest.mark.parametrize("training", [True, False])
def test_loss_of_the_true_graph_by_hand(tmp_path: Path, training: bool) -> None:
    torch.manual_seed(0)
    positions, true = moving_points()
    data = small_data(tmp_path, steps=5)
    options = {"batch_size": 2, "hidden": 7, "variance": 0.01, "teacher_forcing": 3}
    task = GraphLayout(
        structure=GroundTruth(),
        estimator=None,
        optimizer=torch.optim.Adam,
        data=data,
        **options,  # type: ignore[arg-type]
    )
    out = task.double().train(training).step({"positions": positions, "adjacency": true})
    expected = sum(nll_by_hand(task, positions[i], true[i]) for i in range(2)) / 2
    assert float(out.loss.detach()) == pytest.approx(expected)
    assert float(out.metrics["elbo"]) == pytest.approx(-expected)  # type: ignore[arg-type]


def test_metrics_are_of_the_better_of_graph_and_complement(root: Path, tmp_path: Path) -> None:
    task = make_task(root, tmp_path)
    means = {
        "elbo": torch.tensor(-1.0),
        "edge_precision": torch.tensor(0.2),
        "edge_recall": torch.tensor(0.3),
        "complement_edge_precision": torch.tensor(0.4),
        "complement_edge_recall": torch.tensor(0.1),
    }
    better = {name: round(value.item(), 3) for name, value in task.summarize(means).items()}
    assert better == {"elbo": -1, "edge_precision": 0.4, "edge_recall": 0.1, "complement": 1}
    means["edge_precision"] = torch.tensor(0.5)
    kept = {name: round(value.item(), 3) for name, value in task.summarize(means).items()}
    assert kept == {"elbo": -1, "edge_precision": 0.5, "edge_recall": 0.3, "complement": 0}


ROWS = [
    *[
        (s, e)
        for s in ("spanning_tree", "top_edges")
        for e in ("sst", "reinforce", "nvil", "t_reinforce_plus", "relax")
    ],
    *[("independent_directed", e) for e in ("sst", "reinforce", "nvil", "relax")],
]


@pytest.mark.parametrize(("structure", "estimator"), ROWS)
def test_every_row_of_the_tables_trains_by_configuration_alone(
    root: Path, tmp_path_factory: pytest.TempPathFactory, structure: str, estimator: str
) -> None:
    cache = tmp_path_factory.getbasetemp() / "graph_layout_cache"
    task = make_task(root, cache, f"structure={structure}", f"estimator={estimator}")
    task.prepare_data()
    optimizer = task.configure_optimizers()
    batches = iter(task.batches("train"))
    for _ in range(2):
        out = task.step(next(batches))
        optimizer.zero_grad()
        out.loss.backward()
        assert task.encoder is not None
        for part in (task.encoder.out, task.decoder):
            grads = [p.grad for p in part.parameters()]
            assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in grads)
        optimizer.step()
    task.eval()
    with torch.no_grad():
        out = task.step(next(iter(task.batches("val"))))
    assert {"elbo", "edge_precision", "edge_recall", "complement_edge_precision", "kl"} <= out.metrics.keys()
    torch.testing.assert_close(out.metrics["elbo"], -(out.metrics["reconstruction"] + out.metrics["kl"]))


def test_searches_are_the_papers(root: Path) -> None:
    """The authors' ranges for spanning trees, for all; the step of the finite differences of top edges (D.4.3)."""
    with initialize_config_dir(str(root / "configs"), version_base="1.3"):
        for structure in ("spanning_tree", "top_edges", "independent_directed"):
            search = compose("config", ["task=graph_layout", f"structure={structure}"]).search
            assert search["task.optimizer.lr"] == {"distribution": "log_uniform", "low": 1e-4, "high": 1e-2}
            assert search["estimator.temperature"] == {"distribution": "log_uniform", "low": 0.1, "high": 10.0}
        table = tables.load("paulus_1", root / "configs" / "table")
        for steps in (10, 20):
            row = table.row(f"top_edges_{steps}")
            assert row.search == {
                "estimator.epsilon": {"distribution": "choice", "values": [1.0, 0.1, 0.01, 0.001, 0.0001]}
            }
            task = assemble(compose("config", [*table.overrides, *row.overrides, "estimator.epsilon=0.1"]))
            assert isinstance(task.estimator, SST)
            assert (task.estimator.backward_by, task.estimator.epsilon) == ("finite_difference", 0.1)
            assert task.estimator.step == "gradient"


def test_kl_of_undirected_edges_counts_both_directions(root: Path, tmp_path: Path) -> None:
    both = make_task(root, tmp_path)
    once = make_task(root, tmp_path, "task.both_directions=false")
    directed = make_task(root, tmp_path, "structure=independent_directed")
    assert (both.kl_count, once.kl_count, directed.kl_count) == (2, 1, 1)
    for whole in ("reinforce_plus", "sum_and_sample", "topk_sparsemax", "sparsemap", "marginal", "identity_st"):
        assert make_task(root, tmp_path, f"estimator={whole}").kl_count == 1
    edges = "structure=independent_undirected"
    assert make_task(root, tmp_path, edges, "estimator=gumbel_softmax").kl_count == 1
    assert make_task(root, tmp_path, "estimator=reinforce").kl_count == 2
    both.prepare_data()
    batch = next(iter(both.batches("train")))
    both.eval()
    assert both.encoder is not None
    with torch.no_grad():
        scores, _ = both.encoder(batch["positions"])
        theta = (scores + scores.mT) / 2
        off_diagonal = ~torch.eye(10, dtype=torch.bool)
        expected = (theta + torch.exp(-theta) - 1)[:, off_diagonal].sum(1).mean() / 10
        torch.testing.assert_close(both.step(batch).metrics["kl"], expected, rtol=1e-4, atol=1e-5)


def test_structures_that_the_graphs_cannot_hold(root: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="KSubset has no vertex over graphs of 10 vertices"):
        make_task(root, tmp_path, "structure=top_edges", "structure.k=46")


def test_a_graph_without_noise_is_a_point_mass(root: Path, tmp_path: Path) -> None:
    task = make_task(root, tmp_path, "estimator=identity_st")
    task.prepare_data()
    kl = task.step(next(iter(task.batches("train")))).metrics["kl"]
    torch.testing.assert_close(kl, torch.tensor(8 * math.log(10) / 10))  # 10^8 trees over 10 nodes


def test_the_true_tree_as_the_graph(root: Path, tmp_path: Path) -> None:
    task = make_task(root, tmp_path, "structure=ground_truth")
    task.prepare_data()
    out = task.step(next(iter(task.batches("train"))))
    out.loss.backward()
    assert out.metrics["elbo"] == -out.loss.detach()
    assert task.data.split("test")["positions"].shape == (16, 10, 10, 2)
    options = {"optimizer": torch.optim.Adam, "data": task.data, "estimator": None, "batch_size": 16}
    with pytest.raises(ValueError, match="needs a structure over the edges"):
        GraphLayout(structure=NoStructure(), **options)
    with pytest.raises(ValueError, match="teacher_forcing"):
        GraphLayout(structure=GroundTruth(), teacher_forcing=0, **options)


@pytest.mark.parametrize("structure", ["spanning_tree", "ground_truth"])
def test_fit_test_and_pictures(root: Path, tmp_path: Path, structure: str) -> None:
    task = make_task(root, tmp_path, f"structure={structure}")
    trainer = quiet_trainer(max_steps=2)
    trainer.fit(task)
    (metrics,) = trainer.test(task, verbose=False)
    assert metrics["test/elbo"] < 0
    if structure == "spanning_tree":
        assert 0 <= metrics["test/edge_precision"] <= 1
        assert "test/complement_edge_precision" not in metrics
    task.eval()
    with torch.no_grad():
        pictures = task.pictures(tmp_path)
    assert all(p.stat().st_size > 5000 for p in pictures)
    assert len(pictures) == (2 if structure == "spanning_tree" else 1)


def test_settings_of_a_row_come_with_its_parts(root: Path, tmp_path: Path) -> None:
    for name in ("sst", "sst_st", "sst_gaussian"):  # scores plus noise
        tree = make_task(root, tmp_path, f"estimator={name}").estimator
        assert (tree.temperature, tree.clip_range) == (5.0, 15.0), name
    assert make_task(root, tmp_path, "structure=top_edges").estimator.temperature == 5.0
    assert make_task(root, tmp_path, "estimator.temperature=2").estimator.temperature == 2
    assert isinstance(make_task(root, tmp_path, "estimator=reinforce").estimator.action, UtilitiesAction)
    directed = "structure=independent_directed"
    reinforce = make_task(root, tmp_path, directed, "estimator=reinforce").estimator
    assert isinstance(reinforce.action, VertexAction)
    assert isinstance(reinforce.baseline, ElboAverage)
    assert type(make_task(root, tmp_path, directed).estimator.utility).__name__ == "Logistic"
