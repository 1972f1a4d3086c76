"""Progress on standard error: what is being waited for, and for how long already.

A bar moves by itself while nothing reports progress, so that it never looks like a program that
hangs. In a log there are no bars but whole lines, and only of what takes long.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from brain.machine.streams import UNWRITABLE, Notes

if TYPE_CHECKING:
    from tqdm import tqdm

BAR_EVERY = 1.0  # seconds between two looks at a bar on a terminal
LINE_EVERY = 10.0  # seconds between two lines where standard error is no terminal


@contextmanager
def progress_bar(
    what: str, total: int | None = None, unit: str = "it", **options: Any
) -> "Iterator[tqdm[Any]]":
    """Shows a progress bar within a ``with`` statement, if standard error can be written.

    Args:
        what: What is being waited for.
        total: Units until it is done; None: only the time is shown, after BAR_EVERY.
        unit: What is counted.
        options: Of tqdm. With ``disable=True`` nothing is shown.
    """
    from tqdm import tqdm  # here: a command that is refused shows no bar

    on_terminal = False
    with suppress(*UNWRITABLE):
        on_terminal = sys.stderr.isatty()
    if total is None:
        options |= {"bar_format": "{desc}: {elapsed}", "delay": BAR_EVERY, "leave": False}
    bar = tqdm(
        desc=what,
        total=total,
        unit=unit,
        file=Notes(sys.stderr if on_terminal else None),  # in a log, lines take its place
        dynamic_ncols=on_terminal,
        **options,
    )
    done = threading.Event()

    def keep_moving() -> None:
        while not done.wait(BAR_EVERY if on_terminal else LINE_EVERY):
            if on_terminal:
                bar.refresh()
            else:
                print(bar, file=Notes(sys.stderr), flush=True)

    mover = threading.Thread(target=keep_moving, name="progress", daemon=True)
    started = False
    if not bar.disable:
        with suppress(RuntimeError):  # no more threads can be had: a bar that stands still
            mover.start()
            started = True
    try:
        yield bar
    finally:
        done.set()
        if started:
            mover.join()
        bar.close()
