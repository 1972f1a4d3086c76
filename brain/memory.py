"""The memory of one brain: its tensors, the graphs bound to them, and the host's account.

The host never asks the device how many rows there are or where the next read stands: it knows,
because it knows every patch. Text, policy and people are not this module's business.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from brain.actions import Edit
from brain.checkpoints import Checkpoint
from brain.commit import (
    UNTOLD,
    Link,
    Row,
    Standing,
    Told,
    echoes_of,
    predecessor,
    row_columns,
    standing_after,
    with_edit,
    with_saved_rows,
)
from brain.mirror import Mirror
from brain.settings import Settings
from compiled.capture import Behaviour, Graphs
from compiled.philox import key_of
from compiled.read import Reading, Study
from compiled.sample import Sampling, surprises
from compiled.score import echo, running_novelty
from compiled.state import NOWHERE, Cursor, State, allocate_cursor, allocate_state


class Memory:
    """State, cursor and graphs.

    Attributes: ``state``, ``cursor`` and ``graphs``, made once and never replaced; ``count`` of
    valid rows; ``tick``, ticks since the last prime; ``position`` of the token that the next tick
    reads (NOWHERE before the first prime); ``uncommitted``, whether that token has no row yet;
    ``high_water``, one more than the highest slot that has been occupied since the memory was
    last empty.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Settings) -> None:
        weights = checkpoint.weights
        self.device = weights.device
        self.state: State = allocate_state(
            checkpoint.config, settings.capacity, weights.dtype, self.device
        )
        self.cursor: Cursor = allocate_cursor(self.device)
        self._conduct = settings.conduct
        behaviour = Behaviour(
            checkpoint.config,
            settings.method,
            settings.conduct,
            settings.widths,
            settings.smallest_bucket,
            settings.chunk,
            settings.rebases,
        )
        self.graphs = Graphs(
            behaviour,
            checkpoint.weights,
            self.state,
            self.cursor,
            _sampling(settings, self.device),
            compiled=settings.compiled,
        )
        self.count = 0
        self.high_water = 0
        self.tick = 0
        self.position = NOWHERE
        self.uncommitted = False
        self._one = torch.ones((), dtype=torch.int64, device=self.device)

    def read_cursor(self) -> Reading:
        """Reads the cursor's token; call ``graphs.begin_step`` first."""
        return self.graphs.read(
            self.cursor.token, self.cursor.position, self._one, high_water=self.high_water
        )

    def read_padded(self, ids: Sequence[int], positions: Sequence[int], width: int) -> Reading:
        """Reads any tokens, padded to a width; call ``graphs.begin_step`` first."""
        return self.graphs.read(*self._padded(ids, positions, width), high_water=self.high_water)

    def commit(self, rows: Sequence[Row], edit: Edit, mirror: Mirror, pending: Told | None) -> None:
        """Reads rows, sorted by position, and commits them together with the edit.

        In one patch, unless a text is longer than the prefill chunk: then chunk by chunk, each
        read against those before it, and taken back as a whole if anything interrupts it.
        ``pending`` is what is known of the pending token, if it is among the rows.
        """
        foretold = self._foretold(rows, mirror, pending)
        chunk = self.graphs.chunk
        held = Cursor(*(tensor.add(0) for tensor in self.cursor))
        novelty = self.state.novelty.add(0)
        before = (self.count, self.position, self.uncommitted)
        link: Link | None = None
        for start in range(0, max(1, len(rows)), chunk):
            last = start + chunk >= len(rows)
            try:
                link = self._commit_chunk(
                    rows, start, foretold, link, edit if last else Edit(), mirror
                )
            except BaseException:
                if start > 0:
                    committed = {row.position for row in rows[:start]}
                    self._take_back(committed, held, novelty, before)
                raise

    def _foretold(
        self, rows: Sequence[Row], mirror: Mirror, pending: Told | None
    ) -> list[Told | None]:
        """What the memory tells of each row: None where the new row before it does."""
        foretold: list[Told | None] = []
        for index, row in enumerate(rows):
            before = predecessor(row, rows[index - 1] if index else None, mirror)
            if row.position == self.position and pending is not None:
                foretold.append(pending)
            elif before is not None:
                self.graphs.begin_step()
                reading = self.graphs.read(
                    self._tensor([int(mirror.token_id[before])]),
                    self._tensor([int(mirror.position[before])]),
                    self._one,
                    high_water=self.high_water,
                )
                nats = float(surprises(reading.logits, self._tensor([row.token]))[0])
                foretold.append(self._after(float(mirror.novelty[before]), nats))
            else:
                foretold.append(None if index else UNTOLD)
        return foretold

    def _after(self, novelty: float, surprise: float) -> Told:
        """What is known of a token, given the novelty of the one before it."""
        return Told(surprise, running_novelty(novelty, surprise, self._conduct.novelty))

    def _commit_chunk(
        self,
        rows: Sequence[Row],
        start: int,
        foretold: Sequence[Told | None],
        link: Link | None,
        edit: Edit,
        mirror: Mirror,
    ) -> Link | None:
        """One read and one patch; returns what its last row tells of the row after it."""
        span = rows[start : start + self.graphs.chunk]
        newest = int(mirror.position[-1]) if len(mirror) else NOWHERE
        width = self.graphs.edit_width_for(max(1, len(span), len(edit.erase)))
        learnt: Study | None = None
        nats: list[float] = []
        self.graphs.begin_step()
        if span:
            targets = [row.token for row in rows[start + 1 : start + 1 + len(span)]]
            learnt = self.graphs.study(
                *self._padded([row.token for row in span], [row.position for row in span], width),
                self._tensor(targets + [0] * (width - len(targets))),
                high_water=self.high_water,
            )
            nats = learnt.surprises.tolist()
        plan = self.graphs.empty_edit(width, learnt)
        told: list[Told] = []
        for index, known in enumerate(foretold[start : start + len(span)]):
            if known is None:
                assert link is not None
                known = self._after(link.novelty, link.next_surprise)
            told.append(known)
            link = Link(known.novelty, nats[index])
        appended = bool(span) and span[-1].position > self.position
        if self.uncommitted and not appended:
            uncommitted, position = True, self.position
            cursor = Cursor(*(tensor.add(0) for tensor in self.cursor))
        else:
            standing = standing_after(span, told, edit, mirror)
            uncommitted, position = False, standing.position
            cursor = standing.cursor(self.tick, self.device)
        constants = self._conduct.brightness
        said = [row.position > newest for row in span]
        echoes, strength = echoes_of(span, told, said, self._conduct.novelty)
        columns = row_columns(span, told, echoes, width, self.tick, constants, self.device)
        plan = plan._replace(rows=columns, cursor=cursor)
        if any(said):
            at = self._tensor(span[said.index(True)].position)
            heard = torch.tensor(strength, dtype=torch.float32, device=self.device)
            plan = plan._replace(novelty=echo(self.state, at, heard, self._conduct.novelty))
        self.graphs.patch(with_edit(plan, self.state, edit, mirror, constants))
        self.settle(self.count - len(edit.cull) + len(span), position, uncommitted=uncommitted)
        return link if span else None

    def _take_back(
        self,
        positions: set[int],
        cursor: Cursor,
        novelty: Tensor,
        before: tuple[int, int, bool],
    ) -> None:
        """Forgets the rows of an append that was interrupted between two chunks, and what others
        heard of them.
        """
        plan = self.graphs.empty_edit(self.graphs.edit_width_for(1))
        slots = torch.isin(self.state.position, self._tensor(sorted(positions)))
        self.graphs.begin_step()
        cull = slots & self.state.valid
        self.graphs.patch(plan._replace(cull=cull, cursor=cursor, novelty=novelty))
        count, position, uncommitted = before
        self.settle(count, position, uncommitted=uncommitted)

    def forget_everything(self) -> None:
        """Back to an empty memory; the bytes stay until the slots are reused."""
        plan = self.graphs.empty_edit(self.graphs.edit_width_for(1))
        self.tick = 0
        nowhere = Standing().cursor(0, self.device)
        self.graphs.begin_step()
        everything = self.state.valid.logical_or(self.state.valid)
        self.graphs.patch(plan._replace(cull=everything, cursor=nowhere))
        self.settle(0, NOWHERE, uncommitted=False)

    def rebase(self) -> None:
        """Renumbers positions densely, in text order."""
        self.graphs.begin_step()
        self.graphs.rebase()
        self.position = self.count - 1 + int(self.uncommitted)

    def settle(self, count: int, position: int, *, uncommitted: bool) -> None:
        """The host's account of what the patch has just done. Exact without asking the device:
        appending takes the lowest free slots, so no slot above the largest count is ever used.
        """
        self.count = count
        self.high_water = max(self.high_water, count) if count else 0
        self.position = position
        self.uncommitted = uncommitted

    def restore(self, rows: Mapping[str, Tensor], cursor: Cursor, high_water: int) -> None:
        """Puts saved rows back into their slots, and the cursor where it stood.

        ``rows`` are the columns of the state less ``valid``, as ``saves.py`` has checked them, and
        ``slot`` [n] int64, ascending. ``high_water`` decides over how many slots a read sums, and
        so how it rounds. The holes between them are filled first and forgotten again,
        so that the one patch, which knows only "the lowest free slot", serves here too.
        """
        self.forget_everything()
        slot = rows["slot"]
        size = int(slot[-1]) + 1 if len(slot) else 0
        held = torch.zeros(size, dtype=torch.bool)
        held[slot] = True
        chunk = self.graphs.chunk
        for start in range(0, size, chunk):
            span = held[start : min(start + chunk, size)]
            plan = self.graphs.empty_edit(self.graphs.edit_width_for(len(span)))
            self.graphs.begin_step()
            self.graphs.patch(with_saved_rows(plan, rows, slot, start, len(span), self.device))
            self.settle(start + len(span), NOWHERE, uncommitted=False)
        plan = self.graphs.empty_edit(self.graphs.edit_width_for(1))
        holes = torch.zeros(self.state.capacity, dtype=torch.bool)
        holes[:size] = ~held
        cursor = Cursor(*(tensor.to(self.device) for tensor in cursor))
        self.graphs.begin_step()
        self.graphs.patch(plan._replace(cull=holes.to(self.device), cursor=cursor))
        self.tick = int(cursor.tick)
        self.settle(len(slot), int(cursor.position[0]), uncommitted=bool(int(cursor.uncommitted)))
        self.high_water = high_water

    def _padded(
        self, ids: Sequence[int], positions: Sequence[int], width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, positions and length of a read of some width."""
        padding = [0] * (width - len(ids))
        tokens, where = self._tensor([*ids, *padding]), self._tensor([*positions, *padding])
        return tokens, where, self._tensor(len(ids))

    def _tensor(self, values: int | Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def _sampling(settings: Settings, device: torch.device) -> Sampling:
    def number(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=device)

    return Sampling(
        number(settings.temperature),
        number(settings.top_p),
        number(settings.min_p),
        number(settings.repetition_penalty),
        key_of(settings.seed).to(device),
    )
