"""Non-monotonic generation of balanced parentheses (Struminsky et al. 2021, section 5.4)."""

from structgrad.tasks.parentheses.data import ParenthesesData
from structgrad.tasks.parentheses.task import Parentheses

__all__ = ["Parentheses", "ParenthesesData"]
