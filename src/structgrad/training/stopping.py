"""Being asked to stop: SIGTERM and Ctrl-C save a training run between two steps and end it at once elsewhere."""

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
        number: of the first signal that came while stopping was deferred.
        deferred: whether somebody will look at :attr:`number` soon; otherwise a signal raises where it arrives.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.deferred = False

    def listen(self) -> None:
        """Take the signals over, also from Lightning, which replaces the handlers of SIGTERM at every start."""
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
    """Within, signals raise :class:`Interrupted` or are deferred; outside of the main thread, which gets none, nothing
    changes.
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
