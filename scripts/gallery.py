"""Makes the pictures of the documentation that come from runs and commands.

    python scripts/gallery.py                 all of them
    python scripts/gallery.py ssvae pages     these

Quick runs on a CPU, some minutes each; finished ones are not repeated. They are in runs/gallery,
the pictures go to docs/images. Pages for the browser become pictures by headless Chromium.
`make gallery` calls this. The figures of tables have scripts of their own (toy_figure.py,
ssvae_figure.py, rate_distortion.py, parentheses_figure.py, scaling_figure.py), and so have the
pictures of structures (structure_pictures.py) and of tutorials (tutorials.py).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
IMAGES, RUNS = ROOT / "docs" / "images", ROOT / "runs" / "gallery"
#: Name -> options of a run, and its pictures: file of the run -> file of the documentation.
TRAINED: dict[str, tuple[str, dict[str, str]]] = {
    "listops": ("task=listops", {"parses": "listops_parses"}),
    "graph_layout": ("task=graph_layout", {"layout": "graph_layout", "graphs": "graph_layout_graphs"}),
    "bit_vector_vae": (
        "task=bit_vector_vae estimator=sfe_plus task.prior=learnt task.data.source=FashionMNIST/parquet "
        "task.data.train=50000 task.batch_size=64 trainer.max_steps=1800 trainer.val_every_n_steps=600",
        {"reconstructions": "bit_vector_reconstructions", "samples": "bit_vector_samples"},
    ),
    "parentheses": ("experiment=parentheses/smart task.data.types=50", {"trees": "parentheses_trees"}),
    "ssvae": (
        "task=ssvae",
        {"digits": "ssvae_digits", "samples": "ssvae_samples", "decoder_calls": "ssvae_decoder_calls"},
    ),
    "communication_game": (
        "task=communication_game",
        {"symbols": "communication_game", "history": "communication_game_history"},
    ),
    "l2x": ("task=l2x data=planted_reviews task.encoder=simple task.data.words=60 task.data.sentence=[5,10]", {}),
    "toy": ("task=toy structure=matching", {"shares": "toy_shares"}),
}


def command(*words: str) -> None:
    """Run a command of the checkout."""
    print(*words, flush=True)
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)


def train(name: str, *more: str) -> Path:
    """Do the run of that name, unless it is finished, and return its folder."""
    runs = RUNS / "-".join([name, *(word.split("=")[-1] for word in more)])
    options = [*TRAINED[name][0].split(), *more]
    command("train.py", *options, "budget=quick", "trainer=cpu", "logger=csv", f"paths.runs={runs}")
    (summary,) = runs.rglob("summary.json")
    return summary.parent


def draw(name: str) -> None:
    """The pictures of a run."""
    folder = train(name)
    for file, picture in TRAINED[name][1].items():
        shutil.copy(folder / "pictures" / f"{file}.png", IMAGES / f"{picture}.png")


def l2x() -> None:
    """Two models that explain the same reviews."""
    folders = [train("l2x", "structure.k=5", f"structure={name}") for name in ("k_subset", "correlated_k_subset")]
    with tempfile.TemporaryDirectory() as place:
        command("scripts/l2x_reviews.py", *map(str, folders), "--output", f"{place}/l2x_reviews")
        shutil.copy(f"{place}/l2x_reviews.png", IMAGES)
        photograph(Path(place) / "l2x_reviews.html", "page_reviews", 620)


def diagnosis() -> None:
    """Bias and variance over the temperature."""
    options = ["structure=k_subset", "structure.k=2", "estimator=sst", "n=5", "samples=20000"]
    command("diagnose.py", *options, f"out={IMAGES / 'diagnosis.png'}")


def pages() -> None:
    """Pages of all runs, of a table and of a comparison."""
    folder = RUNS / "pages"
    jobs = ["structure=matching", "estimator=t_reinforce_plus,t_reinforce", "seed=0,1,2", "budget=quick"]
    command("train.py", "-m", "task=toy", *jobs, "trainer=cpu", "logger=csv", f"paths.runs={folder}")
    with tempfile.TemporaryDirectory() as place:
        for name, height, options in (
            ("page_runs", 760, ["runs", "--runs", str(folder)]),
            ("page_table", 1100, ["table=ssvae_quick", "results/ssvae_quick"]),
            ("page_comparison", 900, [str(folder / "toy"), "--by", "estimator", "--runs", str(folder)]),
        ):
            command("report.py", *options, "--html", f"{place}/{name}.html")
            photograph(Path(place) / f"{name}.html", name, height)


def photograph(page: Path, name: str, height: int) -> None:
    """The top of a page as a picture."""
    browser = next(
        (found for b in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(b))), None
    )
    if browser is None:
        sys.exit("error: pictures of pages need Chromium (Debian: chromium)")
    with tempfile.TemporaryDirectory() as profile:
        picture = IMAGES / f"{name}.png"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        size = ["--force-device-scale-factor=1", f"--window-size=1100,{height}"]
        made = [f"--screenshot={picture}", page.as_uri()]
        subprocess.run([browser, *options, *size, *made], check=True, capture_output=True)
    Image.open(picture).convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(picture, optimize=True)


#: What has more to it than a run.
OTHERS: dict[str, Callable[[], None]] = {"l2x": l2x, "diagnosis": diagnosis, "pages": pages}


def main() -> None:
    """Make what is named, or all."""
    names = [*(name for name in TRAINED if name not in OTHERS), *OTHERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    chosen = parser.parse_args().names or names
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"{unknown[0]} is unknown; there are {', '.join(names)}")
    for name in chosen:
        OTHERS[name]() if name in OTHERS else draw(name)


if __name__ == "__main__":
    main()
