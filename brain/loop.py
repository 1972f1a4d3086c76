"""The loop: one tick after another over one memory.

    prepare → 1 read and sample, 2 score, 3 decide → 4 patch

No number crosses between host and device on the way: what is read next lies in the cursor, and the
host's account follows from what each patch does. This module knows the memory and what is
forgotten; it knows no text but the queue of tokens to be decoded, and no files.
"""

from typing import NoReturn
from weakref import WeakMethod

import torch

from brain.config.settings import Settings, roomy
from brain.diagnosis import not_finite_error
from brain.errors import MemoryFull, NotFinite, Refused, warn
from brain.machine.signals import Uninterrupted
from brain.memory import Memory
from brain.repair import Repairs
from brain.row_index import RowIndex
from brain.tick import MOST_WAITING, AcceptedToken, Detokenizer, Observer, Step, Tick, host_copies
from compiled.choose import Forced
from compiled.lookup import Proposal
from compiled.score import cull_count
from compiled.state import NOWHERE

TICK, STEP, PATCH = "tick", "1 read and sample, 2 score, 3 decide", "4 patch"
"""The ranges that a profiler shows: one for every tick, in it what only looks, and what writes."""


class Loop:
    """Ticks over one memory.

    Attributes: ``detokenizer``, the queue of tokens to be decoded; ``index``, of the rows, for
    edits; ``repairs``, made before a read; ``observer``, called in every tick before its patch, if
    there is one.
    """

    def __init__(self, memory: Memory, settings: Settings) -> None:
        checkpoint = memory.checkpoint
        self.memory = memory
        self.observer: Observer | None = None
        self.detokenizer = Detokenizer(checkpoint.tokenizer)
        self.index = RowIndex(memory)
        self.repairs = Repairs(memory, self.index, settings, checkpoint.tokenizer.decode)
        self._culling = settings.culling
        self._rebases = settings.graphs.rebases
        self._trained = checkpoint.config.max_position_embeddings
        self._has_room_to_renumber = settings.conf.capacity <= roomy(checkpoint.config)
        self._warned: set[bool] = set()  # of rows that are renumbered, or are not
        # Weak, because a tick that somebody keeps must not keep the memory.
        self._when_void = WeakMethod(self._take_back)

    def tick(self, forced: Forced) -> Tick:
        """Reads the cursor's token, speaks one, forgets, remembers.

        Args:
            forced: The token to speak instead of a sampled one, or UNFORCED.
        Raises:
            Refused: There is nothing to read, or no room.
        """
        memory, graphs = self.memory, self.memory.graphs
        with graphs.ranges(TICK):
            self.require_room(1)
            self.detokenizer.make_room()
            self.index.catch_up(MOST_WAITING - 1)
            rebased = self.stay_in_range(1)
            if self.repairs.due:
                self.settle()
            repairs = self.repairs.make()
            before = memory.account
            culled = cull_count(before.count, self._culling)
            after = before.after_ticks(1, before.count - culled + int(before.uncommitted))
            graphs.begin_step()
            with graphs.ranges(STEP):
                reading, choice = graphs.step(forced, high_water=before.high_water)
            plan = choice.plan(reading)
            tick = Tick(
                before,
                after,
                choice,
                self.detokenizer,
                self._when_void,
                repairs,
                rebased=rebased,
            )
            if self.observer is not None:
                tick.prove()
                self.observer(Step(tick, memory.cursor, reading, choice, plan))
            with graphs.ranges(PATCH), Uninterrupted():
                graphs.patch(plan)
                memory.account = after
                self.detokenizer.follow(tick)
                self.index.follow(tick)
            return tick

    def ticks_ahead(self, proposal: Proposal, forced: Forced) -> tuple[Tick, ...]:
        """As many ticks in one pass as come true. Waits for their number.

        Args:
            proposal: Tokens that may follow the next one; none of these ticks forgets.
            forced: [T] tokens to speak instead of sampled ones, or UNFORCED.
        """
        memory, graphs = self.memory, self.memory.graphs
        with graphs.ranges(TICK):
            self.settle()  # the caller has waited for the search: this costs nothing
            self.index.catch_up()
            self.stay_in_range(1)
            before = memory.account
            graphs.begin_step()
            with graphs.ranges(STEP):
                high_water = before.high_water
                reading, accepted = graphs.step_ahead(proposal, forced, high_water=high_water)
            plan = accepted.plan(reading)
            copies = host_copies(
                accepted.tokens, accepted.surprise, accepted.number, accepted.not_finite
            )
            tokens, surprise, number, flag = (copy.wait() for copy in copies)
            nothing = torch.zeros(0, dtype=torch.int64)
            accounts = [before]
            for count in range(1, int(number) + 1):
                accounts.append(before.after_ticks(count, before.count + count))
            ticks = tuple(
                Tick(
                    accounts[count - 1],
                    accounts[count],
                    AcceptedToken(
                        tokens[count - 1 : count], surprise[count - 1 : count], nothing, flag
                    ),
                    self.detokenizer,
                    self._when_void,
                    width=len(tokens),
                )
                for count in range(1, int(number) + 1)
            )
            ticks[0].prove()
            with graphs.ranges(PATCH), Uninterrupted():
                graphs.patch(plan)
                memory.account = accounts[-1]
                for tick in ticks:
                    self.detokenizer.follow(tick)
                    self.index.follow(tick)
            return ticks

    def settle(self) -> None:
        """Waits for every tick. Raises NotFinite if one of them has not happened."""
        self.detokenizer.decode_all()

    def _take_back(self, tick: Tick) -> NoReturn:
        """Raises NotFinite for a tick whose patch refused its plan; those after it read the same
        and were refused as well. The account becomes what it was before the first of them.
        """
        void = [*tick.detokenizer.drop_void(), tick]
        first = void[0]
        fault = not_finite_error(first.not_finite, f"tick {first.number}", self.memory.checkpoint)
        message = f"{fault}; the memory is as it was before that"
        for each in void:
            each.fault = message
        if tick.detokenizer is self.detokenizer:  # nothing has replaced the memory since
            self.memory.account = first.before
        raise NotFinite(message)

    def require_room(self, ticks: int) -> None:
        """Raises Refused if there is nothing to read; MemoryFull if there is no room for the rows
        of so many ticks and nothing is ever forgotten.
        """
        self.require_primed()
        account = self.memory.account
        # The first of them commits what is pending, each other one what the last one spoke.
        count = account.count + int(account.uncommitted) + ticks - 1
        if count > self.memory.state.capacity and not self._culling.target:
            raise MemoryFull(
                f"memory is full: {count} rows do not fit in {self.memory.state.capacity} slots "
                "and cull=none forgets nothing; set cull=novelty or a larger capacity"
            )

    def require_primed(self) -> None:
        """Raises Refused if there is nothing to read."""
        if self.memory.account.position == NOWHERE:
            raise Refused("nothing to read: prime the brain with a prompt first")

    @property
    def leaves_range(self) -> bool:
        """Whether the next tick renumbers the rows, or warns that it does not."""
        warns = self._rebases or False not in self._warned
        return warns and self.memory.account.position >= self._trained

    def stay_in_range(self, tokens: int, *, long_text: bool = False) -> bool:
        """Before ``tokens`` more positions are taken: renumbers the rows, or warns, if that would
        leave the range the model was trained on. Returns whether it renumbered. A text that is
        read by chunks is no reason to leave it, even where positions are to be kept.
        """
        last = self.memory.account.position + tokens - 1
        if last < self._trained:
            return False
        renumbers = self._rebases or (long_text and self._has_room_to_renumber)
        if renumbers:
            self.settle()
            self.memory.rebase()
        if not self._rebases and renumbers not in self._warned:
            self._warned.add(renumbers)
            model = f"{self.memory.checkpoint.name} was trained on ({self._trained})"
            warn(
                f"the text is longer than the range {model}: rows are renumbered as it is read"
                if renumbers
                else f"position {last} is past the range {model}: expect the text to degrade; "
                "positions=rebase renumbers the rows"
            )
        return renumbers
