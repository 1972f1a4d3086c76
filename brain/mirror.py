"""The host's view of the mirror: what is remembered, row by row, in text order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from brain.errors import Refused
from compiled.state import State

SOURCES = ("system", "user", "model", "tool", "repair")
"""Who put a token there. A row stores the index."""


def source_number(source: str) -> int:
    """The number of a source. Raises Refused for a name that is not in SOURCES."""
    if source not in SOURCES:
        raise Refused(f"source {source!r} is unknown: use one of {', '.join(SOURCES)}")
    return SOURCES.index(source)


@dataclass(frozen=True)
class Mirror:
    """Columns of all valid rows, sorted by position. A snapshot: it does not follow the brain."""

    slot: npt.NDArray[np.int64]
    token_id: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]
    brightness: npt.NDArray[np.float32]
    surprise: npt.NDArray[np.float32]
    novelty: npt.NDArray[np.float32]
    source: npt.NDArray[np.uint8]
    born: npt.NDArray[np.int64]
    lit: npt.NDArray[np.int64]
    pinned: npt.NDArray[np.bool_]
    decode: Callable[[Sequence[int]], str]

    def __len__(self) -> int:
        return len(self.position)

    def text(self, gap: str = "") -> str:
        """What is remembered, as text; ``gap`` is put wherever positions are missing."""
        if not gap:
            return self.decode(self.token_id.tolist())
        runs = np.split(self.token_id, np.flatnonzero(np.diff(self.position) > 1) + 1)
        return gap.join(self.decode(run.tolist()) for run in runs)

    def emptied(self) -> "Mirror":
        """A mirror of nothing."""
        columns = {
            column.name: getattr(self, column.name)[:0]
            for column in fields(self)
            if column.name != "decode"
        }
        return Mirror(**columns, decode=self.decode)

    def sources(self) -> list[str]:
        """The name of every row's source."""
        return [SOURCES[number] for number in self.source]

    def index_of(self, position: int) -> int:
        """Where a position stands in the columns. Raises Refused if no row has it."""
        index = int(np.searchsorted(self.position, position))
        if index == len(self) or self.position[index] != position:
            raise Refused(f"no row is remembered at position {position}")
        return index


def mirror_of(state: State, decode: Callable[[Sequence[int]], str]) -> Mirror:
    """Copies the mirror columns of the valid rows from the device: O(capacity)."""
    columns = {
        name: getattr(state, name).cpu().numpy()
        for name in State._fields
        if name not in ("keys", "values")
    }
    slot = np.flatnonzero(columns.pop("valid"))
    slot = slot[np.argsort(columns["position"][slot])]
    return Mirror(
        slot=slot, **{name: column[slot] for name, column in columns.items()}, decode=decode
    )
