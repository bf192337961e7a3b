"""Additions to the documentation site beyond the pages in ``docs/``.

They are pages from elsewhere in the checkout, a page of the API reference for each module, and a
gallery of all pictures. The navigation finds the pages of a folder by itself. MkDocs calls the
functions whose names start with ``on_``.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from structgrad.structures.base import ORACLES

sys.path.insert(0, str(Path(__file__).resolve().parent))
from structure_table import configured

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "structgrad"
#: Files of the checkout that are pages of the site as well.
FROM_THE_CHECKOUT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/own_package/README.md": "own_package.md",
    "data/README.md": "data.md",
}
#: Guides in the order in which a reader needs them; the others follow by name.
FIRST = [
    *("choose_structure.md", "choose_estimator.md", "glossary.md", "losses.md", "your_own.md", "coming_from.md"),
    *("training.md", "runs.md", "comparing_runs.md", "sweeps.md", "tables.md", "results.md", "reproduction.md"),
]
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here, then write the navigation out."""
    made = {page: (ROOT / source).read_text() for source, page in FROM_THE_CHECKOUT.items()}
    made |= dict(_reference())
    made["gallery.md"] = _gallery()
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    pages = [file.src_uri for file in files.documentation_pages()]
    named = {entry for item in config.nav for entry in item.values()}
    config.nav = [{title: _expand(entry, pages, named)} for item in config.nav for title, entry in item.items()]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to the page of a file, if it has one. A link to another file of the checkout becomes its name."""
    written = next((source for source, uri in FROM_THE_CHECKOUT.items() if uri == page.file.src_uri), None)
    home = ROOT / (written or f"docs/{page.file.src_uri}")

    if page.file.src_uri in ("index.md", "gallery.md"):
        page.meta["hide"] = ["navigation"]  # they are alone in their tabs
    if page.file.src_uri in ("structures/README.md", "architecture.md"):
        page.meta["hide"] = ["toc"]  # room for its tables, or its drawing
    if page.file.src_uri == "estimators/table.md":
        page.meta["hide"] = ["navigation", "toc"]  # it has a column a structure
    markdown = re.sub(r"\A(<!--.*?-->\n)+", "", markdown)  # the title must come first to be one

    def follow(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        if ":" in target:
            return match[0]
        path = os.path.relpath(home.parent / target, ROOT)
        uri = FROM_THE_CHECKOUT.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if uri is None and (ROOT / path).exists():
            return text[1:-1]
        if uri is None:
            return match[0]
        return f"{text}({os.path.relpath(uri, os.path.dirname(page.file.src_uri) or '.')}{anchor or ''})"

    return LINK.sub(follow, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let a picture of its own lead to its file, which a phone can enlarge."""
    return re.sub(r'<p>(<img [^>]*src="([^"]+)"[^>]*>)', r'<p><a href="\2">\1</a>', html)


def _expand(entry: str, pages: list[str], named: set[str]) -> Any:
    """The pages of an entry of the navigation."""
    if entry == "*":
        others = sorted(page for page in pages if "/" not in page and page not in named)
        return sorted(others, key=lambda page: FIRST.index(page) if page in FIRST else len(FIRST))
    return _section(entry, pages) if entry.endswith("/") else entry


def _section(folder: str, pages: list[str]) -> list[Any]:
    """The pages of a folder, its README first, then its folders."""
    inside = sorted(page.removeprefix(folder) for page in pages if page.startswith(folder))
    own = sorted((page for page in inside if "/" not in page), key=lambda page: (page != "README.md", page))
    short = folder.startswith("reference/")  # the title of such a page is the full name of a module
    entries: list[Any] = [{Path(p).stem: folder + p} if short and p != "README.md" else folder + p for p in own]
    below = sorted({page.split("/")[0] for page in inside if "/" in page})
    return entries + [{name: _section(f"{folder}{name}/", pages)} for name in below]


def _reference() -> Iterator[tuple[str, str]]:
    """One page for each public module. That of a package has its docstring and the list of its classes."""
    oracles = {kind.__name__: sorted(built.oracles, key=ORACLES.index) for kind, built in configured().items()}
    for file in sorted(PACKAGE.rglob("*.py")):
        inside = file.relative_to(PACKAGE)
        package = inside.name == "__init__.py"
        name = ".".join(("structgrad", *(inside.parent if package else inside.with_suffix("")).parts))
        if any(part.startswith("_") for part in inside.with_suffix("").parts if part != "__init__"):
            continue
        options = "\n    options: {members: false}" if package else ""
        page = inside.with_name("README.md") if package else inside.with_suffix(".md")
        own = [kind for kind in classes(file) if kind in oracles] if inside.parts[0] == "structures" else []
        lists = "".join(f"`{kind}` has the oracles {', '.join(f'`{o}`' for o in oracles[kind])}.\n\n" for kind in own)
        index = (_index(file.parent, oracles) if inside.parent.parts else _rooms()) if package else ""
        yield f"reference/{page}", f"# `{name}`\n\n{lists}::: {name}{options}\n\n{index}"


def _rooms() -> str:
    """The table of the modules and packages of the library, with the first sentence about each."""
    rows = []
    for file in sorted((*PACKAGE.glob("*.py"), *PACKAGE.glob("*/__init__.py"))):
        inside = file.relative_to(PACKAGE)
        if inside.name == "__init__.py" and inside.parent.parts:
            name, link = inside.parts[0], f"{inside.parts[0]}/README.md"
        elif inside.name.startswith("_"):
            continue
        else:
            name, link = inside.stem, f"{inside.stem}.md"
        about = " ".join((ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0].split())
        rows.append(f"| [`structgrad.{name}`]({link}) | {about.replace('``', '`')} |")
    return "\n".join(["| module | |", "|---|---|", *rows]) + "\n"


def classes(file: Path) -> dict[str, str]:
    """Public classes of a file -> the first sentence of their docstrings."""
    found = {}
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            text = re.sub(r":[a-z]+:`~?([\w.]+)`", r"`\1`", text).replace("``", "`").replace("|", "\\|")
            text = re.sub(r" \([^()]*\d{4}[^()]*\)", "", text)  # the source, which the class names
            found[node.name] = re.split(r"(?<=[a-z)`\d])(?<!al)[.:;](?: |$)", text)[0] + "." if text else ""
    return found


def presets() -> dict[str, list[str]]:
    """Name of a class -> the choices of configuration groups that build it, ``estimator=sst``."""
    found: dict[str, list[str]] = {}
    for group in ("structure", "estimator", "task"):
        for file in sorted((ROOT / "configs" / group).glob("*.yaml")):
            for target in re.findall(rf"^{group}:\n  _target_: (\S+)", file.read_text(), re.MULTILINE):
                found.setdefault(target.split(".")[-1], []).append(f"`{group}={file.stem}`")
    return found


def _index(folder: Path, oracles: dict[str, list[str]]) -> str:
    """The table of all public classes in the files of a package, with the configurations that build them."""
    built, exported = presets(), (folder / "__init__.py").read_text()
    rows = []
    for file in sorted(folder.rglob("*.py")):
        inside = file.relative_to(PACKAGE)
        if file.name == "__init__.py" or any(part.startswith("_") for part in inside.parts):
            continue
        name = ".".join(("structgrad", *inside.with_suffix("").parts))
        link = file.relative_to(folder).with_suffix(".md")
        for kind, summary in classes(file).items():
            if "__all__" in exported and f'"{kind}"' not in exported:
                continue  # the class is internal to the package
            rows.append(f"| [`{kind}`]({link}#{name}.{kind}) | {summary} | {', '.join(built.get(kind, []))} |")
    rows.sort(key=lambda row: row.endswith("|  |"))  # those that a configuration builds come first
    return "\n".join(["| class | | preset |", "|---|---|---|", *rows]) + "\n" if rows else ""


#: Sections of the gallery, and the folders of pages or beginnings of names that are theirs.
SECTIONS = {
    "Tasks": ("tasks/",),
    "Pages in the browser": ("comparing_runs.md", "tables.md"),
    "Structures": ("structures/", "choose_structure.md"),
    "Estimators": ("estimators/", "choose_estimator.md"),
    "Tutorials": ("tutorials/",),
}


def _gallery() -> str:
    """Every picture of the documentation in a card, with its caption, which leads to its page."""
    shown: dict[str, tuple[str, str]] = {}
    pages = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
    # A picture belongs to the page of its section, not to another one that shows it too, or to a table of contents.
    pages.sort(key=lambda page: (_section_of(os.path.relpath(page, ROOT / "docs")) is None, page.name == "README.md"))
    for source in pages:
        page = FROM_THE_CHECKOUT.get(source.name) if source.parent == ROOT else str(source.relative_to(ROOT / "docs"))
        for text, target, _ in LINK.findall(source.read_text()):
            if text.startswith("!") and page is not None:
                shown.setdefault(os.path.relpath(source.parent / target, ROOT / "docs"), (text[2:-1], page))
    existing = {
        str(path.relative_to(ROOT / "docs")) for kind in ("png", "gif") for path in (ROOT / "docs").rglob(f"*.{kind}")
    }
    cards: dict[str, list[str]] = {section: [] for section in (*SECTIONS, "Results and cost")}
    for picture, (caption, page) in sorted(shown.items()):
        if picture in existing:
            caption = escape(caption) or Path(picture).stem.replace("_", " ")
            target = re.sub(r"(^|/)README\.md$", r"\1index.md", page).removesuffix(".md") + ".html"
            cards[_section_of(page) or "Results and cost"].append(
                f'<figure><a href="{target}"><img src="{picture}" alt="{caption}" loading="lazy"></a>'
                f"<figcaption>{caption}</figcaption></figure>"
            )
    intro = "Every picture that the product draws. Each leads to its page, which says how to make it."
    parts = [f'## {section}\n\n<div class="gallery">\n{"".join(found)}\n</div>' for section, found in cards.items()]
    return "\n\n".join([f"# Gallery\n\n{intro}", *parts]) + "\n"


def _section_of(page: str) -> str | None:
    """The section of the gallery for the pictures of a page."""
    return next((section for section, begins in SECTIONS.items() if page.startswith(begins)), None)


class Roles(griffe.Extension):
    """Turns Sphinx' roles in docstrings into code, and formulas into MathML, which browsers draw by themselves."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring."""
        if obj.docstring is None:
            return
        text = re.sub(r":math:`([^`]+)`", lambda match: mathml(match[1], "inline"), obj.docstring.value)
        text = re.sub(r":[a-z]+:`~?([\w.]+)`", r"``\1``", text)
        obj.docstring.value = re.sub(r"^\.\. math:: (.*(?:\n.+)*)$", formula, text, flags=re.MULTILINE)


def formula(match: re.Match[str]) -> str:
    """The lines of an equation of its own."""
    found = mathml(match[1], "block")
    return found if found.startswith("<") else f"    {found.strip('`')}"


def mathml(tex: str, display: str) -> str:
    """TeX as MathML; as code where the package for it is not installed (the extra ``docs`` has it)."""
    tex = " ".join(tex.split())
    try:
        from latex2mathml.converter import convert
    except ImportError:
        return f"``{tex}``"
    return str(convert(tex, display=display))
