"""Progress of long work, on standard error: a bar on a terminal, a line for each tenth elsewhere."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from w4a16gen.cli.output import is_terminal, note, printed_by
from w4a16gen.progress import Progress, no_progress

_BAR_WIDTH = 20


@contextmanager
def show_progress(title: str, total: int | None = None, *, lines: bool = False) -> Iterator[Progress]:
    """Show the progress of long work.

    Args:
        title: a phrase for the work.
        total: the steps in all, if they are known before the first report.
        lines: whether to print a line for each tenth of the steps if standard error is not a terminal.
    """
    if is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb":
        with _bar(title, total) as report:
            yield report
    elif lines:
        yield _Tenths(title)
    else:
        yield no_progress


class _Tenths:
    """Prints a line whenever another tenth of the steps is done."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._tenths = 0

    def __call__(self, done: int, total: int, _what: str) -> None:
        tenths = 10 * done // total if total else 0
        if tenths > self._tenths:
            self._tenths = tenths
            note(f"{self._title}: step {done} of {total}")


@contextmanager
def _bar(title: str, total: int | None) -> Iterator[Progress]:
    """Show bar, count and clock, then the title and the step, which is cut where the terminal ends."""
    from rich import progress
    from rich.console import Console
    from rich.table import Column
    from rich.text import Text

    class Clock(progress.ProgressColumn):
        """The time since the start. It runs on after the last step, while the result is put together."""

        def render(self, task: progress.Task) -> Text:
            minutes, seconds = divmod(int(task.elapsed or 0), 60)
            return Text(f"{minutes}:{seconds:02d}")

    step = Column(no_wrap=True, overflow="crop", ratio=1)
    columns = (
        progress.BarColumn(_BAR_WIDTH),
        progress.MofNCompleteColumn(),
        Clock(),
        progress.TextColumn("{task.description}", markup=False, table_column=step),
    )
    console = Console(stderr=True, highlight=False)

    def print_above(text: str) -> None:
        console.print(Text.from_ansi(text), soft_wrap=True)

    with progress.Progress(*columns, console=console, transient=True, expand=True) as bar, printed_by(print_above):
        task = bar.add_task(title, total=total)

        def report(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{title}: {what}" if what else title)

        yield report


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """Treat SIGTERM, and SIGHUP unless it is ignored, as Ctrl-C while compilers run, so that they are stopped too.

    A closed terminal sends SIGHUP, and nohup makes programs ignore it. Only while compiling: Python cannot run a signal
    handler while it waits for a GPU, and the default action ends it.
    """

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    taken = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])
