"""A text that does not fit: it is read by chunks, and the memory forgets as it goes.

A chunk is several ticks at once (``compiled/chunk.py``): one read, one patch. This module says how
many, makes them, and keeps the host's account. A chunk happens wholly or not at all, so a text that
is interrupted has been read up to its last chunk.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import torch

from brain.config.settings import Settings
from brain.diagnosis import not_finite_error
from brain.loop import Loop
from brain.machine.signals import Uninterrupted
from compiled.chunk import follow_chunk
from compiled.score import cull_count


class Chunks:
    """The chunks of one loop."""

    def __init__(self, loop: Loop, settings: Settings) -> None:
        self._loop, self._memory = loop, loop.memory
        self._most = settings.conf.cull.chunk
        self._every = settings.conf.repair.every
        self._culling = settings.culling

    def size(self, tokens: int) -> int:
        """How many of ``tokens`` ticks the next chunk takes: 1 where it is to be a plain tick.
        Renumbers the rows first, where it would leave the range that the model was trained on.
        """
        account = self._memory.account
        most = min(tokens, self._most)
        if self._every:  # a repair comes between two chunks
            most = min(most, self._every - (account.tick + 1) % self._every)
        if self._most > 1:
            self._loop.stay_in_range(most, long_text=True)
            account = self._memory.account
        if most < 2 or not account.uncommitted or self._loop.repairs.due:
            return 1
        self._loop.settle()
        self._loop.index.update()
        positions, pinned = self._loop.index.positions, self._loop.index.pinned
        first = self._culling.sinks
        for size in range(most, 1, -1):
            last = account.position + size - 1 - self._culling.recent
            may_go = bisect_right(positions, last) - bisect_left(positions, first)
            may_go -= sum(first <= position <= last for position in pinned)
            going, count = self._going(size)
            if going <= max(may_go, 0) and count <= self._memory.state.capacity:
                return size
        return 1

    def _going(self, size: int) -> tuple[int, int]:
        """How many rows so many ticks let go, and how many there are after them."""
        going, count = 0, self._memory.account.count
        for _ in range(size):
            culled = cull_count(count, self._culling)
            going, count = going + culled, count - culled + 1
        return going, count

    def feed(self, told: Sequence[int], source: int) -> list[float]:
        """Makes a chunk of ticks that are told what to speak, as many as ``size`` has just said.

        Args:
            told: At least two token ids.
            source: Who says them.
        Returns:
            The surprise of each, in nats.
        Raises:
            NotFinite: The read made NaN or infinity; nothing is changed.
        """
        loop, memory = self._loop, self._memory
        run, before, cursor = memory.graphs.uncaptured, memory.account, memory.cursor
        going, count = self._going(len(told))
        after = before.after_ticks(len(told), count)
        targets = memory.int64(list(told))
        memory.graphs.begin_step()
        reading = run.read_chunk(
            torch.cat([cursor.token, targets[:-1]]),
            cursor.position + torch.arange(len(told), device=memory.device),
            targets,
            high_water=before.high_water,
        )
        plan = follow_chunk(
            memory.state,
            cursor,
            reading,
            targets,
            torch.tensor([source], dtype=torch.uint8, device=memory.device),
            memory.int64(going),
            memory.graphs.spec.eviction,
        )
        broken = int(plan.not_finite)
        if broken:
            ticks = f"ticks {before.tick + 1} to {after.tick}"
            raise not_finite_error(broken, ticks, memory.checkpoint)
        nats: list[float] = reading.surprises.tolist()
        forgotten = memory.state.position[plan.cull].tolist()
        with Uninterrupted():
            run.patch(plan)
            memory.account = after
            loop.index.forget(forgotten)
            loop.index.put(range(before.position, after.position))
            loop.index.hold(after)
            loop.detokenizer.pass_by(told)
        return nats
