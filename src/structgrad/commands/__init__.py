"""The commands, one module each: ``main`` is what ``structgrad-<name>`` and, in a checkout, ``<name>.py`` call."""

from pathlib import Path

#: The configurations: part of an installed package, and in a checkout a link to ``configs/`` at its root.
CONFIGS = Path(__file__).parents[1] / "configs"
