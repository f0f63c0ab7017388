"""Progress bars: only for people, and only where there is time to look at them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..checkpoints.copying import Progress, nobody
from ..checkpoints.strip import Total

LONG = 1 << 28
"""Bytes from which on a bar is shown."""


@contextmanager
def shown_on_terminals(verb: str) -> Iterator[Total]:
    """What `progress=` of the functions in `surgery.checkpoints` takes: a bar on stderr, if that is a
    terminal and the files are long."""
    bars = []

    def start(total: int) -> Progress:
        if total < LONG or not sys.stderr.isatty():
            return nobody
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Bar

        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        bar = Bar(TextColumn(verb), *columns, console=Console(stderr=True), transient=True)
        bars.append(bar)
        bar.start()
        task = bar.add_task(verb, total=total)
        return lambda done: bar.advance(task, done)

    try:
        yield start
    finally:
        for bar in bars:
            bar.stop()
