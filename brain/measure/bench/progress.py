"""What a benchmark is doing, and how long it will take."""

import math
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm


class Progress:
    """A line on standard error: which run is going on, of how many, and the time that all which
    are left will take, judged by those before.

    Args:
        title: of the measure.
        keys: of the runs of one round, in turn.
        repeats: rounds.
    """

    def __init__(self, title: str, keys: Sequence[Hashable], repeats: int) -> None:
        self._left = dict.fromkeys(keys, repeats)
        self._seconds: dict[Hashable, float] = {}  # of the last run of each
        form = "{desc}: run {n_fmt} of {total_fmt}, {elapsed} so far{postfix}"
        self._bar = tqdm(total=repeats * len(keys), desc=title, bar_format=form)

    def close(self) -> None:
        """Leaves the line as it is."""
        self._bar.close()

    def clear(self) -> None:
        """Makes room for another line, until the next run is shown."""
        self._bar.clear()

    @contextmanager
    def run(self, key: Hashable, label: str) -> Iterator[None]:
        """While a run is going on: see ``show``."""
        self._key, self._label, self._start = key, label, time.perf_counter()
        self._shown = -math.inf
        self._bar.n += 1
        self.show()
        try:
            yield
        finally:
            self._left[key] -= 1
            self._seconds[key] = time.perf_counter() - self._start

    def drop(self, key: Hashable) -> None:
        """A run that is not made."""
        self._left[key] -= 1
        self._bar.total -= 1

    def show(self) -> None:
        """Draws the line anew, at most once a second."""
        now = time.perf_counter()
        if now - self._shown < 1:
            return
        self._shown = now
        left = self.seconds_left()
        told = "" if left is None else f", about {_spoken(left)} left"
        self._bar.set_postfix_str(f"{self._label}{told}")

    def seconds_left(self) -> float | None:
        """As far as the runs before tell: one that has not been made is taken to be as long as the
        others are on average. None before the first.
        """
        if not self._seconds:
            return None
        usual = sum(self._seconds.values()) / len(self._seconds)
        left = sum(self._seconds.get(key, usual) * runs for key, runs in self._left.items())
        gone = time.perf_counter() - self._start
        return max(0.0, left - min(gone, self._seconds.get(self._key, usual)))


def _spoken(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
