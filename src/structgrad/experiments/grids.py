"""A grid of text cells as plain text, Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """The cells of a line; ``best`` are the indices of cells that are the best of their column."""

    cells: tuple[str, ...]
    best: frozenset[int] = frozenset()
    heading: str = ""


@dataclass(frozen=True)
class Grid:
    """Attributes: titles of the columns; lines, each with the heading that begins at it, if any; a
    caption.
    """

    titles: tuple[str, ...]
    rows: tuple[Row, ...] = field(default_factory=tuple)
    caption: str = ""

    def text(self) -> str:
        """The grid in aligned columns; a star marks the best of a column."""
        lines = [list(self.titles)]
        lines += [[cell + " *" * (i in row.best) for i, cell in enumerate(row.cells)] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([shown[0], "-" * len(shown[0]), *shown[1:], *[self.caption] * bool(self.caption)])

    def markdown(self) -> str:
        """A Markdown table; the best of a column is bold."""
        lines = ["| " + " | ".join(map(escaped, self.titles)) + " |", "|---" * len(self.titles) + "|"]
        for row in self.rows:
            if row.heading:
                blank = [""] * (len(self.titles) - 1)
                lines.append("| " + " | ".join([f"**{escaped(row.heading)}**", *blank]) + " |")
            cells = [f"**{escaped(c)}**" if i in row.best else escaped(c) for i, c in enumerate(row.cells)]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines) + (f"\n\n{self.caption}" if self.caption else "")

    def latex(self) -> str:
        """A ``tabular`` in the style of booktabs, in a ``table`` with its caption; the best of a column is bold."""
        lines = [
            rf"\begin{{tabular}}{{l{'r' * (len(self.titles) - 1)}}}",
            r"\toprule",
            " & ".join(map(tex, self.titles)) + r" \\",
            r"\midrule",
        ]
        for row in self.rows:
            if row.heading:
                lines.append(rf"\multicolumn{{{len(self.titles)}}}{{l}}{{\emph{{{tex(row.heading)}}}}} \\")
            cells = [rf"\textbf{{{tex(c)}}}" if i in row.best else tex(c) for i, c in enumerate(row.cells)]
            lines.append(" & ".join(cells) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}"]
        if not self.caption:
            return "\n".join(lines)
        caption = rf"\caption{{{tex(self.caption)}}}"
        return "\n".join([r"\begin{table}", r"\centering", *lines, caption, r"\end{table}"])


def comma_separated(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """CSV with a line of titles."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(titles)
    writer.writerows(rows)
    return stream.getvalue().rstrip("\n")


def escaped(cell: str) -> str:
    """The text, escaped for a cell of a Markdown table."""
    return cell.replace("|", r"\|")


def tex(text: str) -> str:
    """The text, escaped for LaTeX."""
    replacements = {character: rf"\{character}" for character in "&%_#{}$"}
    replacements |= {
        "\\": r"\textbackslash{}",
        "|": r"\textbar{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "−": "$-$",
        "×": r"$\times$",
        "≥": r"$\geq$",
        "≤": r"$\leq$",
        "`": "",
    }
    return "".join(replacements.get(character, character) for character in text)
