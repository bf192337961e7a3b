"""Runs the tutorials, scripts with percent cells in examples/tutorials, and writes pages with their
output and figures.

    python scripts/tutorials.py            tutorials whose script has changed since its page was written
    python scripts/tutorials.py 03 10      these tutorials

The page is docs/tutorials/<script>.md, its figures are in docs/images/tutorials. A cell's title
(`# %% title`) is the caption of its figure. `make docs` calls this.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jupytext
from nbconvert.exporters import MarkdownExporter
from nbconvert.preprocessors import ExecutePreprocessor

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS, PAGES = ROOT / "examples" / "tutorials", ROOT / "docs" / "tutorials"
FIGURES = ROOT / "docs" / "images" / "tutorials"
#: Seconds for a cell; a whole tutorial takes less than two minutes on two idle cores.
LIMIT = 1200


def source(script: Path) -> str:
    """The first line of a page, with the name and the digest of its script."""
    digest = hashlib.sha256(script.read_bytes()).hexdigest()[:12]
    return f"<!-- made by scripts/tutorials.py from examples/tutorials/{script.name}, {digest} -->"


def is_current(script: Path) -> bool:
    """Whether the page was written from this version of the script."""
    page = PAGES / f"{script.stem}.md"
    return page.exists() and page.read_text().splitlines()[0] == source(script)


def joined(outputs: Iterable[Any]) -> list[Any]:
    """The outputs of a cell, with consecutive pieces of its printed text joined."""
    found: list[Any] = []
    for output in outputs:
        if found and output.get("name") == "stdout" == found[-1].get("name"):
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def run(script: Path) -> None:
    """Execute a script and write its page."""
    notebook = jupytext.read(script)
    FIGURES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        ExecutePreprocessor(timeout=LIMIT, kernel_name="python3").preprocess(notebook, {"metadata": {"path": folder}})
        for file in Path(folder).glob("*.gif"):
            shutil.copy(file, FIGURES)
    captions = {}
    for place, cell in enumerate(notebook.cells):
        captions[place] = cell.metadata.get("title", "")
        cell.outputs = joined(output for output in cell.get("outputs", []) if output.get("name") != "stderr")
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                output.data.pop("text/plain", None)
    body, resources = MarkdownExporter().from_notebook_node(notebook)
    for old in FIGURES.glob(f"{script.stem}_*.png"):
        old.unlink()
    for name, content in resources["outputs"].items():
        place, number = re.findall(r"\d+", name)
        figure = f"{script.stem}_{place}_{number}.png"
        (FIGURES / figure).write_bytes(content)
        caption = captions[int(place)]
        body = re.sub(
            rf"!\[[^]]*\]\({re.escape(name)}\)",
            f"![{caption}](../images/tutorials/{figure})\n\n*{caption}.*",
            body,
        )
    note = f"Run it: `python examples/tutorials/{script.name}`."
    title, rest = body.strip().split("\n", 1)
    text = "\n".join(line.rstrip() for line in f"{source(script)}\n{title}\n\n{note}\n{rest}\n".splitlines())
    PAGES.mkdir(exist_ok=True)
    blocks = text.split("```")  # every second one is code, which keeps its empty lines
    blocks[::2] = [re.sub(r"\n{3,}", "\n\n", block) for block in blocks[::2]]
    (PAGES / f"{script.stem}.md").write_text("```".join(blocks).rstrip() + "\n")


def main() -> None:
    """Run the tutorials that are named, or those that have changed."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    wanted = sys.argv[1:]
    for script in sorted(SCRIPTS.glob("*.py")):
        if script.stem[:2] in wanted if wanted else not is_current(script):
            print(script.stem, flush=True)
            run(script)


if __name__ == "__main__":
    main()
