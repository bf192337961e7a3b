"""The results that the repository keeps."""

from __future__ import annotations

import re
from pathlib import Path

from structgrad.experiments import markdown, reproduction, tables
from structgrad.experiments.report import build
from structgrad.experiments.runs import of_sweeps


def test_results_name_no_place_of_a_machine(root: Path) -> None:
    """Absolute paths of Unix and Windows, quoted as JSON does."""
    place = re.compile(r'"(?:/|~|file:|[A-Za-z]:\\)[^"]*"')
    found = {str(file): place.findall(file.read_text()) for file in sorted((root / "results").glob("**/*.json"))}
    assert found
    assert not {name: places for name, places in found.items() if places}


def test_the_pages_have_the_tables_of_the_results(root: Path, tmp_path: Path) -> None:
    """Written by ``report.py --into`` and ``scripts/reproduce.py --only-page``, not by hand."""
    results, known = root / "results", root / "configs" / "table"
    reports = {
        name: build(table, of_sweeps(results, table.folder(table.budget)), table.budget)
        for name in tables.names(known)
        for table in [tables.load(name, known)]
    }
    shown = set()
    for page in sorted((root / "docs").glob("**/*.md")):
        for name in set(re.findall(r"<!-- table:(\w+) -->", page.read_text())) & set(reports):
            again = tmp_path / page.name
            again.write_text(page.read_text())
            markdown.insert(again, name, markdown.document(reports[name], with_missing=False))
            assert again.read_text() == page.read_text(), f"python report.py table={name} --into {page}"
            shown.add(name)
    made = [report for report in reports.values() if report.is_reproduction]
    page = root / "docs" / "reproduction.md"
    assert page.read_text() == reproduction.document(made, "images/reproduction.png"), "reproduce.py --only-page"
    run = {name for name, report in reports.items() if report.runs}
    assert run <= shown | {"toy"}, "a page needs its place; toy problems are shown as a picture"
