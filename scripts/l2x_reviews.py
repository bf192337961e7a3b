"""Put the reviews that finished runs of `task=l2x` explain side by side, e.g. with and without
correlation.

    python scripts/l2x_reviews.py runs/l2x/k_subset-... runs/l2x/correlated_k_subset-... --output docs/images/l2x

writes `docs/images/l2x.html`, a page that needs no other file, and `docs/images/l2x.png`. The runs
must be of the same data; their columns are named by structure and estimator.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from structgrad.tasks.l2x.pictures import Explanation, draw, load, write_page


def columns(runs: list[Path]) -> tuple[dict[str, list[Explanation]], str]:
    """Title of each run -> its explanations; and the name of the data.

    Raises:
        FileNotFoundError: for a folder that is no finished run of the task.
        ValueError: if two runs would have one title.
    """
    found: dict[str, list[Explanation]] = {}
    data = ""
    for run in runs:
        for file in (run / "summary.json", run / "pictures" / "reviews.json"):
            if not file.is_file():
                raise FileNotFoundError(f"{run} is no finished run of task=l2x: there is no {file.relative_to(run)}")
        summary = json.loads((run / "summary.json").read_text())
        words = summary["config"]["structure"]["k"]
        title = f"{summary['structure']}, {summary['estimator']}, k = {words}, seed {summary['seed']}"
        if title in found:
            raise ValueError(f"two runs are {title}")
        found[title] = load(run / "pictures" / "reviews.json")
        data = summary["data"]
    return found, data


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs, left to right")
    parser.add_argument("--output", type=Path, default=Path("l2x_reviews"), help="name without .html and .png")
    arguments = parser.parse_args()
    try:
        found, data = columns(arguments.runs)
        page = write_page(found, data, arguments.output.with_suffix(".html"))
        picture = draw(found, arguments.output.with_suffix(".png"))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"page:     {page}\npicture:  {picture}")


if __name__ == "__main__":
    main()
