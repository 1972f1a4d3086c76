"""The memory of one brain: its tensors, the graphs bound to them, and the host's account.

The host never asks the device how many rows there are or where the next read stands: it knows,
because it knows every patch. Text, policy and people are not this module's business.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from brain.actions import Edit
from brain.checkpoints import Checkpoint
from brain.config.settings import Settings
from brain.edits import (
    UNTOLD,
    Link,
    Row,
    Standing,
    Told,
    echoes_of,
    lean,
    predecessor,
    row_columns,
    standing_after,
    with_edit,
    with_saved_rows,
)
from brain.machine.cpu_operator import native_decoder
from brain.machine.signals import Uninterrupted
from brain.mirror import Mirror
from compiled.graphs import Behaviour, Graphs
from compiled.int8 import Int8
from compiled.llama import Weights
from compiled.patch import Plan
from compiled.philox import key_of
from compiled.read import Reading, ScoredPrefill
from compiled.read_cpu import formats
from compiled.sample import Sampling, surprises
from compiled.score import echo, running_novelty
from compiled.state import NOWHERE, Cursor, State, allocate_cursor, allocate_state


@dataclass(frozen=True)
class Account:
    """What the host knows of the device without asking. Replaced as a whole, together with every
    patch, so that the two never disagree.

    ``count`` of valid rows; ``high_water``, one more than the highest slot that has been occupied
    since the memory was last empty; ``tick``, ticks since the last prime; ``position`` of the token
    that the next tick reads (NOWHERE before the first prime); ``uncommitted``, whether that token
    has no row yet.
    """

    count: int = 0
    high_water: int = 0
    tick: int = 0
    position: int = NOWHERE
    uncommitted: bool = False

    def after(self, count: int, position: int, *, uncommitted: bool) -> "Account":
        """That of a patch in the same tick. Exact: appending takes the lowest free slots, so no
        slot above the largest count is ever used.
        """
        high_water = max(self.high_water, count) if count else 0
        return Account(count, high_water, self.tick, position, uncommitted)


EMPTY = Account()


class Memory:
    """State, cursor and graphs.

    Attributes: ``state``, ``cursor`` and ``graphs``, made once and never replaced; ``account``, and
    each number of it by its own name.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Settings) -> None:
        weights = checkpoint.weights
        self.device = weights.device
        self.state: State = allocate_state(
            checkpoint.config, settings.capacity, weights.dtype, self.device
        )
        self.cursor: Cursor = allocate_cursor(self.device)
        self._conduct = settings.conduct
        ends = checkpoint.tokenizer.eos_ids
        behaviour = Behaviour(
            checkpoint.config,
            settings.method,
            settings.conduct,
            settings.widths,
            settings.smallest_bucket,
            settings.chunk,
            settings.rebases,
            settings.lookup and replace(settings.lookup, ends=tuple(sorted(ends))),
            _native(checkpoint.weights, settings),
        )
        self.graphs = Graphs(
            behaviour,
            checkpoint.weights,
            self.state,
            self.cursor,
            _sampling(settings, self.device),
            compiled=settings.compiled,
        )
        self.account = EMPTY
        self._one = torch.ones((), dtype=torch.int64, device=self.device)

    @property
    def count(self) -> int:
        """Valid rows."""
        return self.account.count

    @property
    def high_water(self) -> int:
        """Slots that a read has to look at."""
        return self.account.high_water

    @property
    def tick(self) -> int:
        """Ticks since the last prime."""
        return self.account.tick

    @property
    def position(self) -> int:
        """Where the next read stands."""
        return self.account.position

    @property
    def uncommitted(self) -> bool:
        """Whether the token there has no row yet."""
        return self.account.uncommitted

    def apply(self, plan: Plan, account: Account, *, once: bool = False) -> None:
        """The patch and the account of it: both or neither. To be called ``Uninterrupted``."""
        self.graphs.patch(plan, once=once)
        self.account = account

    def read_cursor(self) -> Reading:
        """Reads the cursor's token; call ``graphs.begin_step`` first."""
        return self.graphs.read(
            self.cursor.token, self.cursor.position, self._one, high_water=self.high_water
        )

    def read_padded(self, ids: Sequence[int], positions: Sequence[int], width: int) -> Reading:
        """Reads any tokens, padded to a width; call ``graphs.begin_step`` first."""
        return self.graphs.read(*self._padded(ids, positions, width), high_water=self.high_water)

    def begin(self, rows: Sequence[Row], nothing: Mirror) -> None:
        """Replaces everything that is remembered by these rows. ``nothing`` is an empty mirror.

        In one patch, unless the text is longer than the prefill chunk: then whatever interrupts it
        leaves an empty memory. Nothing of it is captured.
        """
        afresh = len(rows) <= self.graphs.chunk
        if not afresh:
            self.forget_everything()
        self.commit(rows, Edit(), nothing, None, afresh=afresh, once=True)

    def commit(
        self,
        rows: Sequence[Row],
        edit: Edit,
        mirror: Mirror,
        pending: Told | None,
        *,
        afresh: bool = False,
        once: bool = False,
    ) -> None:
        """Reads rows, sorted by position, and commits them together with the edit.

        In one patch, unless a text is longer than the prefill chunk: then chunk by chunk, each
        read against those before it, and taken back as a whole if anything interrupts it.
        ``pending`` is what is known of the pending token, if it is among the rows. ``afresh``: the
        same patch forgets everything else, which ``mirror`` no longer shows. ``once``: no graph is
        captured for it.
        """
        foretold = self._foretold(rows, mirror, pending)
        chunk = self.graphs.chunk
        undone = self.graphs.empty_edit(self.graphs.edit_width_for(1, once=once))._replace(
            cull=self.state.valid.logical_not(),  # of what is there then: all that is new
        )
        before = self.account
        link: Link | None = None
        for start in range(0, max(1, len(rows)), chunk):
            last = start + chunk >= len(rows)
            settled = self.account
            try:
                link = self._commit_chunk(
                    rows,
                    start,
                    foretold,
                    link,
                    edit if last else Edit(),
                    mirror,
                    afresh=afresh,
                    once=once,
                )
            except BaseException:
                whole = last and self.account is not settled  # an interruption that came after it
                if self.account is not before and not whole:
                    with Uninterrupted():
                        self.graphs.begin_step()
                        self.apply(undone, before, once=once)
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
        *,
        afresh: bool,
        once: bool,
    ) -> Link | None:
        """One read and one patch; returns what its last row tells of the row after it."""
        account = EMPTY if afresh else self.account
        span = rows[start : start + self.graphs.chunk]
        newest = int(mirror.position[-1]) if len(mirror) else NOWHERE
        width = self.graphs.edit_width_for(max(1, len(span), len(edit.erase)), once=once)
        learnt: ScoredPrefill | None = None
        nats: list[float] = []
        self.graphs.begin_step()
        if span:
            targets = [row.token for row in rows[start + 1 : start + 1 + len(span)]]
            learnt = self.graphs.study(
                *self._padded([row.token for row in span], [row.position for row in span], width),
                self._tensor(targets + [0] * (width - len(targets))),
                # Afresh, no old row is seen: each stands at the position of a new one, or after.
                high_water=account.high_water,
                once=once,
            )
            nats = learnt.surprises.tolist()
        plan = self.graphs.empty_edit(width, learnt)  # after the read, which needs the most memory
        told: list[Told] = []
        for index, known in enumerate(foretold[start : start + len(span)]):
            if known is None:
                assert link is not None
                known = self._after(link.novelty, link.next_surprise)
            told.append(known)
            link = Link(known.novelty, nats[index])
        appended = bool(span) and span[-1].position > account.position
        if account.uncommitted and not appended:
            uncommitted, position = True, account.position
            cursor = Cursor(*(tensor.add(0) for tensor in self.cursor))
        else:
            standing = standing_after(span, told, edit, mirror)
            uncommitted, position = False, standing.position
            cursor = standing.cursor(account.tick, self.device)
        constants = self._conduct.brightness
        said = [row.position > newest for row in span]
        echoes, strength = echoes_of(span, told, said, self._conduct.novelty)
        columns = row_columns(span, told, echoes, width, account.tick, constants, self.device)
        plan = plan._replace(rows=columns, cursor=cursor)
        if any(said):
            at = self._tensor(span[said.index(True)].position)
            heard = torch.tensor(strength, dtype=torch.float32, device=self.device)
            plan = plan._replace(novelty=echo(self.state, at, heard, self._conduct.novelty))
        plan = with_edit(plan, self.state, edit, mirror, constants)
        if afresh:
            plan = plan._replace(cull=self.state.valid.logical_or(self.state.valid))
        if once or not self.graphs.is_captured(width):
            anything = afresh and self.count > 0
            plan = lean(plan, len(span), culls=anything or bool(edit.cull), erases=bool(edit.erase))
        count = account.count - len(edit.cull) + len(span)
        with Uninterrupted():
            self.apply(plan, account.after(count, position, uncommitted=uncommitted), once=once)
        return link if span else None

    def forget_everything(self) -> None:
        """Back to an empty memory; the bytes stay until the slots are reused."""
        plan = self.graphs.empty_edit(self.graphs.edit_width_for(1, once=True))
        nowhere = Standing().cursor(0, self.device)
        self.graphs.begin_step()
        everything = self.state.valid.logical_or(self.state.valid)
        with Uninterrupted():
            self.apply(plan._replace(cull=everything, cursor=nowhere), EMPTY, once=True)

    def rebase(self) -> None:
        """Renumbers positions densely, in text order."""
        position = self.count - 1 + int(self.uncommitted)
        self.graphs.begin_step()
        with Uninterrupted():
            try:
                self.graphs.rebase()
            except BaseException:
                position = int(self.cursor.position[0])  # it may be done for all that
                raise
            finally:
                self.account = replace(self.account, position=position)

    def restore(self, rows: Mapping[str, Tensor], cursor: Cursor, high_water: int) -> None:
        """Puts saved rows back into their slots, and the cursor where it stood.

        ``rows`` are the columns of the state less ``valid``, as ``saves.py`` has checked them, and
        ``slot`` [n] int64, ascending. ``high_water`` decides over how many slots a read sums, and
        so how it rounds. The holes between them are filled first and forgotten again,
        so that the one patch, which knows only "the lowest free slot", serves here too. Nothing of
        it is captured. Whatever interrupts it leaves an empty memory.
        """
        self.forget_everything()
        try:
            self._restore(rows, cursor, high_water)
        except BaseException:
            self.forget_everything()
            raise

    def _restore(self, rows: Mapping[str, Tensor], cursor: Cursor, high_water: int) -> None:
        slot = rows["slot"]
        size = int(slot[-1]) + 1 if len(slot) else 0
        held = torch.zeros(size, dtype=torch.bool)
        held[slot] = True
        chunk = self.graphs.chunk
        for start in range(0, size, chunk):
            span = held[start : min(start + chunk, size)]
            plan = self.graphs.empty_edit(self.graphs.edit_width_for(len(span), once=True))
            plan = with_saved_rows(plan, rows, slot, start, len(span), self.device)
            plan = lean(plan, len(span), culls=False, erases=False)
            self.graphs.begin_step()
            with Uninterrupted():
                count = start + len(span)
                self.apply(plan, self.account.after(count, NOWHERE, uncommitted=False), once=True)
        plan = self.graphs.empty_edit(self.graphs.edit_width_for(1, once=True))
        holes = torch.zeros(self.state.capacity, dtype=torch.bool)
        holes[:size] = ~held
        cursor = Cursor(*(tensor.to(self.device) for tensor in cursor))
        account = Account(
            len(slot),
            high_water,
            int(cursor.tick),
            int(cursor.position[0]),
            bool(int(cursor.uncommitted)),
        )
        plan = plan._replace(cull=holes.to(self.device), cursor=cursor)
        self.graphs.begin_step()
        with Uninterrupted():
            self.apply(plan, account, once=True)

    def _padded(
        self, ids: Sequence[int], positions: Sequence[int], width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, positions and length of a read of some width."""
        padding = [0] * (width - len(ids))
        tokens, where = self._tensor([*ids, *padding]), self._tensor([*positions, *padding])
        return tokens, where, self._tensor(len(ids))

    def _tensor(self, values: int | Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def _native(weights: Weights, settings: Settings) -> Path | None:
    """The library with the decode operator, where there is one for these weights."""
    if not settings.native:
        return None
    wanted = formats(weights.dtype, weights.device, int8=isinstance(weights.head, Int8))
    return None if wanted is None else native_decoder(wanted, settings.cache)


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
