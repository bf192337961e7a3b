"""The documentation site builds without a warning and needs nothing from elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PICTURES = sorted(str(path.relative_to(DOCS)) for kind in ("png", "gif") for path in DOCS.rglob(f"*.{kind}"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="needs the extra `docs`")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


def test_every_page_is_in_the_navigation(site: Path) -> None:
    for source in DOCS.rglob("*.md"):
        page = source.relative_to(DOCS)
        page = page.with_name("index.html") if page.name == "README.md" else page.with_suffix(".html")
        (own,) = re.findall(
            r'<nav class="md-nav md-nav--primary.*?</nav>\s*</div>', (site / page).read_text(), re.DOTALL
        )
        assert 'href="./"' in own or f'href="{page.name}"' in own, page


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        remote = re.findall(r'(?:src|<link[^>]* href)="(?:https?:)?//[^"]*"', page.read_text())
        assert not remote, page


@pytest.mark.parametrize("module", ["structures/matching", "estimators/score_function", "data/batches", "training/run"])
def test_the_reference_has_every_module(site: Path, module: str) -> None:
    assert f"structgrad.{module.replace('/', '.')}" in (site / "reference" / f"{module}.html").read_text()


@pytest.mark.parametrize("picture", PICTURES)
def test_the_gallery_has_every_picture(site: Path, picture: str) -> None:
    assert f'src="{picture}"' in (site / "gallery.html").read_text()


@pytest.mark.parametrize(
    ("package", "kind", "preset"),
    [
        ("structures", "KSubset", "structure=k_subset"),
        ("estimators", "SST", "estimator=sst"),
        ("tasks", "ListOps", "task=listops"),
    ],
)
def test_the_reference_of_a_package_lists_its_classes(site: Path, package: str, kind: str, preset: str) -> None:
    text = (site / "reference" / package / "index.html").read_text()
    (row,) = [row for row in re.findall(r"<tr>.*?</tr>", text, re.DOTALL) if f">{kind}</code></a>" in row]
    assert preset in row
    (target,) = re.findall(r'href="([^"#]+)#', row)
    assert (site / "reference" / package / target).exists()


def test_a_structure_says_its_oracles(site: Path) -> None:
    text = (site / "reference" / "structures" / "arborescence.html").read_text()
    assert re.search(r"<code>Arborescence</code> has the oracles <code>argmax</code>", text)


def test_equations_need_no_script(site: Path) -> None:
    pytest.importorskip("latex2mathml", reason="needs the extra `docs`")
    text = (site / "reference" / "estimators" / "muprop.html").read_text()
    assert "<math" in text
    assert "math::" not in text


def test_search_works_from_the_file_system(site: Path, tmp_path: Path) -> None:
    """Headless Chromium finds pages that a query in the address asks for; the index is a script, not a request."""
    assert (site / "search" / "search_index.js").exists()
    browser = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
    if browser is None:
        pytest.skip("needs Chromium (Debian: chromium)")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    command = [
        browser,
        *options,
        "--virtual-time-budget=15000",
        "--dump-dom",
        f"{(site / 'index.html').as_uri()}?q=sinkhorn",
    ]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert 'class="md-search-result__item"' in page
