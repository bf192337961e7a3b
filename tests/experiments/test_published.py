"""Every published number, against a second reading of the papers' text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from structgrad.experiments import tables
from structgrad.experiments.tables import Table

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs" / "table"
NUMBER = r"[-−]?\d+(?:\.\d+)?"


def paper(start: str) -> str:
    """The text of a paper, by the beginning of its number; skips where the papers are absent."""
    files = sorted((ROOT.parent / "shared" / "papers").glob(f"{start}_*.txt"))
    if not files:
        pytest.skip("needs the papers' text in ../shared/papers")
    text = files[0].read_text()
    return re.sub(r"</?(?:b|i|math)[^>]*>", "", text).replace("$", "").replace(r"\pm", "±").replace("−", "-")


def part(text: str, start: str, end: str) -> list[str]:
    """The lines of a table."""
    begin = text.index(start)
    return text[begin : text.index(end, begin + len(start))].splitlines()


def numbers(line: str) -> list[tuple[float, float | None]]:
    """``a ± b`` and ``a`` in a line, without references such as [17]."""
    line = re.sub(r"\[\d+\]", "", line)
    found = re.findall(rf"(?<![\w.|])({NUMBER})(?:\s*±\s*({NUMBER}))?(?![\w|])", line)
    return [(float(value), float(error) if error else None) for value, error in found]


def published(table: Table, *rows: str) -> list[tuple[float, float | None]]:
    """The numbers of some rows, left to right."""
    return [table.row(row).published[key] for row in rows for key in table.columns if key in table.row(row).published]


def lines_with(lines: list[str], label: str) -> list[list[tuple[float, float | None]]]:
    """The numbers behind a label, of every line that begins with it."""
    return [
        found for line in lines if line.strip().startswith(label) and (found := numbers(line.strip()[len(label) :]))
    ]


@pytest.mark.parametrize(
    ("name", "source", "start", "end"),
    [
        ("paulus_3", "001", "Table 3 & Figure 5", "Pours a slight"),
        ("paulus_3", "004", "Table 3 & Figure 4", "Pours a slight"),
        ("paulus_4", "004", "Table 4: For", "Table 5: For"),
        ("paulus_5", "004", "Table 5: For", "C Additional"),
        ("paulus_6", "004", "Table 6: For", "Table 7: NVIL"),
    ],
)
def test_learning_to_explain(name: str, source: str, start: str, end: str) -> None:
    table = tables.load(name, FOLDER)
    text = paper(source)
    lines = [re.sub(r"^(Simple|Complex)?\t", "", line) for line in part(text, start, end)]
    assert sum(bool(row.published) for row in table.rows) == 42
    for key in ("l2x", "softsub", "euclidean", "categorical", "binary", "exp_family", "correlated"):
        title = table.row(f"simple_5_{key}").title
        printed = lines_with([line.replace("Top  k", "Top k") for line in lines], title)
        ours = [published(table, *(f"{model}_{k}_{key}" for k in (5, 10, 15))) for model in ("simple", "complex")]
        assert printed == ours, title


@pytest.mark.parametrize(("source", "start"), [("001", "Table 1 & Figure 4"), ("004", "Table 1 & Figure 3")])
def test_graph_layout(source: str, start: str) -> None:
    table = tables.load("paulus_1", FOLDER)
    lines = part(paper(source), start, "Ground Truth")
    for key, label in (
        ("independent_directed", "Indep. Directed Edges"),
        ("top_edges", "E.F. Ent. Top"),
        ("spanning_tree", "Spanning Tree"),
    ):
        (printed,) = [line[-6:] for line in lines_with(lines, label) if len(line) >= 6]
        assert printed == published(table, f"{key}_10", f"{key}_20"), key


@pytest.mark.parametrize(("source", "end"), [("001", "Arborescence* achieved"), ("004", "Table 3 & Figure 4")])
def test_listops(source: str, end: str) -> None:
    table = tables.load("paulus_2", FOLDER)
    lines = [
        line.removeprefix("GNN on latent graph\t").removeprefix("GNN on latent digraph\t")
        for line in part(paper(source), "Table 2: Matching", end)
    ]
    for key, label in {
        "lstm": "LSTM", "independent_undirected": "Indep. Undirected Edges", "spanning_tree": "Spanning Tree",
        "independent_directed": "Indep. Directed Edges", "arborescence_neg_exp": "- Neg. Exp.",
        "arborescence_gaussian": "- Gaussian", "arborescence": "- Gumbel", "ground_truth": "Ground Truth Edges",
    }.items():  # fmt: skip
        assert lines_with(lines, label) == [published(table, key)], key


def test_score_functions_on_graph_layout() -> None:
    table = tables.load("paulus_7", FOLDER)
    lines = part(paper("004"), "Table 7: NVIL", "computing the probability")
    for key, label in (
        ("independent_directed", "Indep. Directed Edges"),
        ("top_edges", "Top |V | - 1"),
        ("spanning_tree", "Spanning Tree"),
    ):
        printed = lines_with(lines, label)
        assert published(table, f"reinforce_{key}", f"nvil_{key}") in printed, key


def test_struminsky_learning_to_explain() -> None:
    table = tables.load("struminsky_1", FOLDER)
    lines = [
        re.sub(r"^(SIMPLE|COMPLEX)?\t", "", line)
        for line in part(paper("003"), "Table 1: Results of k -subset", "5 Applications")
    ]
    assert len(table.rows) == 24
    for key in ("sst", "e_reinforce_plus", "t_reinforce_plus", "relax"):
        label = table.row(f"simple_5_{key}").title
        ours = [published(table, *(f"{model}_{k}_{key}" for k in (5, 10, 15))) for model in ("simple", "complex")]
        assert lines_with([line.replace(" (Our Impl.)", "") for line in lines], label) == ours, key


@pytest.mark.parametrize(
    ("name", "start", "end"),
    [("struminsky_2", "Table 2: Graph", "Table 3: Unsup"), ("struminsky_3", "Table 3: Unsup", "dynamics of")],
)
def test_struminsky_with_the_best_run(name: str, start: str, end: str) -> None:
    table = tables.load(name, FOLDER)
    lines = [line.replace(" (Our Impl.)", "") for line in part(paper("003"), start, end)]
    for row in table.rows:
        assert lines_with(lines, row.title) == [published(table, row.name)], row.name


def test_emergent_communication() -> None:
    table = tables.load("correia_1", FOLDER)
    lines = part(paper("002"), "Table 1: Emergent", "5.3 Bit-Vector")
    for row in table.rows:
        assert [found for found in lines_with(lines, row.title) if len(found) == 2] == [published(table, row.name)], (
            row.name
        )


def test_every_table_with_numbers_is_read_again() -> None:
    """No table gets published numbers without a test above."""
    names = {name for name in tables.names(FOLDER) if any(row.published for row in tables.load(name, FOLDER).rows)}
    assert names == {*(f"paulus_{i}" for i in range(1, 8)), *(f"struminsky_{i}" for i in (1, 2, 3)), "correia_1"}
