"""One look for all pictures."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from structgrad.common import pictures

ROOT = Path(__file__).resolve().parents[2]
#: Linear RGB as a dichromat sees it (Machado et al. 2009, table 1, severity 1): protanopia and deuteranopia.
SEEN = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of linear RGB, daylight."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.clip(to_xyz @ rgb / np.array([0.9505, 1.0, 1.089]), 1e-4, None))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SEEN)
def test_colour_blind_readers_tell_the_colours_apart(sight: str) -> None:
    """By ten units of CIELAB and more; two to three are just noticed. The colours that matplotlib begins with fail."""

    def seen(colour: str) -> np.ndarray:
        linear = np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)])
        return lab(np.array(SEEN[sight]) @ linear)

    def nearest(colours: tuple[str, ...]) -> float:
        return min(float(np.linalg.norm(seen(a) - seen(b))) for i, a in enumerate(colours) for b in colours[:i])

    assert nearest(pictures.COLOURS) > 10
    assert nearest(tuple(f"tab:{name}" for name in ("blue", "orange", "green", "red", "purple", "brown", "pink"))) < 10


def test_series_differ_without_colours() -> None:
    looks = [pictures.line(i) | pictures.mark(i) for i in range(pictures.MOST)]
    assert len({(look["marker"], look["linestyle"]) for look in looks}) == pictures.MOST
    lines = [pictures.line(i) for i in range(pictures.MOST)]
    assert len({(look["color"], look["linestyle"]) for look in lines}) == pictures.MOST


@pytest.mark.parametrize("columns", [0, 2])
def test_a_legend_covers_no_data_and_a_pdf_lies_beside(tmp_path: Path, columns: int) -> None:
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for index in range(5):
        axes.plot([0, 1], [index, index], label=f"series {index}", **pictures.line(index))
    pictures.legend(figure, columns)
    path = pictures.save(figure, tmp_path / "made" / "a.png")
    (legend,) = figure.legends
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_no_other_file_chooses_colours() -> None:
    """Of curves, points and marks; pages in HTML have style sheets of their own."""
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "scripts").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    chosen = re.compile(r"""["'](?:C\d|tab:\w+|red|green)["']|f"C\{|\.savefig\(""")
    found = {str(file.relative_to(ROOT)) for file in files if chosen.search(file.read_text())}
    assert found <= {
        "src/structgrad/common/pictures.py",
        "src/structgrad/experiments/figures.py",
        "scripts/structure_pictures.py",
    }


def test_saving_prints_nothing_of_other_libraries(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A font within a PDF makes a hundred lines of logs where the level is INFO, as Hydra sets it."""
    caplog.set_level(logging.INFO)
    figure = Figure()
    figure.suptitle("a title")
    pictures.save(figure, tmp_path / "picture.png")
    assert (tmp_path / "picture.pdf").is_file()
    assert not caplog.records
