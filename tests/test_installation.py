"""An installed package has the library, the commands and the configurations, away from the checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import structgrad
from structgrad.common.installing import install

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMMANDS = sorted(PROJECT["scripts"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout gets no ``build`` folder and lends no stale one."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("src", "configs"):
        shutil.copytree(
            ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    _pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder), str(folder))
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of an environment in somebody's repository: the wheel, and of this environment only the libraries."""
    repository = tmp_path_factory.mktemp("repository")
    author = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    for arguments in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "Theirs"]):
        subprocess.run(["git", *arguments], cwd=repository, check=True)
    folder = repository / "environment"
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    # The editable installation of this environment stays out: its .pth files are not followed from here.
    (site / "libraries.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    _pip(
        "--python",
        str(folder / "bin" / "python"),
        "install",
        "--no-deps",
        "--no-index",
        "--ignore-installed",
        str(wheel),
    )
    return folder / "bin"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the plain package's dependencies and those of the extra ``testing``, no others."""
    folder = tmp_path_factory.mktemp("bare") / "environment"
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in _closure([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["testing"]], set()):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            source = Path(str(distribution.locate_file(top)))
            if source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)
    (site / "structgrad").symlink_to(Path(structgrad.__file__).parent)
    return folder / "bin" / "python"


def _closure(requirements: list[str], found: set[str]) -> set[str]:
    """The packages that these need, and what those need."""
    for requirement in map(Requirement, requirements):
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        _closure(metadata.requires(name) or [], found)
    return found


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def _run(program: Path, *arguments: str, folder: Path, path: str = str(ROOT / "examples" / "own_package")) -> str:
    """The output of the program in an empty folder of a user who has ``mylab`` and no checkout."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("STRUCTGRAD_", "WANDB", "PYTHON"))}
    environment = kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([program, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_library_needs_no_laboratory(bare: Path, tmp_path: Path) -> None:
    """In a bare environment the public rooms can be imported, and the example of the README runs."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    rooms = ("structures", "estimators", "losses", "testing", "diagnose")
    code = "\n".join([*(f"import structgrad.{room}" for room in rooms), example, "import sys; print(*sys.modules)"])
    modules = _run(bare, "-c", code, folder=tmp_path, path="").splitlines()[-1].split()
    laboratory = {"pytorch_lightning", "hydra", "omegaconf", "optuna", "datasets", "tensorboard", "matplotlib", "rich"}
    assert not laboratory & set(modules)
    failed = subprocess.run(
        [bare, "-I", "-c", "import structgrad.commands.train"], cwd=tmp_path, capture_output=True, text=True
    )
    assert failed.returncode == 1
    assert failed.stderr.strip() == f"error: the commands need more than the library: {install('experiments')}"


def test_no_message_recommends_a_name_on_an_index() -> None:
    """The package is on none, and anybody could register the name there."""
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "src").rglob("*.py"), *ROOT.glob("scripts/*")]
    named = re.compile(r"pip install\s+['\"]?structgrad\b")
    assert not [file for file in files if file.is_file() and named.search(file.read_text())]


def test_the_wheel_carries_the_package_and_its_configurations(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"structgrad/{f.relative_to(ROOT)}" for f in (ROOT / "configs").rglob("*.yaml")} <= names
    assert {str(f.relative_to(ROOT / "src")) for f in (ROOT / "src").rglob("*.py")} <= names
    assert "structgrad/py.typed" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_wheel_is_as_an_index_wants_it(wheel: Path) -> None:
    pytest.importorskip("twine", reason="needs the extra `release`")
    from twine.commands.check import check

    assert not check([str(wheel)], strict=True)


def test_placeholders_are_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is named; with all of them replaced nothing is left to say."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from release import reasons

    for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "src" / "structgrad" / "common", tmp_path / "src" / "structgrad" / "common")
    shutil.copy(ROOT / "src" / "structgrad" / "version.py", tmp_path / "src" / "structgrad")
    found = "\n".join(reasons(tmp_path))
    assert all(word in found for word in ("Homepage", "Issues", "Do Not Upload", "date", "installing.py"))
    for name, old, new in (
        ("pyproject.toml", "structgrad.invalid", "structgrad.example.org"),
        ("pyproject.toml", '"Private :: Do Not Upload",', ""),
        ("CHANGELOG.md", "(not yet released)", "(2030-12-31)"),
        ("src/structgrad/common/installing.py", "in a checkout of", "of"),
    ):
        (tmp_path / name).write_text((tmp_path / name).read_text().replace(old, new))
    assert reasons(tmp_path) == []


def test_the_library_is_the_installed_one(installed: Path, tmp_path: Path) -> None:
    where = _run(installed / "python", "-c", "import structgrad; print(structgrad.__file__)", folder=tmp_path)
    assert Path(where).is_relative_to(installed.parent)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_how_to_use_it(installed: Path, tmp_path: Path, command: str) -> None:
    assert command in _run(installed / command, "--help", folder=tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_a_script_of_the_checkout(command: str) -> None:
    script = ROOT / f"{command.removeprefix('structgrad-')}.py"
    module = PROJECT["scripts"][command].split(":")[0]
    assert f"from {module} import main" in script.read_text()


def test_train_report_and_diagnose_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    search = "hydra.searchpath=[pkg://mylab.configs]"
    _run(installed / "structgrad-train", search, "task=find_window", "budget=smoke", "trainer=cpu", folder=tmp_path)
    (summary,) = (tmp_path / "runs").glob("**/summary.json")
    assert json.loads(summary.read_text())["commit"] is None
    shutil.copytree(ROOT / "results" / "listops_quick", tmp_path / "results" / "listops_quick")
    assert "budget is `quick`" in _run(installed / "structgrad-report", "results/listops_quick", folder=tmp_path)
    options = ["structure=one_hot", "estimator=sst", "over=none", "samples=20"]
    assert "OneHot, (4,) scores" in _run(installed / "structgrad-diagnose", *options, folder=tmp_path)


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert str(citation["version"]) == structgrad.__version__
    assert citation["license"] == PROJECT["license"] == "MIT"


def test_the_changelog_has_this_version() -> None:
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert structgrad.__version__ in versions
