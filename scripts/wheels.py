"""Wheels for a GPU machine without a network that already has torch and Lightning: ``make wheels``,
see docs/gpu.md.

Downloads what this project and its tests need beyond those two and what these need, in the versions
of ``constraints.txt``, for another Python.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
THERE = ("torch", "pytorch-lightning")
TESTS = ("pytest", "pytest-timeout", "pytest-xdist", "setuptools")
#: Pure Python, published as source only: its wheel is built here.
SOURCE = ("antlr4-python3-runtime",)


def needed(name: str, environment: dict[str, str], found: set[str]) -> set[str]:
    """``found`` with a package and what it needs, by the metadata of what is installed here."""
    name = canonicalize_name(name)
    if name in found:
        return found
    try:
        requirements = metadata.requires(name) or []
    except metadata.PackageNotFoundError:  # of another system, or another Python
        return found
    found.add(name)
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            needed(requirement.name, environment, found)
    return found


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--platforms", nargs="+", default=["manylinux_2_28_x86_64"])
    parser.add_argument("--into", type=Path, default=ROOT / "wheels")
    parser.add_argument("--list", action="store_true", help="print their names and versions, download nothing")
    options = parser.parse_args()
    environment = {"extra": "", "python_version": options.python, "platform_machine": "x86_64", "sys_platform": "linux"}
    wanted: set[str] = set()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own = project["dependencies"] + project["optional-dependencies"]["experiments"]
    for name in (*(Requirement(line).name for line in own), *TESTS):
        needed(name, environment, wanted)
    for name in THERE:
        wanted -= needed(name, environment, set()) - set(TESTS)
    pins = {name: f"{name}=={metadata.version(name)}" for name in sorted(wanted)}
    if options.list:
        print("\n".join(pins.values()))
        return 0
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = [pins.pop(name) for name in SOURCE]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(options.into), *built], check=True)
    platforms = [f"--platform={platform}" for platform in options.platforms]
    there = ["--only-binary=:all:", "--python-version", options.python, "--implementation", "cp", *platforms]
    subprocess.run([*pip, "download", "--no-deps", "--dest", str(options.into), *there, *pins.values()], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
