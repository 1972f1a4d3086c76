"""The Brain: a model, its memory and the loop. Wiring only.

    0/4 patch → 1 read and sample → 2 score brightness → 3 decide what to forget → repeat

Steps 1 to 3 return new tensors; the patch alone writes. One tick is ``_one_tick``: read, choose,
patch, three calls with no number crossing between host and device.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brain import saves
from brain.actions import Action, Append, Edit, Limits, integer, listed, resolve, token_ids
from brain.checkpoints import Checkpoint
from brain.config.settings import Settings
from brain.edits import Row, Told
from brain.errors import MemoryFull, Refused, shown, warn
from brain.machine.signals import Uninterrupted
from brain.memory import Account, Memory
from brain.mirror import Mirror, mirror_of, source_number
from brain.naming import CHOOSE, PATCH, READ, WARM_UP, WHOLE_TICK, nvtx_ranges
from brain.repair import Repair, best_repair, dimmest_pair
from brain.speculate import Lookahead
from brain.tick import Observer, Speech, Step, Tick
from brain.tokens import StreamDecoder
from compiled.choose import UNFORCED, Forced
from compiled.graphs import Graphs
from compiled.lookup import Proposal
from compiled.patch import Plan
from compiled.read import Reading, trimmed
from compiled.score import MOST_CULLED, Forgetting, cull_count, may_go
from compiled.state import NOWHERE, Cursor, State
from conf.schema import Conf

MOST_POSITIONS = 1 << 40
"""Positions below this are exact in every computation made with them."""


@dataclass
class _Made:
    """A repair that a tick began with. If the tick is interrupted, the next attempt at it finds the
    memory of ``account`` as it was left, and makes no second one.
    """

    repair: Repair
    account: Account
    told: bool = False


class Brain:
    """A language model that thinks inside a fixed amount of memory.

    Made by :func:`brain.open`. Every method checks what it is given before it changes anything and
    raises :class:`brain.Refused` with one clear line.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Settings, conf: Conf) -> None:
        self.checkpoint = checkpoint
        self.settings = settings
        self.conf = conf  # what ``settings`` were made from; kept to be saved
        self.tokenizer = checkpoint.tokenizer
        settings.check_against(checkpoint.config)
        self.memory = Memory(checkpoint, settings)
        self.graphs.naming = nvtx_ranges() if settings.nvtx else None
        self.device = self.memory.device
        trained = checkpoint.config.max_position_embeddings
        self.lookahead = Lookahead(self.memory, settings, trained)
        self.observer: Observer | None = None
        self.on_repair: Callable[[Repair], None] | None = None  # told of every repair made
        self._unforced = self._forced([UNFORCED], "model")
        self._unforced_ahead = self._forced([UNFORCED] * self.lookahead.width, "model")
        self._warned_of_range = False
        self._made: _Made | None = None
        self._speech = self._new_speech()

    # Looking

    def __len__(self) -> int:
        """Number of valid rows."""
        return self.memory.count

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self.state.capacity

    @property
    def state(self) -> State:
        """The tensors of the memory. To look at: only the patch writes them."""
        return self.memory.state

    @property
    def graphs(self) -> Graphs:
        """The read, the patch and the rest, eager or captured."""
        return self.memory.graphs

    @property
    def cursor(self) -> Cursor:
        """The token that the next tick reads."""
        return self.memory.cursor

    @property
    def ticks(self) -> int:
        """Ticks since the last prime."""
        return self.memory.tick

    @property
    def mirror(self) -> Mirror:
        """A snapshot of what is remembered, in text order."""
        return mirror_of(self.state, self.decode)

    def encode(self, text: str) -> list[int]:
        """Text to ids: nothing added, nothing dropped."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, control tokens included."""
        return self.tokenizer.decode(ids)

    def read(
        self, tokens: Sequence[int] | None = None, positions: Sequence[int] | None = None
    ) -> Reading:
        """Step 1 without sampling: reads, and leaves every byte of the memory as it was.

        Without arguments, re-reads the last token (or the pending one). Otherwise any T >= 1
        tokens at any T distinct positions; every token sees the rows and tokens before its own
        position. ``positions`` default to those after everything said so far.
        """
        if tokens is None:
            if positions is not None:
                raise Refused("read: positions were given without tokens")
            self._require_primed()
            self.graphs.begin_step()
            reading = self.memory.read_cursor()
        else:
            ids = token_ids(tokens, self.checkpoint.config.vocab_size, "read: tokens")
            if positions is None:
                first = self.memory.position + 1
                where = list(range(first, first + len(ids)))
            else:
                at = listed(positions, "read: positions")
                where = [self._checked_position(position) for position in at]
            if len(where) != len(ids):
                raise Refused(f"read: {len(ids)} tokens at {len(where)} positions")
            if len(set(where)) != len(where):
                raise Refused("read: two tokens at one position")
            self.graphs.begin_step()
            length = len(ids)
            width = self.graphs.width_for(length)
            reading = trimmed(self.memory.read_padded(ids, where, width), length)
        if self.graphs.compiled and self.device.type == "cuda":
            # Outputs of a captured graph are overwritten by its next replay.
            reading = Reading(*(tensor.clone() for tensor in reading))
        return reading

    # Step 0

    def prime(self, context: str | Sequence[int], source: str = "user") -> None:
        """Replaces the context. Ids are taken literally; text gets BOS if the model wants it.

        Afterwards all N tokens are remembered at positions 0 to N - 1, and the first tick
        re-reads the last of them.
        """
        if isinstance(context, str):
            context = self.tokenizer.initial_prompt(context) if context else []
        ids = token_ids(context, self.checkpoint.config.vocab_size, "prompt")
        if len(ids) > self.capacity:
            raise Refused(
                f"prompt has {len(ids)} tokens but capacity is {self.capacity}: "
                f"shorten it or set capacity={len(ids)} or more"
            )
        number = source_number(source)
        rows = [Row(token, position, number) for position, token in enumerate(ids)]
        before, speech = self.memory.account, self._speech
        try:
            self._speech = self._new_speech()
            self.memory.begin(rows, self.mirror.emptied())
        except BaseException:
            if self.memory.account is before:
                self._speech = speech
            raise

    # The loop

    def tick(self, token: int | None = None) -> Tick:
        """One tick: reads, speaks one token, forgets, remembers.

        With ``token`` it speaks that one, as if it had drawn it: to follow what has been said.
        """
        if token is None:
            return self._advance(self._unforced)
        vocab_size = self.checkpoint.config.vocab_size
        return self._advance(self._forced(token_ids([token], vocab_size, "tick"), "model"))

    def speak(self, most: int | None = None) -> tuple[Tick, ...]:
        """One pass of the loop: a tick, or with ``lookup`` as many as came true, ``most`` at most.

        They say what single ticks would say; a token that ends the text is the last of a pass.
        While there is an observer, every tick is a pass of its own, to be looked at.
        """
        if most is not None and (integer(most) or 0) < 1:
            raise Refused(f"speak: a number of at least 1, not {shown(most)}")
        ahead, observed = self.lookahead, self.observer is not None
        proposal = None if observed else ahead.proposal(most)
        if proposal is None:
            ticks: tuple[Tick, ...] = (self.tick(),)
        else:
            ticks = self._advance_ahead(proposal, self._unforced_ahead)
        if not observed:  # even if the observer has left meanwhile: nothing was followed for it
            ahead.look(ticks)
        ahead.account.add(ticks)
        return ticks

    def retell(self, ids: Sequence[int]) -> tuple[Tick, ...]:
        """A pass of several tokens once more: to follow what ``speak`` has said, as ``tick`` does
        with a token.
        """
        self._require_primed()
        checked = token_ids(ids, self.checkpoint.config.vocab_size, "retell")
        proposal = self.lookahead.told(checked)
        rest = [UNFORCED] * (self.lookahead.width - len(checked))
        return self._advance_ahead(proposal, self._forced([*checked, *rest], "model"))

    def stream(self, ticks: int | None = None, *, stop_at_eos: bool = False) -> Iterator[Tick]:
        """Ticks for ever, or for a number of ticks, or until the model ends its text.

        With ``stop_at_eos`` the token that ends the text is spoken and is the last. With
        ``lookup`` the memory may be some ticks ahead of the one that is yielded: it is where the
        last tick of its pass left it.
        """
        if ticks is not None and (integer(ticks) or 0) < 1:
            raise Refused(f"ticks must be a number of at least 1, not {shown(ticks)}")
        self._require_primed()
        return self._stream(ticks, stop_at_eos)

    def _stream(self, ticks: int | None, stop_at_eos: bool) -> Iterator[Tick]:
        spoken = 0
        while ticks is None or spoken < ticks:
            for tick in self.speak(None if ticks is None else ticks - spoken):
                spoken += 1
                yield tick
                if stop_at_eos and tick.token in self.tokenizer.eos_ids:
                    return

    def feed(self, ids: Sequence[int], source: str = "user") -> Tensor:
        """Teacher-forced ticks: these tokens instead of sampled ones.

        Returns the negative log-likelihood in nats of each: [len(ids)] float32 on the host. The
        last one is left pending, as after any tick.
        """
        checked = token_ids(ids, self.checkpoint.config.vocab_size, "feed")
        source_number(source)
        self._require_room(len(checked))
        # Of each tick no more is kept than is asked for: a text may be long.
        nats = [self._advance(self._forced([token], source)).arriving for token in checked]
        return torch.tensor([float(copy.wait()[0]) for copy in nats], dtype=torch.float32)

    def finish_text(self) -> str:
        """What the stream still owes: U+FFFD for a character never completed, else nothing."""
        return self._speech.finish()

    @property
    def most_pinned(self) -> int:
        """Rows that may be pinned: of more, a tick might find none that it may forget."""
        forgetting = self._forgetting
        if not forgetting.target:
            return self.capacity
        return forgetting.target - forgetting.sinks - forgetting.recent - MOST_CULLED

    # Step 4

    def patch(self, actions: Sequence[Action]) -> None:
        """Applies a batch of actions wholly, or refuses it with nothing changed.

        Rows to append or put in place are first read against the memory as it is before the
        batch, and against each other. An append also commits the pending token, if there is one.

        Where appending would leave the trained range, positions are renumbered first, and stay so
        whatever comes after: an exception then has a note that says it.
        """
        mirror = self.mirror
        edit = resolve(actions, mirror, self._limits())
        renumbered = bool(edit.appending) and self._stay_in_range(1 + len(edit.appending))
        try:
            if renumbered:
                edit, mirror = edit.moved(mirror.position.tolist()), self.mirror
            self._commit(edit, mirror)
        except BaseException as error:
            if renumbered:
                error.add_note("positions have been renumbered before that: look at the mirror")
            raise

    def _commit(self, edit: Edit, mirror: Mirror) -> None:
        rows = [Row(*row) for row in edit.replacing]
        pending: Told | None = None
        if edit.appending:
            rows += [
                Row(token, self.memory.position + 1 + offset, source)
                for offset, (token, source) in enumerate(edit.appending)
            ]
            if self.memory.uncommitted:
                held = self.memory.cursor
                rows.append(Row(int(held.token[0]), self.memory.position, int(held.source[0])))
                pending = Told(float(held.surprise[0]), float(held.novelty[0]))
        rows.sort(key=lambda row: row.position)
        self.memory.commit(rows, edit, mirror, pending)

    def apply(self, actions: Sequence[Action]) -> None:
        """A batch for a brain that is running: as ``patch``, but what is appended passes through
        the loop token by token, so that a full memory forgets to make room for it.

        Refused as a whole. What has been forgotten cannot be brought back: an exception from amid
        those tokens has a note that says how many are missing.
        """
        actions = listed(actions, "actions")
        appended = [action for action in actions if isinstance(action, Append)]
        rest = [action for action in actions if not isinstance(action, Append)]
        if not appended or not self._forgetting.target:
            self.patch(actions)
            return
        self._require_primed()
        vocab_size = self.checkpoint.config.vocab_size
        fed = [(token_ids(a.ids, vocab_size, "Append"), a.source) for a in appended]
        for _, source in fed:
            source_number(source)
        if rest:
            self.patch(rest)  # after all checks but its own: the batch is refused as a whole
        before = self.memory.tick
        try:
            for ids, source in fed:
                self.feed(ids, source)
        except BaseException as error:
            missing = sum(len(ids) for ids, _ in fed) - (self.memory.tick - before)
            error.add_note(f"the batch is done but for the last {missing} tokens to append")
            raise

    def warm_up(self, *, edits: bool = True) -> Iterator[str]:
        """Captures every graph, or without ``edits`` those of ticks alone, yielding each one's name
        before it is compiled.

        Changes nothing that is remembered. Does nothing in eager mode.
        """
        if self.graphs.naming is None:
            yield from self.graphs.warm_up(edits=edits)
            return
        with self.graphs.naming(WARM_UP):
            yield from self.graphs.warm_up(edits=edits)

    def snapshot(self) -> saves.Snapshot:
        """Copies on the host of everything that the brain is at this moment."""
        return saves.Snapshot(
            model_sha256=self.checkpoint.sha256,
            rows=saves.occupied_rows(self.state),
            cursor=Cursor(*(tensor.cpu().clone() for tensor in self.cursor)),
            high_water=self.memory.high_water,
            unfinished=self.unfinished,
            conf=saves.plain(self.conf),
        )

    def resume(self, snapshot: saves.Snapshot) -> None:
        """Becomes what a snapshot holds, which ``saves.read`` has checked. Settings stay."""
        try:
            self.memory.restore(snapshot.rows, snapshot.cursor, snapshot.high_water)
        finally:  # where that fails, nothing is remembered
            self.speak_on(snapshot.unfinished)

    def save(self, folder: str | Path, notes: Any = None) -> None:
        """Writes the whole brain to a folder; ``brain.load`` goes on with the same token.

        Args:
            folder: a new one, or one that holds a save, which is replaced.
            notes: plain JSON that ``restore`` returns.

        Raises:
            Refused: the folder holds anything else, or cannot be written.

        """
        saves.write(folder, self.snapshot(), notes)

    def restore(self, folder: str | Path) -> Any:
        """Becomes the brain that was saved in a folder, with the settings of this one.

        Returns:
            The notes that were saved with it.

        Raises:
            OtherWeights: it was saved with another model. Nothing has changed.
            Refused: the save is damaged or does not fit. Nothing has changed.

        """
        snapshot, notes = saves.read(
            folder, self.checkpoint, self.state, self.cursor, self.most_pinned
        )
        self.resume(snapshot)
        return notes

    @property
    def unfinished(self) -> bytes:
        """The bytes of a character that the stream has begun and not completed."""
        return self._speech.unfinished

    def speak_on(self, unfinished: bytes) -> None:
        """Takes another beginning of a character for the one that the stream has begun."""
        self._speech = self._new_speech(unfinished)

    # Inside

    def _advance(self, forced: Forced) -> Tick:
        return self.graphs.named(WHOLE_TICK, self._one_tick, forced)

    def _one_tick(self, forced: Forced) -> Tick:
        self._require_primed()
        self._require_room(1)
        self._speech.make_room()
        rebased = self._stay_in_range(1)
        repaired = self._repair()
        culled = cull_count(self.memory.count, self._forgetting)
        count = self.memory.count - culled + int(self.memory.uncommitted)
        self.graphs.begin_step()
        named = self.graphs.named
        reading = named(READ, self.memory.read_cursor)
        choice = named(CHOOSE, self.graphs.choose, reading, forced)
        plan = choice.plan(reading)
        number, position = self.memory.tick + 1, self.memory.position + 1
        tick = Tick(number, position, count, choice, self._speech, repaired, rebased=rebased)
        if self.observer is not None:
            self.observer(Step(tick, self.memory.cursor, reading, choice, plan))
        following = self.memory.account.after(count, position, uncommitted=True)
        named(PATCH, self._keep, plan, replace(following, tick=number), [tick])
        return tick

    def _advance_ahead(self, proposal: Proposal, forced: Forced) -> tuple[Tick, ...]:
        return self.graphs.named(WHOLE_TICK, self._ticks_ahead, proposal, forced)

    def _ticks_ahead(self, proposal: Proposal, forced: Forced) -> tuple[Tick, ...]:
        self._speech.make_room()
        self._stay_in_range(1)
        self.graphs.begin_step()
        plan, ticks = self.lookahead.ticks(proposal, forced, self._speech)
        last = ticks[-1]
        following = self.memory.account.after(last.count, last.position, uncommitted=True)
        self.graphs.named(PATCH, self._keep, plan, replace(following, tick=last.number), ticks)
        return ticks

    def _keep(self, plan: Plan, account: Account, ticks: Sequence[Tick]) -> None:
        """Step 4, the account of it, and what is spoken: all three or none."""
        with Uninterrupted():
            self.memory.apply(plan, account)
            for tick in ticks:
                self._speech.follow(tick)

    @property
    def _forgetting(self) -> Forgetting:
        return self.settings.conduct.forgetting

    def _repair(self) -> tuple[Repair, ...]:
        """Every so many ticks, once there is something to forget: a repair, if one is worth it."""
        every = self.settings.repair.every
        if every == 0 or (self.memory.tick + 1) % every:
            return ()
        made = self._made
        if made is None or made.account is not self.memory.account:
            if cull_count(self.memory.count, self._forgetting) == 0:
                return ()
            repair = self.best_repair()
            if repair is None:
                return ()
            with Uninterrupted():
                self.patch([repair.action])
                made = self._made = _Made(repair, self.memory.account)
        if self.on_repair is not None and not made.told:
            self.on_repair(made.repair)
            made.told = True
        return (made.repair,)

    def best_repair(self) -> Repair | None:
        """The repair of the dimmest pair of rows that may go, if it gains enough. Changes nothing:
        ``patch([repair.action])`` does.
        """
        self._require_primed()
        settings, number = self.settings.repair, self.memory.tick + 1
        mirror = self.mirror
        candidates = may_go(self.state, self.cursor, self._forgetting)
        scores = self.settings.conduct.keep_score(self.state, self._unread())
        pair = dimmest_pair(
            scores.cpu().numpy()[mirror.slot], candidates.cpu().numpy()[mirror.slot]
        )
        if pair is None:
            return None
        return best_repair(mirror, pair, number, settings, self._log_probabilities)

    def _log_probabilities(self, token: int, position: int) -> Tensor:
        """Of what follows a token read as of a position: [vocab] float32 on the host."""
        return torch.log_softmax(self.read([token], [position]).logits[-1], -1).cpu()

    def _unread(self) -> Reading:
        """What no token has read: for a policy to be asked between two ticks."""
        nothing = torch.zeros(0, device=self.device)
        return Reading(nothing, nothing, nothing, torch.zeros_like(self.state.brightness), nothing)

    def _limits(self) -> Limits:
        return Limits(
            vocab_size=self.checkpoint.config.vocab_size,
            capacity=self.capacity,
            unforgettable=self.most_pinned,
            chunk=self.graphs.chunk,
            pending=self.memory.uncommitted,
        )

    def _require_primed(self) -> None:
        if self.memory.position == NOWHERE:
            raise Refused("nothing to read: prime the brain with a prompt first")

    def _require_room(self, ticks: int) -> None:
        # The first of them commits what is pending, each other one what the last one spoke.
        count = self.memory.count + int(self.memory.uncommitted) + ticks - 1
        if count > self.capacity and not self._forgetting.target:
            raise MemoryFull(
                f"memory is full: {count} rows do not fit in {self.capacity} slots and cull=none "
                "forgets nothing; set cull=brightness or a larger capacity"
            )

    def _checked_position(self, position: int) -> int:
        number = integer(position)
        if number is None:
            raise Refused(f"read: position {position!r} is not an integer")
        if not 0 <= number < MOST_POSITIONS:
            raise Refused(f"read: position {position} is not in 0 to {MOST_POSITIONS - 1}")
        return number

    def _stay_in_range(self, tokens: int) -> bool:
        """Before ``tokens`` more positions are taken: renumbers the rows, or warns, if that would
        leave the range the model was trained on. Returns whether it renumbered.
        """
        trained = self.checkpoint.config.max_position_embeddings
        last = self.memory.position + tokens - 1
        if last < trained:
            return False
        if self.settings.rebases:
            self.memory.rebase()
            return True
        if not self._warned_of_range:
            self._warned_of_range = True
            warn(
                f"position {last} is past the range {self.checkpoint.name} was trained on "
                f"({trained}): expect the text to degrade; positions=rebase renumbers the rows"
            )
        return False

    def _new_speech(self, unfinished: bytes = b"") -> Speech:
        decoder = StreamDecoder(self.tokenizer, at_start=False)
        decoder.go_on(unfinished)
        return Speech(decoder)

    def _tensor(self, values: int | Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _forced(self, tokens: Sequence[int], source: str) -> Forced:
        number = torch.tensor(source_number(source), dtype=torch.uint8, device=self.device)
        return Forced(self._tensor(tokens), number.repeat(len(tokens)))
