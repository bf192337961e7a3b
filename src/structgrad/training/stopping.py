"""Requests to stop: SIGTERM and Ctrl-C save a training run between two steps, and end it at once
elsewhere.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from structgrad.training.errors import Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether the process was asked to stop.

    Attributes:
        number: number of the first signal that came while stopping was deferred.
        deferred: whether :attr:`number` will be checked soon; otherwise a signal raises where it
            arrives.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.deferred = False

    def listen(self) -> None:
        """Receive the signals, also instead of Lightning, which replaces the handlers of SIGTERM at
        every start.
        """
        for number in _SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.deferred or self.number is not None:
            raise Interrupted(number)
        self.number = number
        print(
            f"\n{signal.Signals(number).name}: saving after this step; a second signal stops at once", file=sys.stderr
        )


@contextmanager
def stoppable() -> Iterator[StopRequest]:
    """A context in which signals raise :class:`Interrupted` or are deferred.

    In another thread than the main one nothing changes, because only the main thread gets signals.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        request.listen = lambda: None  # type: ignore[method-assign]
        yield request
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}
    request.listen()
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
