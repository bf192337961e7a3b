"""The graph layout task: a variational auto-encoder whose latent variable is a graph (Paulus et al. 2020, 8.1, D.4)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from structgrad.common.ranges import check_count, check_range
from structgrad.data import Batch, Batches
from structgrad.estimators.base import Estimator
from structgrad.structures.base import Structure
from structgrad.tasks.base import OptimizerFactory, Predictions, Split, StepOutput, Task
from structgrad.tasks.graph_layout.data import GraphLayoutData
from structgrad.tasks.graph_layout.model import Decoder, Encoder
from structgrad.tasks.graph_layout.pictures import draw_graphs, draw_layout
from structgrad.tasks.graph_layout.trajectories import Trajectories


class GraphLayout(Task):
    """Find the tree behind the motion of its vertices, from the motion alone.

    The encoder scores the edges. The decoder predicts every next layout from the present one, by
    messages along the sampled graph. The loss of a graph is the squared error of all predicted
    coordinates over twice the output variance. Its ELBO is minus the loss and the KL. Both are
    divided by the number of vertices.

    The layout of ``structure`` decides whether the graph is directed. Scores of undirected edges
    are averaged over both directions. An estimator's KL counts each undirected edge once. The
    published protocol sums over all directed entries, so it counts each twice
    (``both_directions``). A KL over whole graphs is not such a sum and stays as it is. An estimator
    without KL gets that of a point mass, the logarithm of the number of graphs.

    Edge precision and recall are averages over graphs. The two edge types have no names, so the
    complement of the sampled graph may be the better answer. The one with the higher mean precision
    on the data set is reported, one choice for the whole set (``complement`` says which). They are
    only reported if the edges are known.

    Args:
        structure: over directed or undirected edges, or ``GroundTruth``, which gives the decoder
            the true tree.
        estimator: see :class:`~structgrad.tasks.base.Task`.
        optimizer: see there.
        data: the layouts, or trajectories of your own.
        batch_size: number of graphs in a training batch.
        eval_batch_size: number of graphs in a validation or test batch.
        hidden: number of units of all layers.
        variance: variance of the output, 5e-5 in Kipf et al. (2018).
        teacher_forcing: in training, the decoder gets the true layout again after this many steps.
            In evaluation it gets every one.
        both_directions: count the KL of an undirected edge twice, if the KL is over parts.
        seed: seed of the order of training graphs.

    Raises:
        ValueError: if the structure is not over the edges of a graph, or if the decoder is to be
            given edges that are not known.
    """

    monitor: ClassVar[str] = "val/elbo"
    mode: ClassVar[Literal["min", "max"]] = "max"
    test_metrics: ClassVar[tuple[str, ...]] = (
        "elbo",
        "kl",
        "reconstruction",
        "edge_precision",
        "edge_recall",
        "complement",
    )
    needs_full_precision = "its messages between vertices are summed by kernels for float32 and float64"
    progress: ClassVar[tuple[str, ...]] = ("elbo", "edge_precision")

    def __init__(
        self,
        *,
        structure: Structure,
        estimator: Estimator | None,
        optimizer: OptimizerFactory,
        data: GraphLayoutData | Trajectories,
        batch_size: int = 128,
        eval_batch_size: int = 500,
        hidden: int = 256,
        variance: float = 5e-5,
        teacher_forcing: int = 10,
        both_directions: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(structure=structure, estimator=estimator, optimizer=optimizer)
        if not structure.layout.is_graph:
            raise ValueError(
                f"graph_layout needs a structure over the edges of a graph; {structure.name} has layout "
                f"{structure.layout.name!r}"
            )
        check_count("batch_size", batch_size, most=data.train)
        check_count("eval_batch_size", eval_batch_size)
        check_count("hidden", hidden)
        check_range("variance", variance, above=0)
        check_count("teacher_forcing", teacher_forcing)
        if structure.is_latent:
            self.check_structure((data.vertices,) * 2, f"graphs of {data.vertices} vertices")
        elif not data.has_edges:
            raise ValueError(f"{structure.name} needs the true edges, which {type(data).__name__} does not have")
        self.data = data
        self.batch_size, self.eval_batch_size, self.seed = batch_size, eval_batch_size, seed
        self.variance, self.teacher_forcing = variance, teacher_forcing
        self.require_kl("task graph_layout")
        over_parts = estimator is not None and estimator.kl_over == "parts"
        self.kl_count = 2 if both_directions and over_parts and structure.layout.is_mirrored else 1
        self.encoder = Encoder(data.features * (data.steps or 0), hidden) if estimator is not None else None
        self.decoder = Decoder(hidden, data.features)

    def prepare_data(self) -> None:
        """Generate the layouts, unless they are cached or your own."""
        self.source.prepare()

    def batches(self, split: Split) -> Batches:
        """Positions and, if they are known, true edges."""
        for name in ("steps", "features"):
            size, own = getattr(self.source, name), getattr(self.data, name)
            if size != own:
                raise ValueError(f"the model was made for layouts of {own} {name}; these have {size}")
        return Batches(
            self.source.split(split),
            self.batch_size if split == "train" else self.eval_batch_size,
            shuffle=split == "train",
            seed=self.seed,
        )

    def step(self, batch: Batch) -> StepOutput:
        """The negative ELBO, and how well the edges were found."""
        positions = batch["positions"]
        graphs, n = len(positions), positions.shape[2]
        tree = batch["adjacency"].to(positions) if "adjacency" in batch else None
        if self.encoder is None or self.estimator is None:
            assert tree is not None
            everyone = torch.arange(graphs, device=tree.device)
            loss = self._errors(positions, tree, everyone).mean()
            told = None if self.training else lambda: self._predictions(positions, tree, None)
            return StepOutput(loss, graphs, {"elbo": -loss.detach()}, told)
        scores, features = self.encoder(positions)
        estimate = self.estimator(
            self.structure.layout.symmetrize(scores),
            lambda vertices, rows: self._errors(positions, vertices, rows),
            context=features,
            kl_weight=self.kl_count / n,
        )
        kl = self.kl_count / n * self.latent_kl(estimate, scores)
        metrics = {
            "elbo": -(estimate.objective + kl.detach()).mean(),
            "reconstruction": estimate.objective.mean(),
            "kl": kl.detach().mean(),
            **estimate.metrics,
        }
        if not self.training and tree is not None:
            found = edge_agreement(estimate.vertices, tree[estimate.rows])
            metrics |= {name: estimate.mean(value).mean() for name, value in found.items()}

        def predictions() -> Predictions:
            likely = estimate.most_probable_vertices()
            return self._predictions(positions, likely, likely)

        told = None if self.training else predictions
        return StepOutput((estimate.surrogate + kl).mean(), graphs, metrics, told)

    def _predictions(self, positions: Tensor, graphs: Tensor, latent: Tensor | None) -> Predictions:
        """Predict every next layout from the true present one and a graph."""
        return Predictions(self.decoder(positions, graphs, 1), positions[:, 1:], latent)

    def summarize(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Choose between the sampled graphs and their complements, for the whole data set."""
        means = dict(means)
        complement = {name: means.pop(f"complement_{name}", None) for name in ("edge_precision", "edge_recall")}
        precision, recall = complement["edge_precision"], complement["edge_recall"]
        if precision is None or recall is None:
            return means
        better = precision > means["edge_precision"]
        return means | {
            "edge_precision": torch.where(better, precision, means["edge_precision"]),
            "edge_recall": torch.where(better, recall, means["edge_recall"]),
            "complement": better.to(precision),
        }

    def pictures(self, folder: Path) -> list[Path]:
        """A test graph's layout over time with the edges found in it, and the edges of a few more
        graphs.
        """
        test = self.data.split("test")
        # More graphs than are drawn, to choose between graphs and their complements.
        positions = test["positions"][:200].to(self.device)
        tree = test["adjacency"][:200].to(self.device) if "adjacency" in test else None
        if positions.shape[-1] < 2:
            return []
        if self.encoder is None or self.estimator is None:
            assert tree is not None
            return [draw_layout(positions[0], tree[0], None, folder / "layout.png")]
        scores, _ = self.encoder(positions)
        scores = self.structure.layout.symmetrize(scores)
        found = self.structure.argmax(scores)
        if tree is None:
            return [draw_layout(positions[0], None, found[0], folder / "layout.png")]
        agreement = edge_agreement(found, tree.to(found))
        recovered = "recovered"
        if agreement["complement_edge_precision"].mean() > agreement["edge_precision"].mean():
            found, recovered = complement(found), "complement of recovered"
        return [
            draw_layout(positions[0], tree[0], found[0], folder / "layout.png", recovered),
            draw_graphs(positions[:8, -1], tree[:8], found[:8], folder / "graphs.png", recovered),
        ]

    def _errors(self, positions: Tensor, vertices: Tensor, rows: Tensor) -> Tensor:
        """Negative Gaussian log-likelihood without its constant, divided by the number of vertices: ``[N]``."""
        positions = positions[rows]
        predicted = self.decoder(positions, vertices, self.teacher_forcing if self.training else 1)
        squared = (predicted - positions[:, 1:]).square().sum((1, 2, 3))
        loss: Tensor = squared / (2 * self.variance * positions.shape[2])
        return loss


def complement(graphs: Tensor) -> Tensor:
    """All other edges: ``[*batch, n, n]`` -> ``[*batch, n, n]``, no self-loops."""
    return 1 - graphs - torch.eye(graphs.shape[-1], dtype=graphs.dtype, device=graphs.device)


def edge_agreement(found: Tensor, true: Tensor) -> dict[str, Tensor]:
    """Precision and recall of directed adjacency matrices, and of their complements.

    Args:
        found: ``[N, n, n]``, 0 or 1 with a zero diagonal.
        true: ``[N, n, n]``.

    Returns:
        ``edge_precision``, ``edge_recall``, ``complement_edge_precision``,
        ``complement_edge_recall``: ``[N]`` each. A graph without edges has precision 0.
    """
    out = {}
    for prefix, graphs in (("", found), ("complement_", complement(found))):
        hits = (graphs * true).sum((1, 2))
        out[f"{prefix}edge_precision"] = hits / graphs.sum((1, 2)).clamp_min(1)
        out[f"{prefix}edge_recall"] = hits / true.sum((1, 2)).clamp_min(1)
    return out
