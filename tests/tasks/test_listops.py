"""The ListOps networks, metrics and task."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import get_args

import matplotlib.image
import pytest
import torch
from hydra import compose, initialize_config_dir

from structgrad.estimators import SST, Deterministic, Estimator, SurrogateGradient
from structgrad.estimators.utilities import Gumbel
from structgrad.experiments import tables
from structgrad.structures import (
    Arborescence,
    GroundTruth,
    KSubset,
    NoStructure,
    OneHot,
    ProjectiveTree,
    SpanningTree,
    Subset,
)
from structgrad.structures.base import Structure
from structgrad.tasks.listops import ListOps, ListOpsData
from structgrad.tasks.listops.data import CLOSE, PAD, Expressions, generate, parse
from structgrad.tasks.listops.model import DropoutPer, EdgeEncoder, Edges, GraphNetwork, LSTMClassifier, Update
from structgrad.tasks.listops.task import edge_metrics, true_edges
from structgrad.training.run import assemble
from tests.tasks.given import SURROGATE, Given, weighted_sums
from tests.tasks.trainers import quiet_trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ListOpsData:
    cache = tmp_path_factory.mktemp("cache")
    return ListOpsData(cache, train=200, val=40, test=40, length=(4, 14), depth=(1, 2), arguments=(2, 5))


@pytest.fixture(scope="module")
def expressions(data: ListOpsData) -> Expressions:
    return generate(data, progress=False)["val"]


def make(structure: Structure, data: ListOpsData, estimator: Estimator | None = None, **options: object) -> ListOps:
    if estimator is None and structure.is_latent:
        estimator = SST(structure, temperature=1.0)
    optimizer = partial(torch.optim.AdamW, lr=3e-3)
    return ListOps(
        structure=structure,
        estimator=estimator,
        optimizer=optimizer,
        data=data,
        batch_size=20,
        hidden=16,
        message_steps=2,
        **options,  # type: ignore[arg-type]
    )


def test_structures_that_the_shortest_expression_cannot_hold(data: ListOpsData) -> None:
    make(KSubset(6, "undirected"), data)  # 4 tokens: 6 pairs
    with pytest.raises(ValueError, match=r"KSubset has no vertex over expressions of 4 tokens: .* have fewer"):
        make(KSubset(7, "undirected"), data)


@pytest.mark.parametrize("structure", ["arborescence", "spanning_tree", "projective_tree"])
@pytest.mark.parametrize("estimator", ["sst", "sst_gaussian", "sst_st"])
def test_scores_of_all_trees_are_clipped(structure: str, estimator: str, root: Path) -> None:
    """Paulus et al. (2020), D.2, whatever the utilities, as long as they are scores plus noise."""
    with initialize_config_dir(str(root / "configs"), version_base="1.3"):
        task = assemble(compose("config", ["task=listops", f"structure={structure}", f"estimator={estimator}"]))
    assert isinstance(task.estimator, SST)
    assert task.estimator.clip_range == 15


def test_a_weight_needs_a_divergence(data: ListOpsData) -> None:
    data.prepare()
    tree = Arborescence()
    with pytest.raises(ValueError, match="kl_weight weighs a KL"):
        make(tree, data, SurrogateGradient(tree), kl_weight=0.1)
    with pytest.raises(ValueError, match="kl_weight weighs a KL"):
        make(NoStructure(), data, kl_weight=0.1)
    task = make(tree, data, Deterministic(tree), kl_weight=0.1)
    batch = next(iter(task.batches("val")))
    for mode in (True, False):
        assert task.train(mode).step(batch).loss.isfinite()


def test_few_lengths_change_no_loss(data: ListOpsData) -> None:
    data.prepare()
    for structure in (NoStructure(), GroundTruth(), Arborescence()):
        estimator = Deterministic(structure) if structure.is_latent else None
        task = make(structure, data, estimator, dropout=0.0).double()
        cut = list(task.batches("train"))
        task.compiled_step = task.step
        few = list(task.batches("train"))
        lengths = {batch["tokens"].shape[1] for batch in few}
        assert lengths <= {3, 6, 9, 12, 14}
        assert any(a["tokens"].shape != b["tokens"].shape for a, b in zip(cut, few, strict=True))
        for batch, padded in zip(cut, few, strict=True):
            task.zero_grad()
            results = []
            for b in (batch, padded):
                loss = task.step(b).loss
                results.append([loss, *torch.autograd.grad(loss, list(task.parameters()), allow_unused=True)])
            torch.testing.assert_close(*results)


def two_expressions() -> dict[str, torch.Tensor]:
    """A batch of eight and four tokens. Values are set by the tests."""
    rows = [parse(text.split()) for text in ("[MAX 3 [MIN 8 2 ] 4 ]", "[MIN 5 7 ]")]
    tokens, parents = (torch.full((2, 8), empty) for empty in (PAD, -1))
    for row, (own, above, *_) in enumerate(rows):
        tokens[row, : len(own)], parents[row, : len(own)] = torch.tensor(own), torch.tensor(above)
    return {"tokens": tokens, "parents": parents, "values": torch.zeros(2, dtype=torch.int64)}


def logits_by_hand(network: GraphNetwork, tokens: torch.Tensor, graph: torch.Tensor) -> torch.Tensor:
    """Two steps in which token i hears from j with weight x[i, j], one token after the other."""
    n = int((tokens != PAD).sum())
    state = network.embedding(tokens[:n])
    for _ in range(2):
        heard = []
        for i in range(n):
            messages = [network.message((network.receive(state[i]) + network.send(state[j])).relu()) for j in range(n)]
            heard.append(torch.stack([graph[i, j] * message.relu() for j, message in enumerate(messages)]).sum(0))
        sums = torch.stack(heard)
        state = state + sums if network.update is None else network.update(sums, state)
    logits: torch.Tensor = network.classify(state[0])
    return logits


@pytest.mark.parametrize("update", get_args(Update))
@pytest.mark.parametrize("training", [True, False])
def test_loss_and_metrics_of_given_graphs_by_hand(data: ListOpsData, training: bool, update: Update) -> None:
    """Two graphs for each of two expressions, in mixed order: relaxed ones in training, otherwise hard ones."""
    torch.manual_seed(0)
    batch, rows, weights = two_expressions(), [1, 0, 1, 0], torch.tensor([0.3, 0.6, 0.7, 0.4]).double()
    exist = (batch["tokens"] != PAD)[rows]
    vertices = torch.rand(4, 8, 8, dtype=torch.float64) * exist[:, None] * exist[:, :, None] * (1 - torch.eye(8))
    if not training:
        vertices = vertices.round()
    kl, tree = torch.tensor([2.0, 7.0]).double(), Arborescence()
    estimator = Given(tree, vertices.requires_grad_(training), torch.tensor(rows), weights, kl)
    task = make(tree, data, estimator, dropout=0.0, update=update, kl_weight=0.1).double().train(training)
    logits = [logits_by_hand(task.network, batch["tokens"][row], x) for row, x in zip(rows, vertices, strict=True)]
    # The last bias makes the two graphs of the first expression give two answers, and both are values.
    last, shift = task.network.classify[-1], (logits[1] + logits[3]).detach() / 2
    assert isinstance(last, torch.nn.Linear)
    last.bias.data -= shift
    logits = [each - shift for each in logits]
    answers = [int(each.argmax()) for each in logits]
    assert answers[1] != answers[3]
    batch["values"] = torch.tensor([answers[1], answers[3]])
    right = [float(answer == batch["values"][row]) for row, answer in zip(rows, answers, strict=True)]
    out = task.step(batch)

    entropies = [-float(each.log_softmax(0)[batch["values"][row]]) for row, each in zip(rows, logits, strict=True)]
    entropy = weighted_sums(estimator.rows, entropies, weights)
    expected = (SURROGATE if training else 1) * entropy.mean() + 0.1 * kl.mean()
    torch.testing.assert_close(out.loss.detach(), expected)
    precision, recall = [], []
    for row, x in zip(rows, vertices.detach(), strict=True):
        words = [i for i in range(8) if batch["tokens"][row, i] not in (PAD, CLOSE)]
        parents = batch["parents"][row].tolist()
        hits = sum(float(x[parents[j], j]) for j in words if parents[j] >= 0)
        precision.append(hits / sum(float(x[i, j]) for i in words for j in words))
        recall.append(hits / (len(words) - 1))
    values = {name: float(value) for name, value in out.metrics.items() if isinstance(value, torch.Tensor)}
    assert values["cross_entropy"] == pytest.approx(float(entropy.mean()))
    assert values["accuracy"] == pytest.approx(float(weighted_sums(estimator.rows, right, weights).mean()))
    assert values["precision"] == pytest.approx(float(weighted_sums(estimator.rows, precision, weights).mean()))
    assert values["recall"] == pytest.approx(float(weighted_sums(estimator.rows, recall, weights).mean()))
    assert estimator.kl_weight == 0.1


@pytest.mark.parametrize("update", get_args(Update))
def test_loss_and_accuracy_without_a_latent_graph_by_hand(data: ListOpsData, update: Update) -> None:
    batch = two_expressions()
    torch.manual_seed(0)
    for structure in (GroundTruth(), NoStructure()):
        task = make(structure, data, dropout=0.0, update=update).double()
        logits = []
        for tokens, parents in zip(batch["tokens"], batch["parents"].tolist(), strict=True):
            graph = torch.zeros(8, 8, dtype=torch.float64)
            for operand, operator in enumerate(parents):
                if operator >= 0:
                    graph[operator, operand] = 1
            given = structure.is_given
            logits.append(logits_by_hand(task.network, tokens, graph) if given else task.baseline(tokens[None])[0])
        answers = [int(each.argmax()) for each in logits]
        batch["values"] = torch.tensor([answers[0], (answers[1] + 1) % 10])  # right, wrong
        out = task.step(batch)
        entropies = [-each.log_softmax(0)[value] for each, value in zip(logits, batch["values"], strict=True)]
        torch.testing.assert_close(out.loss, torch.stack(entropies).mean())
        assert out.metrics["accuracy"] == 0.5


def test_a_graph_without_noise_is_a_point_mass(data: ListOpsData) -> None:
    """n^(n - 2) trees over n tokens have the first one as their root."""
    task = make(Arborescence(), data, Deterministic(Arborescence()), kl_weight=0.1).double().eval()
    out = task.step(two_expressions())
    entropy = out.metrics["cross_entropy"]
    assert isinstance(entropy, torch.Tensor)
    expected = 0.1 * (6 * math.log(8) + 2 * math.log(4)) / 2
    assert float(out.loss - entropy) == pytest.approx(expected)


def test_dropout_options_reach_the_networks(data: ListOpsData) -> None:
    task = make(Arborescence(), data, dropout=0.4, dropout_per="graph", test_dropout=True)
    network = task.network
    assert (network.dropout, network.dropout_per, network.test_dropout) == (0.4, "graph", True)
    assert task.encoder.dropout.p == 0.4


def test_scores_are_products_of_heads_and_modifiers() -> None:
    """``scores[i, j]`` of the edge i -> j is <head_i, modifier_j>; the summary is the last modifier."""
    torch.manual_seed(0)
    encoder = EdgeEncoder(8, 0.1).double().eval()
    tokens = torch.tensor([[11, 3, 4, 14], [12, 5, 14, PAD]])
    scores, summary = encoder(tokens)
    for row, n in enumerate((4, 3)):
        embedded = encoder.embedding(tokens[row, :n])
        head, modifier = encoder.head(embedded)[0], encoder.modifier(embedded)[0]
        expected = [[(head[i] * modifier[j]).sum() for j in range(n)] for i in range(n)]
        torch.testing.assert_close(scores[row, :n, :n], torch.stack([torch.stack(each) for each in expected]))
        torch.testing.assert_close(summary[row], modifier[-1])
    # In training, heads and modifiers lose some of their units.
    embedded = encoder.embedding(tokens[:1])
    outputs = [lstm(embedded)[0] for lstm in (encoder.head, encoder.modifier)]
    torch.manual_seed(1)
    head, modifier = (torch.nn.functional.dropout(each, 0.1) for each in outputs)
    assert not torch.equal(head, outputs[0])
    torch.manual_seed(1)
    torch.testing.assert_close(encoder.train()(tokens[:1])[0], head @ modifier.mT)


def adjacency(parents: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(parents + 1, parents.shape[1] + 1)[..., 1:].transpose(1, 2).to(torch.float64)


def test_scores_do_not_see_the_future_or_padding() -> None:
    encoder = EdgeEncoder(8, 0.1).double().eval()
    tokens = torch.tensor([[11, 3, 4, 14], [12, 5, 14, PAD]])
    scores, summary = encoder(tokens)
    alone, alone_summary = encoder(tokens[1:, :3])
    torch.testing.assert_close(scores[1, :3, :3], alone[0])
    torch.testing.assert_close(summary[1], alone_summary[0])
    assert scores.shape == (2, 4, 4)
    assert summary.shape == (2, 8)


def test_messages_over_hard_edges_and_over_all_pairs_agree(
    expressions: Expressions, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = GraphNetwork(8, 3, 0.0).double()
    edges = true_edges(expressions.parents)
    dense = adjacency(expressions.parents)
    results = []
    for graphs, pairs in ((edges, 1), (dense, 10**9), (dense, 500)):
        monkeypatch.setattr("structgrad.tasks.listops.messages._PAIRS", pairs)
        network.zero_grad()
        logits = network(expressions.tokens, graphs)
        torch.nn.functional.cross_entropy(logits, expressions.values).backward()
        results.append([logits.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)])
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("update", get_args(Update))
@pytest.mark.parametrize("steps", [1, 3])
def test_packed_graphs_are_padded_ones(expressions: Expressions, steps: int, update: Update) -> None:
    """Soft edges, dropout, and weights of padding that are no numbers, which nobody looks at."""
    torch.manual_seed(0)
    network = GraphNetwork(8, steps, 0.3, update=update, dropout_per="graph").double()
    tokens = expressions.tokens
    exist = tokens != PAD
    soft = torch.rand(*tokens.shape, tokens.shape[1], dtype=torch.float64)
    results = []
    for forward, beyond in ((network._padded, 0.0), (network._packed, torch.nan)):
        edges = soft.masked_fill(~(exist[:, None] & exist[:, :, None]), beyond).requires_grad_()
        torch.manual_seed(1)  # of the dropout
        loss = torch.nn.functional.cross_entropy(forward(tokens, edges), expressions.values)
        gradients = torch.autograd.grad(loss, [edges, *network.parameters()])
        results.append(
            [loss.detach(), gradients[0].masked_fill(~exist[:, None] | ~exist[:, :, None], 0), *gradients[1:]]
        )
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_answer_flows_from_operands_to_the_first_token() -> None:
    tokens, parents, _, depth = parse(["[MAX", "3", "[MIN", "8", "2", "]", "4", "]"])
    assert depth == 2
    network = GraphNetwork(8, 2, 0.0).double().eval()
    before = torch.tensor([tokens])
    for position, heard in ((1, True), (4, True), (5, True)):  # an operator hears its closing bracket, too
        after = before.clone()
        after[0, position] = 7
        edges = true_edges(torch.tensor([parents]))
        assert torch.equal(network(before, edges), network(after, edges)) != heard
    longer = torch.cat([before, torch.tensor([[7]])], 1)  # a token without an edge
    assert torch.equal(network(before, edges), network(longer, edges))
    # Two operators deep, one step of messages does not reach.
    network.steps = 1
    after = before.clone()
    after[0, 4] = 7
    assert torch.equal(network(before, edges), network(after, edges))


def test_messages_are_added_to_a_node() -> None:
    """The sum over operands and closing bracket of relu(W relu(A r + B s + b) + c), in one step."""
    tokens, parents, *_ = parse(["[MAX", "3", "8", "]"])
    network = GraphNetwork(8, 1, 0.0).double().eval()
    state = network.embedding(torch.tensor(tokens))
    heard = network.message((network.receive(state[:1]) + network.send(state[1:])).relu()).relu().sum(0)
    expected = network.classify(state[0] + heard)
    torch.testing.assert_close(network(torch.tensor([tokens]), true_edges(torch.tensor([parents])))[0], expected)


def test_dropout_keeps_the_mean_of_the_first_layer() -> None:
    torch.manual_seed(0)
    network = GraphNetwork(4, 1, 0.5, dropout_per="graph").double()
    a, b = torch.randn(1, 2, 4, dtype=torch.float64), torch.randn(1, 2, 4, dtype=torch.float64)
    keep = network._keep(torch.ones(1, 1, 4, dtype=torch.float64))
    torch.testing.assert_close(torch.relu(keep * a + keep * b), keep * torch.relu(a + b))
    assert set(keep.flatten().tolist()) <= {0.0, 2.0}


@pytest.mark.parametrize("dropout_per", get_args(DropoutPer))
def test_dropout_acts_in_training_and_if_asked_in_evaluation(expressions: Expressions, dropout_per: DropoutPer) -> None:
    edges, soft = true_edges(expressions.parents), adjacency(expressions.parents)
    torch.manual_seed(0)
    for test_dropout in (False, True):
        network = GraphNetwork(8, 2, 0.4, dropout_per=dropout_per, test_dropout=test_dropout).double()
        for forward, graphs in ((network, edges), (network, soft), (network._padded, soft)):
            network.train()
            assert not torch.equal(forward(expressions.tokens, graphs), forward(expressions.tokens, graphs))
            network.eval()
            again = torch.equal(forward(expressions.tokens, graphs), forward(expressions.tokens, graphs))
            assert again != test_dropout


def test_units_are_dropped_for_each_message(expressions: Expressions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled messages over all pairs have the mean of those over the true edges, and its spread
    over draws (4 standard errors).
    """
    monkeypatch.setattr("structgrad.tasks.listops.messages._PAIRS", 50)
    torch.manual_seed(0)
    network = GraphNetwork(8, 1, 0.4).double()
    tokens, parents = expressions.tokens[:1], expressions.parents[:1]
    edges, soft = true_edges(parents), adjacency(parents)
    with torch.no_grad():
        drawn = [torch.cat([network(tokens, graphs) for _ in range(2000)]) for graphs in (edges, soft)]
    mean, spread = zip(*((x.mean(0), x.std(0)) for x in drawn), strict=True)
    assert ((mean[0] - mean[1]).abs() < 4 * spread[0] * (2 / 2000) ** 0.5).all()
    torch.testing.assert_close(spread[0], spread[1], rtol=0.1, atol=0)


def test_hard_evaluation_needs_no_memory_for_pairs(expressions: Expressions) -> None:
    network = GraphNetwork(8, 1, 0.0).eval()
    largest = 0

    def watch(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal largest
        largest = max(largest, inputs[0].numel())

    network.message.register_forward_pre_hook(watch)
    edges = true_edges(expressions.parents)
    network(expressions.tokens, edges)
    assert largest == len(edges.graph) * 8


def test_metrics_by_hand() -> None:
    #            0    1 2    3 4 5 6 7
    tokens, parents, *_ = parse(["[MAX", "3", "[MIN", "8", "2", "]", "4", "]"])
    t, p = torch.tensor([tokens]), torch.tensor([parents])
    x = torch.zeros(4, 8, 8)
    for i, j in ((0, 1), (0, 2), (1, 4), (2, 5), (5, 6), (0, 7)):  # two right, one wrong, three that touch brackets
        x[0, i, j] = 1
    x[1] = x[0] + x[0].T
    x[2] = 0.25
    precision, recall = edge_metrics(x, torch.zeros(4, dtype=torch.int64), t, p)
    torch.testing.assert_close(precision, torch.tensor([2 / 3, 1 / 3, 5 / 36, 0.0]))
    torch.testing.assert_close(recall, torch.tensor([2 / 5, 2 / 5, 1 / 4, 0.0]))
    perfect = adjacency(p)
    assert [m.tolist() for m in edge_metrics(perfect, torch.tensor([0]), t, p)] == [[1.0], [1.0]]
    single = torch.zeros(1, 1, 1)
    assert [m.tolist() for m in edge_metrics(single, torch.tensor([0]), t[:, 1:2], p[:, :1])] == [[0.0], [0.0]]


def test_metrics_follow_rows(expressions: Expressions) -> None:
    rows = torch.tensor([3, 0, 3, 7])
    x = adjacency(expressions.parents)[rows]
    precision, recall = edge_metrics(x, rows, expressions.tokens, expressions.parents)
    assert precision.tolist() == recall.tolist() == [1.0] * 4


def test_lstm_baseline() -> None:
    network = LSTMClassifier(8).double()
    tokens = torch.tensor([[11, 3, 4, 14, PAD], [12, 5, 6, 7, 14]])
    for expression in (tokens[:1, :4], tokens[1:]):
        state = network.lstm(network.embedding(expression))[1][0][0]  # the last one
        row = network(tokens)[int(len(expression[0]) == 5)]
        torch.testing.assert_close(row, network.classify(network.linear(state))[0])


def test_undirected_edges_weigh_both_directions(data: ListOpsData) -> None:
    """With weights 1 and t, U / t is (forward + noise) / t + backward, as in the authors' code."""
    data.prepare()
    tree, t = SpanningTree(), 4.2
    task = make(tree, data, SST(tree, temperature=t), symmetrize=(1.0, t)).double().eval()
    (batch,) = list(task.batches("val"))[:1]
    scores, _ = task.encoder(batch["tokens"])
    exist = batch["tokens"] != PAD
    torch.manual_seed(0)
    found = task._estimate(batch)[0].vertices
    torch.manual_seed(0)
    noise = Gumbel().sample(torch.zeros_like(scores))
    expected = tree.argmax((scores + noise) / t + scores.transpose(1, 2), exist[:, :, None] & exist[:, None])
    torch.testing.assert_close(found, expected)


def test_weights_of_directions_need_undirected_edges(data: ListOpsData) -> None:
    for structure in (Arborescence(), GroundTruth(), NoStructure()):
        with pytest.raises(ValueError, match=f"symmetrize is about undirected edges, and {structure.name} has none"):
            make(structure, data, symmetrize=(1.0, 2.0))
    with pytest.raises(ValueError, match=r"two weights, of i -> j and j -> i; got \[1.0\]"):
        make(SpanningTree(), data, symmetrize=(1.0,))


def test_the_rows_of_undirected_edges_follow_their_temperature(root: Path) -> None:
    rows = tables.load("paulus_2", root / "configs" / "table").rows
    undirected = [row for row in rows if row.name in ("independent_undirected", "spanning_tree")]
    assert len(undirected) == 2
    for row in undirected:
        with initialize_config_dir(str(root / "configs"), version_base="1.3"):
            config = compose("config", ["task=listops", *row.overrides, "estimator.temperature=0.7"])
        assert list(config.task.symmetrize) == [1, 0.7]


def test_layers_are_those_of_the_authors_code() -> None:
    network = GraphNetwork(60, 5, 0.1)
    first = torch.cat([network.receive.weight, network.send.weight], 1)  # one layer over both ends
    bound = 120**-0.5
    assert 0.99 * bound < first.abs().max() <= bound
    assert network.receive.bias.abs().max() <= bound
    kinds = [type(layer).__name__ for layer in network.classify]
    assert kinds == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]


def test_impossible_combinations(data: ListOpsData) -> None:
    one_hot = OneHot()
    with pytest.raises(ValueError, match="edges of a graph"):
        make(one_hot, data)
    with pytest.raises(ValueError, match="takes no estimator"):
        ListOps(structure=NoStructure(), estimator=SST(one_hot, temperature=1.0), optimizer=torch.optim.SGD, data=data)
    with pytest.raises(ValueError, match="takes an estimator"):
        ListOps(structure=Arborescence(), estimator=None, optimizer=torch.optim.SGD, data=data)


@pytest.mark.parametrize(
    "structure",
    [
        *(NoStructure(), GroundTruth(), Subset("directed"), Subset("undirected")),
        *(Arborescence(), SpanningTree(), ProjectiveTree()),
    ],
    ids=lambda s: f"{s.name}-{s.layout.name}",
)
def test_trains_tests_and_draws(structure: Structure, data: ListOpsData, tmp_path: Path) -> None:
    task = make(structure, data)
    trainer = quiet_trainer(max_steps=4, val_check_interval=2)
    trainer.fit(task)
    seen = set(trainer.callback_metrics)
    (result,) = trainer.test(task, verbose=False)
    assert all(torch.isfinite(p).all() for p in task.parameters())
    names = {"accuracy"} | ({"precision", "recall"} if structure.is_latent else set())
    assert {f"{split}/{name}" for split in ("train", "val") for name in names | {"loss"}} <= seen
    assert {f"test/{name}" for name in names | {"loss"}} <= set(result)
    assert all(0 <= result[f"test/{name}"] <= 1 for name in names)

    pictures = task.pictures(tmp_path / "pictures")
    assert len(pictures) == structure.is_latent
    for picture in pictures:
        assert matplotlib.image.imread(picture).std() > 0.01


def test_published_file_replaces_the_test_set(tmp_path: Path, data: ListOpsData) -> None:
    file = tmp_path / "published.tsv"
    file.write_text("3\t[MAX 3 [MIN 1 2 ] ]\n5\t5\n")
    own = ListOpsData(
        data.cache, train=200, val=40, test=40, length=(4, 14), depth=(1, 2), arguments=(2, 5), test_file=file
    )
    own.prepare()
    task = make(Arborescence(), own).eval()
    (batch,) = task.batches("test")
    assert batch["tokens"].shape == (2, 7)
    out = task.step(batch)
    assert torch.isfinite(out.loss)


def test_learns_with_the_true_parse(data: ListOpsData) -> None:
    torch.manual_seed(0)
    data.prepare()
    task = make(GroundTruth(), data)
    optimizer = task.configure_optimizers()
    losses = []
    for _ in range(8):
        for batch in task.batches("train"):
            loss = task.step(batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_edges_are_a_list() -> None:
    edges = true_edges(torch.tensor([[-1, 0, 0], [-1, 0, -1]]))
    assert isinstance(edges, Edges)
    assert [e.tolist() for e in edges] == [[0, 0, 1], [0, 0, 0], [1, 2, 1]]
