"""Print the table of finished runs, and put it into a document.

``structgrad-report results/listops_quick --into README.md``
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from structgrad.experiments.runs import load
from structgrad.experiments.tables import caption, insert, table


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Print the table of finished runs")
    parser.add_argument("folder", type=Path, help="summaries (results/...) or run folders (runs/...)")
    parser.add_argument("--into", type=Path, help="replace the table of that folder's name in this document")
    arguments = parser.parse_args()
    try:
        summaries = load(arguments.folder)
        text = f"{table(summaries)}\n\n{caption(summaries)}"
        print(text)
        if arguments.into:
            insert(arguments.into, arguments.folder.name, text)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
