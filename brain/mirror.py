"""The host's view of the mirror: what is remembered, row by row, in text order."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from brain.errors import Refused, did_you_mean, unknown
from compiled.state import COLUMNS, ROW_COLUMNS, State

SOURCES = ("system", "user", "model", "tool", "repair")
"""Who put a token there. A row stores the index."""


def source_number(source: str) -> int:
    """The number of a source. Raises Refused for a name that is not in SOURCES."""
    if source not in SOURCES:
        raise unknown("source", source, SOURCES)
    return SOURCES.index(source)


class Mirror:
    """Columns of all valid rows, sorted by position. A snapshot: it does not follow the brain.

    Attributes: ``slot`` and every column of :class:`compiled.state.State` but ``valid``, by its
    name: ``token_id``, ``position``, ``brightness``, ``surprise``, ``novelty``, ``source``,
    ``born``, ``lit``, ``pinned``. Each is a NumPy array [rows].
    """

    def __init__(
        self,
        columns: Mapping[str, npt.NDArray[Any]],
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        self.columns = dict(columns)
        self.decode = decode

    def __getattr__(self, name: str) -> npt.NDArray[Any]:
        try:
            return self.__dict__["columns"][name]  # type: ignore[no-any-return]
        except KeyError:
            hint = did_you_mean(name, self.__dict__.get("columns", ()))
            raise AttributeError(f"the mirror has no column {name!r}{hint}") from None

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.columns]

    def __len__(self) -> int:
        return len(self.position)

    def text(self, gap: str = "") -> str:
        """What is remembered, as text; ``gap`` is put wherever positions are missing."""
        if not gap:
            return self.decode(self.token_id.tolist())
        runs = np.split(self.token_id, np.flatnonzero(np.diff(self.position) > 1) + 1)
        return gap.join(self.decode(run.tolist()) for run in runs)

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
    columns = {name: getattr(state, name).cpu().numpy() for name in COLUMNS}
    slot = np.flatnonzero(columns["valid"])
    slot = slot[np.argsort(columns["position"][slot])]
    return Mirror({"slot": slot, **{name: columns[name][slot] for name in ROW_COLUMNS}}, decode)
