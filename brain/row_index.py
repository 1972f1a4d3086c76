"""The host's index of rows: which slot holds which position, and which slots are free.

An edit names rows by their positions, and the patch writes slots. To copy the mirror for that would
cost the capacity; the index costs what an edit touches. A short prompt begins it, or else the first
edit, by one look at the mirror. From then on it follows every patch: the host knows each but for
what a tick chose to forget, and those positions come back with the tick.

The index holds for one account, which is replaced with every patch. So whatever changes the memory
without telling the index (a save, renumbering, an interruption) shows in the account, and the next
edit looks at the mirror again.

Positions only ever grow at the end, or are taken again by a row in an old place. So text order is a
list that forgotten rows stay in, marked, until there are as many of them as slots.
"""

from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from brain.errors import Refused
from brain.memory import Account, Memory

FEW = 4096
"""Forgotten rows that are not worth clearing away."""


class FollowedTick(Protocol):
    """A tick: what its patch did to the rows, once it has been made."""

    before: Account
    after: Account

    @property
    def not_finite(self) -> int:
        """Not 0 if it has not happened."""

    @property
    def culled(self) -> tuple[int, ...]:
        """Positions of the rows that it forgot."""


class RowIndex:
    """Rows of one memory by position, and the free slots.

    Attributes: ``pinned``, positions of the pinned rows.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._account: Account | None = None  # the one that the index holds for
        self._ticks: deque[FollowedTick] = deque()  # made and not yet followed
        self.clear()

    # Staying with the memory

    def clear(self) -> None:
        """An index of nothing. It holds for no account until ``hold`` names one."""
        self._account = None
        self._ticks.clear()
        self.pinned: set[int] = set()
        self._position = array("q")  # ascending; those of forgotten rows among them
        self._slot = array("q")  # of each of these
        # One byte each, since bytes are found at the speed of memory:
        self._remembered = bytearray()  # whether there is a row at that place of the list
        self._occupied = bytearray(self._memory.state.capacity)

    def hold(self, account: Account) -> None:
        """Says which account the index holds for, once a patch is made."""
        if len(self._position) > 2 * self._memory.state.capacity + FEW:
            self._clear_away()
        self._account = account

    def follow(self, tick: FollowedTick) -> None:
        """Queues a tick that is done. Cannot fail."""
        if self._account is not None:
            self._ticks.append(tick)

    def catch_up(self, waiting: int = 0) -> None:
        """Follows all ticks but the newest, as many as may go on ``waiting``. Waits for the others,
        but raises nothing for those that have not happened.
        """
        while len(self._ticks) > waiting:
            tick = self._ticks.popleft()
            before, after = tick.before, tick.after
            if tick.not_finite:
                continue
            if before is not self._account:  # the memory has been changed behind its back
                self.clear()
                return
            if before.count + before.uncommitted > after.count:
                self.forget(tick.culled)
            if before.uncommitted:
                self.put([before.position])
            self.hold(after)

    def update(self) -> None:
        """Makes it hold for the memory as it is. Every tick before has been waited for."""
        self.catch_up()
        if self._account is not self._memory.account:
            self._look()

    def _look(self) -> None:
        """Copies what it needs of the mirror from the device: O(capacity)."""
        self.clear()
        state = self._memory.state
        valid, position, pinned = (
            column.cpu().numpy() for column in (state.valid, state.position, state.pinned)
        )
        slot = np.flatnonzero(valid)
        slot = slot[np.argsort(position[slot])]
        self._position = array("q", position[slot].tobytes())
        self._slot = array("q", slot.astype(np.int64).tobytes())
        self._remembered = bytearray(b"\1") * len(slot)
        self._occupied = bytearray(valid.tobytes())
        self.pinned = set(position[slot[pinned[slot]]].tolist())
        self._account = self._memory.account

    def _clear_away(self) -> None:
        """Takes forgotten rows out of the list."""
        there = self._since(0)
        self._position, self._slot = (array("q", column.tobytes()) for column in there)
        self._remembered = bytearray(b"\1") * len(self._position)

    # Looking

    @property
    def positions(self) -> list[int]:
        """Every row's position, ascending."""
        positions: list[int] = self._since(0)[0].tolist()
        return positions

    def slot_of(self, position: int) -> int:
        """The slot of the row at a position. Raises Refused if there is none."""
        return self._slot[self._place(position)]

    def last(self) -> int | None:
        """The newest row's position; None where there is no row."""
        return self._at(self._remembered.rfind(1))

    def before(self, position: int) -> int | None:
        """The position of the row before a position; None where there is none."""
        return self._at(self._remembered.rfind(1, 0, bisect_left(self._position, position)))

    def are_neighbours(self, positions: Sequence[int]) -> bool:
        """Whether rows at these positions, ascending, stand side by side."""
        place = self._place(positions[0])
        for position in positions[1:]:
            place = self._remembered.find(1, place + 1)
            if self._at(place) != position:
                return False
        return True

    def slots_since(self, position: int) -> npt.NDArray[np.int64]:
        """Slots of the rows at a position and after it, in text order."""
        return self._since(bisect_left(self._position, position))[1]

    def lowest_free(self, number: int) -> list[int]:
        """The lowest free slots, which so many rows would get. There must be as many."""
        slots: list[int] = []
        for _ in range(number):
            slots.append(self._occupied.find(0, slots[-1] + 1 if slots else 0))
        return slots

    # Changing, with the patch that is about to be made: afterwards, ``hold``

    def forget(self, positions: Iterable[int]) -> dict[int, int]:
        """Forgets rows, all of which are there. Returns the slot of each."""
        self._account = None
        slots = {}
        for position in positions:
            place = self._place(position)
            slot = slots[position] = self._slot[place]
            self._remembered[place] = self._occupied[slot] = 0
            self.pinned.discard(position)
        return slots

    def put(self, positions: Sequence[int]) -> list[int]:
        """Gives rows at new positions, ascending, the lowest free slots. Returns these."""
        self._account = None
        slots = self.lowest_free(len(positions))
        for position, slot in zip(positions, slots, strict=True):
            place = bisect_left(self._position, position)
            if place == len(self._position) or self._position[place] != position:
                self._position.insert(place, position)
                self._slot.insert(place, slot)
                self._remembered.insert(place, 1)
            self._slot[place], self._remembered[place] = slot, 1
            self._occupied[slot] = 1
        return slots

    def pin(self, positions: Mapping[int, bool]) -> None:
        """Pins or releases rows."""
        self._account = None
        self.pinned.update(position for position, pinned in positions.items() if pinned)
        self.pinned.difference_update(at for at, pinned in positions.items() if not pinned)

    def _place(self, position: int) -> int:
        """Where a row's position stands in the list. Raises Refused if it is not remembered."""
        place = bisect_left(self._position, position)
        if (
            place == len(self._position)
            or self._position[place] != position
            or not self._remembered[place]
        ):
            raise Refused(f"no row is remembered at position {position}")
        return place

    def _at(self, place: int) -> int | None:
        return None if place < 0 else self._position[place]

    def _since(self, place: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Positions and slots of the rows from a place of the list on."""
        there: npt.NDArray[Any] = np.frombuffer(self._remembered[place:], dtype=np.bool_)
        position = np.frombuffer(self._position[place:], dtype=np.int64)
        slot = np.frombuffer(self._slot[place:], dtype=np.int64)
        return position[there], slot[there]
