"""The published tables, as data: what each column shows and what the papers report."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Column:
    """A metric in a table.

    Attributes:
        metric: as logged.
        title: of the column.
        scale: what the metric is multiplied by, e.g. 100 for percentages.
        digits: after the point.
    """

    metric: str
    title: str
    scale: float = 1.0
    digits: int = 1


@dataclass(frozen=True)
class Table:
    """How runs of a task are shown.

    Attributes:
        columns: left to right.
        source: where the published numbers stand.
        published: (structure, estimator) -> one entry a column, None where nothing is reported.
        selected_by: a metric, the higher the better, by which the papers select one of several runs; cells then also
            show the selected run.
    """

    columns: tuple[Column, ...]
    source: str = ""
    published: dict[tuple[str, str], tuple[str | None, ...]] = field(default_factory=dict)
    selected_by: str | None = None


TABLES: dict[str, Table] = {
    "listops": Table(
        (
            Column("test/accuracy", "Task accuracy (%)", 100),
            Column("test/precision", "Edge precision (%)", 100),
            Column("test/recall", "Edge recall (%)", 100),
        ),
        "Paulus et al. 2020, Table 2; Struminsky et al. 2021, Table 3",
        {
            ("none", "none"): ("92.1 ± 0.2", None, None),
            ("independent_undirected", "sst"): ("89.4 ± 0.6", "20.1 ± 2.1", "45.4 ± 6.5"),
            ("spanning_tree", "sst"): ("91.2 ± 1.8", "33.1 ± 2.9", "47.9 ± 5.2"),
            ("independent_directed", "sst"): ("90.1 ± 0.5", "13.0 ± 2.0", "56.4 ± 6.7"),
            ("arborescence", "sst"): ("95.0 ± 3.0", "75.5 ± 7.0", "71.9 ± 12.4"),
            ("arborescence", "e_reinforce_plus"): ("60.25 ± 2.29", "40.87 ± 6.90", "40.74 ± 6.93"),
            ("arborescence", "t_reinforce_plus"): ("87.34 ± 3.00", "77.93 ± 7.36", "61.10 ± 14.11"),
            ("arborescence", "relax"): ("79.60 ± 9.36", "54.73 ± 17.48", "53.61 ± 17.14"),
            ("ground_truth", "none"): ("98.1 ± 0.1", "100", "100"),
        },
    ),
    "graph_layout": Table(
        (
            Column("test/elbo", "ELBO", 1, 0),
            Column("test/edge_precision", "Edge precision (%)", 100, 0),
            Column("test/edge_recall", "Edge recall (%)", 100, 0),
        ),
        "Paulus et al. 2020, Table 1, T = 10; Struminsky et al. 2021, Table 2 (means)",
        {
            ("independent_directed", "sst"): ("-1370 ± 20", "48 ± 2", "93 ± 1"),
            ("top_edges", "sst"): ("-2100 ± 20", "41 ± 1", "41 ± 1"),
            ("spanning_tree", "sst"): ("-1080 ± 110", "91 ± 3", "91 ± 3"),
            ("spanning_tree", "t_reinforce_plus"): ("-1582.72 ± 571.18", "70 ± 31", "86 ± 8"),
            ("spanning_tree", "relax"): ("-2079.18 ± 569.49", "43 ± 31", "81 ± 6"),
        },
        selected_by="val/elbo",
    ),
    "bit_vector_vae": Table(
        (
            Column("test/distortion", "Distortion (nats)", 1, 0),
            Column("test/rate", "Rate (nats)", 1, 2),
            Column("test/bits_per_dim", "Bits/dim", 1, 3),
            Column("test/decoder_calls", "Decoder calls", 1, 1),
        ),
        "Correia et al. 2020, Figures 2 and 3 show curves, not numbers",
    ),
}
