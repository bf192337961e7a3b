"""structgrad: learning with discrete, structured latent variables."""

from structgrad.version import __version__

__all__ = ["__version__"]
