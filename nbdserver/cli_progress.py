"""A sign of life for whatever takes longer than a second, on a terminal only."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

SHOW_AFTER_SECONDS: Final = 1.0
TICK_SECONDS: Final = 0.2


@contextmanager
def progress(what: str) -> Iterator[None]:
    """While the block runs longer than SHOW_AFTER_SECONDS, show `what` and the time elapsed on stderr."""
    if not sys.stderr.isatty():
        yield
        return
    done = threading.Event()
    ticker = threading.Thread(target=_tick, args=(what, done), name="progress", daemon=True)
    ticker.start()
    try:
        yield
    finally:
        done.set()
        ticker.join()


def _tick(what: str, done: threading.Event) -> None:
    if done.wait(SHOW_AFTER_SECONDS):
        return
    from tqdm import tqdm  # 50 ms, and hardly ever needed

    tqdm.monitor_interval = 0  # this thread refreshes the bar itself
    with tqdm(desc=what, bar_format="{desc} ... {elapsed}", leave=False, file=sys.stderr) as bar:
        while not done.wait(TICK_SECONDS):
            bar.refresh()


@contextmanager
def progress_bar(what: str, total_bytes: int) -> Iterator[Callable[[int], object]]:
    """A bar on stderr for work of about so many bytes; the block tells what it gets how many bytes more are done."""
    if not sys.stderr.isatty():
        yield lambda done_bytes: None
        return
    from tqdm import tqdm

    tqdm.monitor_interval = 0
    bar = tqdm(
        desc=what,
        total=total_bytes,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        delay=SHOW_AFTER_SECONDS,
        leave=False,
        file=sys.stderr,
    )
    with bar:
        yield bar.update
