"""Reviews with their chosen words marked over the annotated ones: a page for the browser, a picture for dashboards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from structgrad.common.pictures import BLUE, FAINT, INK, PALE, VERMILION
from structgrad.common.pictures import save as save_picture

#: The meaning of marks, for legends: ground, edge and ink.
_MARKS = {
    "word that decides": (PALE, PALE, INK),
    "chosen, decides": (BLUE, BLUE, "white"),
    "chosen, does not decide": ("white", VERMILION, VERMILION),
}
_ANNOTATED, _HIT, _MISS = _MARKS.values()
#: Layout of the picture: characters in a line, the largest number of lines, and inches of a
#: character and of a line.
_WIDTH, _LINES, _CHARACTER, _LINE = 66, 48, 0.0736, 0.2


@dataclass
class Explanation:
    """A review and the words that a model chose.

    Attributes:
        words: words of the review.
        relevant: for each word, whether it decides.
        chosen: for each word, whether the model saw it.
        rating: the true rating, in [0, 1]; None if it is not used.
        prediction: the model's rating.
    """

    words: list[str]
    relevant: list[bool]
    chosen: list[bool]
    rating: float | None
    prediction: float

    @property
    def hits(self) -> int:
        """The number of chosen words that decide."""
        return sum(a and b for a, b in zip(self.chosen, self.relevant, strict=True))

    def describe(self) -> str:
        """One line with the number of chosen words that decide, and the ratings."""
        truth = "not used" if self.rating is None else f"{self.rating:.2f}"
        return f"{self.hits} of {sum(self.chosen)} chosen words decide; rating {truth}, predicted {self.prediction:.2f}"


#: Title of a model -> its explanations of the same reviews, left to right.
Columns = Mapping[str, Sequence[Explanation]]


def save(explanations: Sequence[Explanation], path: Path) -> Path:
    """Write explanations as JSON; returns ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(e) for e in explanations]) + "\n")
    return path


def load(path: Path) -> list[Explanation]:
    """The explanations that :func:`save` wrote."""
    return [Explanation(**content) for content in json.loads(path.read_text())]


def check_same(columns: Columns) -> None:
    """Refuse columns that do not explain the same reviews.

    Raises:
        ValueError: with the names of the columns.
    """
    reviews = {title: [e.words for e in explanations] for title, explanations in columns.items()}
    first, *others = reviews
    for other in others:
        if reviews[other] != reviews[first]:
            raise ValueError(f"{first} and {other} explain different reviews: they must be of the same data")


# --- page ----------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #3b4252; --faint: #8a93a3; --rule: #e3e7ee;
  --annotated: #dcebf9; --hit: #0072b2; --miss: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181d; --ink: #c9ced8; --faint: #7d8695; --rule: #2b2f38;
  --annotated: #1d3a55; --hit: #0072b2; --miss: #ff8c42; } }
body { background: var(--paper); color: var(--ink); font: 16px/1.75 system-ui, sans-serif; margin: 2rem auto;
  max-width: 90rem; padding: 0 1.5rem; }
h1 { font-size: 1.3rem; margin: 0; }
.legend { color: var(--faint); margin: .3rem 0 1.5rem; }
section { border-top: 1px solid var(--rule); display: grid; gap: 2.5rem; grid-auto-columns: minmax(0, 1fr);
  grid-auto-flow: column; padding: 1rem 0 1.3rem; }
@media (max-width: 50rem) { section { grid-auto-flow: row; gap: 1rem; } }
h2 { font-size: .95rem; margin: 0; }
.facts { color: var(--faint); font-size: .85rem; margin: 0 0 .4rem; }
article p { margin: 0; }
.a { background: var(--annotated); }
mark { border-radius: .25em; color: #fff; font-weight: 600; padding: .05em .25em; }
.hit { background: var(--hit); }
.miss { background: none; box-shadow: inset 0 0 0 2px var(--miss); color: var(--miss); }
"""


def write_page(columns: Columns, title: str, path: Path) -> Path:
    """A page with the reviews one below the other and the models side by side. It needs no other
    file.

    Args:
        columns: explanations of the same reviews.
        title: title of the data.
        path: path of the page; its folder is created.

    Raises:
        ValueError: see :func:`check_same`.
    """
    check_same(columns)
    rows = []
    for i in range(len(next(iter(columns.values())))):
        articles = [_article(model, explanations[i]) for model, explanations in columns.items()]
        rows.append(f"<section>{''.join(articles)}</section>")
    legend = (
        'Words that decide have a <span class="a">blue ground</span>. Chosen words: '
        '<mark class="hit">deciding</mark> <mark class="miss">not deciding</mark>'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body><h1>Chosen words: {escape(title)}</h1><p class=legend>{legend}</p>\n"
        + "\n".join(rows)
        + "</body></html>\n"
    )
    return path


def _article(model: str, explanation: Explanation) -> str:
    words = []
    previous = False
    for word, relevant, chosen in zip(explanation.words, explanation.relevant, explanation.chosen, strict=True):
        # A space within a span belongs to the span.
        words.append('<span class="a"> </span>' if relevant and previous else " ")
        text = f'<mark class="{"hit" if relevant else "miss"}">{escape(word)}</mark>' if chosen else escape(word)
        words.append(f'<span class="a">{text}</span>' if relevant else text)
        previous = relevant
    return (
        f"<article><h2>{escape(model)}</h2><p class=facts>{escape(explanation.describe())}</p>"
        f"<p>{''.join(words)}</p></article>"
    )


# --- picture -------------------------------------------------------------------------------------------------------


def draw(columns: Columns, path: Path) -> Path:
    """The same as :func:`write_page` in a picture, for as many reviews as are legible.

    Models are one below the other, so that a phone shows words of a legible size.

    Args:
        columns: explanations of the same reviews.
        path: path of the picture; its folder is created.

    Raises:
        ValueError: see :func:`check_same`.
    """
    check_same(columns)
    shown, total = 0, 2
    for explanation in next(iter(columns.values())):
        lines = len(columns) * (_lines(_layout(explanation.words)) + 3)
        if shown and total + lines > _LINES:
            break
        shown, total = shown + 1, total + lines
    width, left, top = _WIDTH + 4, 2, 0
    figure = Figure(figsize=(width * _CHARACTER, total * _LINE))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(total, 0)
    axes.axis("off")
    for review in range(shown):
        for model, explanations in columns.items():
            explanation = explanations[review]
            axes.text(left, top + 0.6, model, fontsize=9, weight="bold", color=INK, va="center")
            axes.text(left, top + 1.6, explanation.describe(), fontsize=8.5, color=FAINT, va="center")
            places = _layout(explanation.words)
            for i, (word, (x, line)) in enumerate(zip(explanation.words, places, strict=True)):
                relevant, chosen = explanation.relevant[i], explanation.chosen[i]
                y = top + line + 2.7
                if relevant:
                    joined = i + 1 < len(places) and explanation.relevant[i + 1] and places[i + 1][1] == line
                    reach = places[i + 1][0] - x if joined else len(word)
                    axes.add_patch(Rectangle((left + x, y - 0.45), reach, 0.9, color=_ANNOTATED[0], linewidth=0))
                if chosen:
                    ground, edge, _ = _HIT if relevant else _MISS
                    axes.add_patch(
                        Rectangle(
                            (left + x - 0.2, y - 0.42),
                            len(word) + 0.4,
                            0.84,
                            facecolor=ground,
                            edgecolor=edge,
                            linewidth=1.2,
                            zorder=2,
                        )
                    )
                ink = (_HIT if relevant else _MISS)[2] if chosen else INK
                axes.text(
                    left + x,
                    y,
                    word.replace("$", r"\$"),
                    color=ink,
                    fontsize=8.8,
                    family="monospace",
                    va="center",
                    zorder=3,
                )
            top += _lines(places) + 3
    place = 2.0
    for meaning, (ground, edge, ink) in _MARKS.items():
        box = {"boxstyle": "square,pad=0.25", "facecolor": ground, "edgecolor": edge, "linewidth": 1.2}
        axes.text(place, total - 0.9, meaning, fontsize=8, color=ink, va="center", bbox=box)
        place += len(meaning) + 2
    return save_picture(figure, path)


def _lines(places: Sequence[tuple[int, int]]) -> int:
    """The number of lines, at least one."""
    return 1 + max((line for _, line in places), default=0)


def _layout(words: Sequence[str]) -> list[tuple[int, int]]:
    """Column and line of each word, in lines of bounded width."""
    places, x, line = [], 0, 0
    for word in words:
        if x and x + len(word) > _WIDTH:
            x, line = 0, line + 1
        places.append((x, line))
        x += len(word) + 1
    return places
