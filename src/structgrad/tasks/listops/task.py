"""The ListOps experiment: parse trees learnt from the values of expressions (Paulus et al. 2020,
8.2 and D.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from structgrad.common.ranges import check_choice, check_count, check_range
from structgrad.data import Batch, Batches
from structgrad.estimators.base import Estimate, Estimator
from structgrad.structures.base import Structure
from structgrad.structures.layout import AVERAGE
from structgrad.tasks.base import OptimizerFactory, Predictions, Split, StepOutput, Task
from structgrad.tasks.listops.data import CLOSE, PAD, ListOpsData, to_text
from structgrad.tasks.listops.model import DropoutPer, EdgeEncoder, Edges, GraphNetwork, LSTMClassifier, Update
from structgrad.tasks.listops.picture import Parse, draw

#: The number of test expressions drawn after the test, and their largest legible length.
_DRAWN, _DRAWN_LENGTH = 4, 24


class ListOps(Task):
    """Evaluates expressions by passing messages over a latent graph between their tokens.

    With ``NoStructure`` an LSTM replaces encoder and graph network; with ``GroundTruth`` the graph
    is the true parse. The parse has edges from operators to operands and closing brackets.

    Precision and recall compare a vertex, as the directed adjacency matrix that it shows, with the
    parse. Edges to and from closing brackets do not count. Both are computed for each expression,
    with 0 / 0 = 0, and averaged over expressions. As in the paper, an undirected edge is shown in
    both directions, so the precision of an undirected structure is at most 1/2. In training they
    are those of the relaxed vertex: ``sum(x * true) / sum(x)`` and ``sum(x * true) / sum(true)``.

    Args:
        structure: a structure over directed or undirected edges, or one of the two stand-ins.
        estimator: over that structure; None for the stand-ins.
        optimizer: a function from parameters to an optimizer.
        data: the expressions.
        batch_size: number of examples in a batch, over all processes.
        hidden: size of embeddings and all layers; also of the context that estimators get.
        message_steps: number of steps of the graph network. If the parse is deeper, the first token
            does not receive all messages.
        update: a node's state becomes its ``"sum"`` with the node's messages, or a ``"gru"``, a
            gated recurrent unit, takes both.
        dropout: dropout probability of the encoder and of messages. The LSTM without a graph has
            none, and ``update``, ``message_steps`` and ``dropout_per`` say nothing about it either.
        dropout_per: dropout of the hidden units of a message is drawn for each ``"pair"`` of nodes,
            or once a step for all pairs of a ``"graph"``, which is faster.
        test_dropout: messages keep their dropout in evaluation, as in the code of Paulus et al.
            (2020).
        symmetrize: weights of the scores of i -> j and j -> i, i < j, in the score of an undirected
            edge.
        kl_weight: weight of the estimator's divergence from its prior, if it has one; the paper has
            none.
        seed: seed of the order of training examples.

    Raises:
        ValueError: for a latent structure that is not over the edges of a graph, or has no vertex
            for the shortest expressions; for a ``kl_weight`` without a KL divergence; for
            ``test_dropout`` without messages; for unequal weights without undirected edges.
    """

    monitor: ClassVar[str] = "val/accuracy"
    mode: ClassVar[Literal["min", "max"]] = "max"
    test_metrics: ClassVar[tuple[str, ...]] = ("accuracy", "cross_entropy", "precision", "recall")
    needs_full_precision = "its messages between tokens are summed by kernels for float32 and float64"
    progress: ClassVar[tuple[str, ...]] = ("accuracy", "precision", "recall")

    def __init__(
        self,
        *,
        structure: Structure,
        estimator: Estimator | None,
        optimizer: OptimizerFactory,
        data: ListOpsData,
        batch_size: int = 100,
        hidden: int = 60,
        message_steps: int = 5,
        update: Update = "sum",
        dropout: float = 0.1,
        dropout_per: DropoutPer = "pair",
        test_dropout: bool = False,
        symmetrize: Sequence[float] = AVERAGE,
        kl_weight: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(structure=structure, estimator=estimator, optimizer=optimizer)
        if (estimator is not None) != structure.is_latent:
            raise ValueError(f"{structure.name} takes {'an' if structure.is_latent else 'no'} estimator")
        if kl_weight and (estimator is None or estimator.kl_over is None):
            raise ValueError("kl_weight weighs a KL divergence, and there is none here; set it to 0")
        check_count("batch_size", batch_size, most=data.train)
        check_count("hidden", hidden)
        check_count("message_steps", message_steps)
        check_choice("update", update, get_args(Update))
        check_range("dropout", dropout, least=0, below=1)
        check_choice("dropout_per", dropout_per, get_args(DropoutPer))
        check_range("kl_weight", kl_weight, least=0)
        if len(symmetrize) != 2:
            raise ValueError(f"symmetrize must be two weights, of i -> j and j -> i; got {list(symmetrize)}")
        forward, backward = symmetrize
        if (forward, backward) != AVERAGE and not (structure.is_latent and structure.layout.is_mirrored):
            raise ValueError(f"symmetrize is about undirected edges, and {structure.name} has none; leave it out")
        self.symmetrize = forward, backward
        self.data, self.batch_size, self.kl_weight, self.seed = data, batch_size, kl_weight, seed
        if not structure.is_latent and not structure.is_given:
            if test_dropout:
                raise ValueError(f"test_dropout is about messages, and {structure.name} has none; leave it out")
            self.baseline = LSTMClassifier(hidden, data.tokens)
            return
        self.network = GraphNetwork(hidden, message_steps, dropout, data.tokens, update, dropout_per, test_dropout)
        if structure.is_latent:
            if not structure.layout.is_graph:
                raise ValueError(f"listops needs a structure over the edges of a graph; got {structure.name}")
            shortest = data.shortest_at(data.depth[0])
            self.check_structure((shortest,) * 2, f"expressions of {shortest} tokens")
            self.encoder = EdgeEncoder(hidden, dropout, data.tokens)

    # --- data -----------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """See :meth:`ListOpsData.prepare`."""
        if self.evaluation is None or self.evaluation.split != "test" or self.source.test_file is None:
            self.source.prepare()

    def batches(self, split: Split) -> Batches:
        """``tokens`` and ``parents`` ``[batch, n]`` and ``values`` ``[batch]``.

        They are cut to the longest expression of the batch; for a compiled step n is one of five
        lengths.
        """
        if self.source.tokens > self.data.tokens:
            raise ValueError("the model was trained without the operator SM; leave it out of task.data.operators")
        few = split == "train" and self.compiled_step is not None
        return Batches(
            self.source.split(split).tensors,
            self.batch_size,
            shuffle=split == "train",
            seed=self.seed,
            collate=partial(_cut_padding, multiple=-(-self.data.length[1] // 5) if few else 1),
        )

    # --- step -----------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> StepOutput:
        """Cross-entropy, accuracy, and the quality of the recovered parse."""
        tokens, values = batch["tokens"], batch["values"]
        if self.estimator is not None:
            return self._latent_step(batch)
        if self.structure.is_given:
            logits = self.network(tokens, true_edges(batch["parents"]))
        else:
            logits = self.baseline(tokens)
        correct = (logits.argmax(1) == values).float()
        told = None if self.training else lambda: _predictions(batch, logits, None)
        return StepOutput(F.cross_entropy(logits, values), len(values), {"accuracy": correct.mean()}, told)

    def _latent_step(self, batch: Batch) -> StepOutput:
        estimate, logits, kl = self._estimate(batch)
        values = batch["values"]
        correct = (logits.argmax(1) == values[estimate.rows]).float()
        with torch.no_grad():
            precision, recall = edge_metrics(estimate.vertices, estimate.rows, batch["tokens"], batch["parents"])
        metrics: dict[str, Tensor | tuple[Tensor, Tensor]] = {
            "accuracy": estimate.mean(correct).mean(),
            "precision": estimate.mean(precision).mean(),
            "recall": estimate.mean(recall).mean(),
            "cross_entropy": estimate.objective.mean(),
            **estimate.metrics,
        }
        loss = estimate.surrogate.mean() if self.training else estimate.objective.mean()
        if kl is not None:
            loss = loss + self.kl_weight * kl.mean()

        def predictions() -> Predictions:
            best = estimate.most_probable()
            return _predictions(batch, logits[best], estimate.vertices[best])

        return StepOutput(loss, len(values), metrics, None if self.training else predictions)

    def _estimate(self, batch: Batch) -> tuple[Estimate, Tensor, Tensor | None]:
        """The estimate of a batch, the logits ``[N, 10]`` of its vertices, detached, and the KL if it has a weight."""
        assert self.estimator is not None
        tokens, values = batch["tokens"], batch["values"]
        evaluated: list[Tensor] = []

        def objective(vertices: Tensor, rows: Tensor) -> Tensor:
            # Hard vertices without a gradient have few edges, and other pairs need no message.
            graphs = vertices if vertices.requires_grad else Edges(*vertices.nonzero(as_tuple=True))
            logits = self.network(tokens[rows], graphs)
            evaluated.append(logits.detach())
            return F.cross_entropy(logits, values[rows], reduction="none")

        scores, summary = self.encoder(tokens)
        scores = self.structure.layout.symmetrize(scores, self.symmetrize)
        exist = tokens != PAD
        mask = exist[:, :, None] & exist[:, None]
        estimate: Estimate = self.estimator(
            scores,
            objective,
            mask=mask,
            context=summary,
            kl_weight=self.kl_weight,
        )
        (logits,) = evaluated
        return estimate, logits, self.latent_kl(estimate, scores, mask) if self.kl_weight else None

    # --- pictures -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def pictures(self, folder: Path) -> list[Path]:
        """Draw a few test expressions with their true and their recovered parse; nothing without a
        latent variable.
        """
        if self.estimator is None:
            return []
        self.eval()
        test = self.data.split("test")
        # Deep ones that are short enough to read, each of another depth if possible.
        legible = (test.lengths <= _DRAWN_LENGTH).nonzero().squeeze(1)
        by_depth = legible[test.depths[legible].argsort(descending=True, stable=True)]
        chosen = by_depth[torch.linspace(0, max(len(by_depth) - 1, 0), min(_DRAWN, len(by_depth))).long()]
        if not len(chosen):
            return []
        batch = _cut_padding({name: tensor[chosen] for name, tensor in test.tensors.items()})
        estimate, logits, _ = self._estimate({name: tensor.to(self.device) for name, tensor in batch.items()})
        parses = []
        for i, best in enumerate(estimate.most_probable().tolist()):
            parses.append(
                Parse(
                    tokens=batch["tokens"][i],
                    parents=batch["parents"][i],
                    vertex=estimate.vertices[best].cpu(),
                    value=int(batch["values"][i]),
                    prediction=int(logits[best].argmax()),
                )
            )
        directed = not self.structure.layout.is_mirrored
        return [draw(parses, folder / "parses.png", directed=directed)]


def _predictions(batch: Batch, logits: Tensor, graphs: Tensor | None) -> Predictions:
    """The predicted value of logits ``[batch, 10]``, and the graphs ``[batch, n, n]`` without
    padding.
    """
    lengths = (batch["tokens"] != PAD).sum(1).tolist()
    cut = None if graphs is None else [graph[:n, :n] for graph, n in zip(graphs, lengths, strict=True)]
    return Predictions(logits.argmax(1), batch["values"], cut, [" ".join(to_text(t)) for t in batch["tokens"].cpu()])


def _cut_padding(batch: Batch, multiple: int = 1) -> Batch:
    """Cut the padding beyond the longest expression, up to a multiple of ``multiple`` tokens."""
    n = -(-int(batch["lengths"].max()) // multiple) * multiple
    return {"tokens": batch["tokens"][:, :n], "parents": batch["parents"][:, :n], "values": batch["values"]}


def true_edges(parents: Tensor) -> Edges:
    """The edges of the true parses with ``parents`` ``[batch, n]`` (-1: none), closing brackets
    included.
    """
    graph, operand = (parents >= 0).nonzero(as_tuple=True)
    return Edges(graph, parents[graph, operand], operand)


def edge_metrics(vertices: Tensor, rows: Tensor, tokens: Tensor, parents: Tensor) -> tuple[Tensor, Tensor]:
    """Precision and recall of edges, without those to and from closing brackets (Paulus et al.
    2020, footnote 7).

    Args:
        vertices: ``[N, n, n]``, hard or relaxed; ``[i, j]`` for i -> j.
        rows: int64 ``[N]``, the expression of each vertex.
        tokens: int64 ``[batch, n]``.
        parents: int64 ``[batch, n]``.

    Returns:
        precision ``[N]`` and recall ``[N]``; 0 if nothing is selected, or nothing can be found.
    """
    counts = ((tokens != PAD) & (tokens != CLOSE))[rows].to(vertices.dtype)
    is_operand = ((parents >= 0) & (tokens != CLOSE))[rows]
    at_parent = vertices.gather(1, parents.clamp_min(0)[rows][:, None]).squeeze(1)
    hits = (at_parent * is_operand).sum(1)
    selected = ((vertices @ counts[:, :, None]).squeeze(2) * counts).sum(1)
    true = is_operand.sum(1)
    return torch.where(selected > 0, hits / selected, 0.0), torch.where(true > 0, hits / true, 0.0)
