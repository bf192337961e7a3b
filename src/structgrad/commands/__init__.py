"""The commands, one module each. ``structgrad-<name>`` and, in a checkout, ``<name>.py`` call its
``main``.
"""

import sys
from collections.abc import Iterable
from importlib import resources, util
from importlib.resources.abc import Traversable
from pathlib import Path

from structgrad.common.installing import install

if any(util.find_spec(package) is None for package in ("hydra", "optuna", "pytorch_lightning")):
    sys.exit(f"error: the commands need more than the library: {install('experiments')}")

#: The configurations. They are part of an installed package; in a checkout they are a link to
#: ``configs/`` at its root.
CONFIGS = Path(__file__).parents[1] / "configs"
_SEARCHPATH = "hydra.searchpath="


class SearchPathError(ValueError):
    """A package in Hydra's search path does not exist; the message is one line."""


def places(searchpath: Iterable[str] | None = None) -> list[Traversable]:
    """The folders of configurations: ours, then those in Hydra's search path, e.g.
    ``pkg://mylab.configs``.

    Raises:
        SearchPathError: for a package that does not exist.
    """
    found: list[Traversable] = [CONFIGS]
    for place in searchpath or ():
        kind, _, where = place.rpartition("://")
        try:
            found.append(resources.files(where) if kind == "pkg" else Path(where))
        except ModuleNotFoundError as error:
            raise SearchPathError(
                f"hydra.searchpath: no package {error.name} for {place}; is it on PYTHONPATH?"
            ) from error
    return found


def group(name: str, arguments: Iterable[str] = ()) -> list[Traversable]:
    """The folders of a group of configurations, including those of ``hydra.searchpath=[...]`` on a
    command line.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given = [argument for argument in arguments if argument.startswith(_SEARCHPATH)]
    paths = [str(path) for item in OverridesParser.create().parse_overrides(given) for path in _listed(item.value())]
    return [place / name for place in places(paths)]


def _listed(value: object) -> list[object]:
    return list(value) if isinstance(value, list) else [value]
