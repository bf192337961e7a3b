"""Check that a release is complete. `make publish` asks before anything is uploaded; every reason
against it is a line.

python scripts/release.py
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent


def reasons(root: Path) -> list[str]:
    """The reasons why the files in ``root`` cannot be published."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    (version,) = re.findall(r'^__version__ = "(.+)"$', (root / "src/structgrad/version.py").read_text(), re.MULTILINE)
    found = [
        f"pyproject.toml: the url of {name} is a placeholder: {url}"
        for name, url in project["urls"].items()
        if ".invalid" in url
    ]
    if "Private :: Do Not Upload" in project["classifiers"]:
        found.append("pyproject.toml: the classifier “Private :: Do Not Upload” is to be taken away")
    if str(yaml.safe_load((root / "CITATION.cff").read_text())["version"]) != version:
        found.append(f"CITATION.cff: the version is not {version}")
    heading = re.search(rf"^## {re.escape(version)}(.*)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    if heading is None or not re.search(r"\d{4}-\d{2}-\d{2}", heading[1]):
        found.append(f"CHANGELOG.md: {version} has no heading with a date, ## {version} (2030-12-31)")
    if "in a checkout" in (root / "src/structgrad/common/installing.py").read_text():
        found.append("src/structgrad/common/installing.py: messages still say that the package is on no index")
    return found


def main() -> None:
    """Print them and exit with 1, or say nothing."""
    found = reasons(ROOT)
    if subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout:
        found.append("the checkout has changes that are not committed")
    if found:
        sys.exit("\n".join(["this cannot be published:", *found]))


if __name__ == "__main__":
    main()
