"""The version, alone in its module so that building a wheel need not import torch."""

__version__ = "0.1.0"
