"""The live screen of a sweep: rows x trials, best so far, time left."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.live import Live
from rich.table import Table as Grid
from rich.text import Text

from structgrad.common.text import duration
from structgrad.experiments.queue import Progress
from structgrad.experiments.tables import Table

#: Seconds between lines if the output is no terminal and no trial ends.
_EVERY_S = 300.0


class Screen:
    """Shows progress. A terminal is redrawn; other output gets a line when a trial ends, and now
    and then.

    Args:
        table: the table of the rows.
        workers: number of workers.
        metric: the metric of "best".
        console: where to write; None: standard output.
    """

    def __init__(self, table: Table, workers: int, metric: str, console: Console | None = None) -> None:
        self.table = table
        self.workers = workers
        self.metric = metric
        self.console = console or Console()
        self._live: Live | None = None
        self._last: tuple[tuple[int, ...], float] = ((), 0.0)
        self._note = ""

    def __enter__(self) -> Screen:
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *arguments: object) -> None:
        if self._live:
            self._live.stop()

    def note(self, text: str) -> None:
        """Report an event once. On a terminal it stays until the next one."""
        self._note = f"{time.strftime('%H:%M:%S')} {text}"
        if not self._live:
            self.console.print(self._note, soft_wrap=True, highlight=False, markup=False)

    def show(self, progress: Mapping[str, Progress]) -> None:
        """Draw the present state."""
        if self._live:
            self._live.update(self.grid(progress), refresh=True)
            return
        counts = [(p.done, p.failed, p.resting) for p in progress.values()]
        ended = tuple(sum(column) for column in zip(*counts, strict=True))
        if ended != self._last[0] or time.monotonic() - self._last[1] > _EVERY_S:
            self._last = ended, time.monotonic()
            self.console.print(f"{time.strftime('%H:%M:%S')} {self.line(progress)}", soft_wrap=True, highlight=False)

    def line(self, progress: Mapping[str, Progress]) -> str:
        """The whole state in one line."""
        numbers = [(p.trials, p.done, p.running, p.failed) for p in progress.values()]
        trials, done, running, failed = (sum(column) for column in zip(*numbers, strict=True))
        left = time_left(progress, self.workers)
        text = f"{done} of {trials} trials done, {running} running, {failed} failed"
        if any(p.reached for p in progress.values()):
            text += f", {sum(p.resting for p in progress.values())} resting"
        return text + (f", about {duration(left)} left" if left else "")

    def grid(self, progress: Mapping[str, Progress]) -> Grid:
        """One line for each row of the table."""
        caption = self.line(progress) + (f"\n{self._note}" if self._note else "")
        grid = Grid(title=f"{self.table.title} ({self.table.name})", caption=Text(caption), expand=False)
        grid.add_column("row")
        halves = any(p.reached for p in progress.values())
        rests = ("resting",) if halves else ()
        for title in ("done", "running", "failed", "waiting", *rests, f"best {self.metric}", "a trial"):
            grid.add_column(title, justify="right")
        titles = {row.name: f"{row.title}, {row.group}" if row.group else row.title for row in self.table.rows}
        for name, p in progress.items():
            best = "-" if p.best is None else f"{p.best:.4g}"
            seconds = "-" if p.seconds is None else duration(p.seconds)
            failed = f"[red]{p.failed}[/red]" if p.failed else "0"
            cells = [str(p.done), str(p.running), failed, str(p.open - p.running)]
            cells += [str(p.resting)] if halves else []
            grid.add_row(titles[name].replace("[", r"\["), *cells, best, seconds)
        return grid


def time_left(progress: Mapping[str, Progress], workers: int) -> float | None:
    """Seconds until all trials are done; None before any estimate is possible.

    It uses the mean time of the row's trials, or of all rows' trials if the row has none yet.
    """
    known = [(p.seconds, p.done) for p in progress.values() if p.seconds is not None]
    if not known or not workers:
        return None
    mean = sum(seconds * done for seconds, done in known) / sum(done for _, done in known)
    # We assume that a running trial is half done.
    work = sum((p.open - 0.5 * p.running) * (mean if p.seconds is None else p.seconds) for p in progress.values())
    return work / workers
