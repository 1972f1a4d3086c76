"""The Brain: a model, its memory and the loop, as their user sees them.

Every method checks what it is given and calls what does it: ``loop.py`` makes ticks, ``edits.py``
puts rows into the memory, ``compiled/`` computes. Nothing is computed here.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brain import edits, saves
from brain.actions import Action, Append, Edit, Limits, integer, listed, resolve, token_ids
from brain.checkpoints import Checkpoint
from brain.chunks import Chunks
from brain.config.settings import Settings
from brain.edits import Row
from brain.errors import Refused, shown
from brain.loop import Loop
from brain.memory import Memory
from brain.mirror import Mirror, mirror_of, source_number
from brain.policies import CustomPolicy
from brain.repair import Repair
from brain.speculate import Lookahead
from brain.tick import Detokenizer, Observer, Tick, has_queue
from compiled.choose import UNFORCED, Forced
from compiled.graphs import Graphs
from compiled.read import Reading, trimmed
from compiled.score import MOST_CULLED
from compiled.state import Cursor, State

MOST_POSITIONS = 1 << 40
"""Positions below this are exact in every computation made with them."""


class Brain:
    """A language model that thinks inside a fixed amount of memory.

    Made by :func:`brain.open`. Every method checks what it is given before it changes anything and
    raises :class:`brain.Refused` with one clear line.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Settings) -> None:
        """Allocates the memory. Raises Refused where it cannot be had."""
        self.checkpoint = checkpoint
        self.settings = settings
        self.tokenizer = checkpoint.tokenizer
        settings.check_against(checkpoint.config)
        self.memory = Memory(checkpoint, settings)
        self.loop = Loop(self.memory, settings)
        trained = checkpoint.config.max_position_embeddings
        self.lookahead = Lookahead(self.memory, settings, trained)
        self.chunks = Chunks(self.loop, settings)
        self._unforced = self._forced([UNFORCED], "model")
        self._unforced_ahead = self._forced([UNFORCED] * self.lookahead.width, "model")
        keep_score = settings.graphs.eviction.keep_score
        if isinstance(keep_score, CustomPolicy):
            keep_score.try_out(self.state, self.cursor, compiled=settings.graphs.compiled)
        if settings.conf.nvtx:
            import nvtx

            self.graphs.ranges = nvtx.annotate

    # Looking

    def __len__(self) -> int:
        """Number of valid rows."""
        return self.memory.account.count

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self.state.capacity

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.memory.device

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
        return self.memory.account.tick

    @property
    def mirror(self) -> Mirror:
        """A snapshot of what is remembered, in text order."""
        return mirror_of(self.state, self.decode)

    @property
    def observer(self) -> Observer | None:
        """Called in every tick before its patch, to look at what each step received and returned.
        While there is one, every pass is a single tick; chunks of a long text are not shown.
        """
        return self.loop.observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        self.loop.observer = observer

    def encode(self, text: str, source: str = "user", *, special: bool | None = None) -> list[int]:
        """Text to ids: nothing added, nothing dropped.

        Args:
            text: Any text.
            source: Who it comes from: one of ``brain.mirror.SOURCES``.
            special: Whether special tokens written out in it become control tokens. None: as the
                setting ``special`` says; where that is null, unless the source is ``tool``.
        Raises:
            Refused: It is no text, or the vocabulary cannot spell it.
        """
        if not isinstance(text, str):
            raise Refused(f"encode: {shown(text)} is not a text")
        source_number(source)
        if special is None:
            special = self.settings.conf.special
        return self.tokenizer.encode(text, special=source != "tool" if special is None else special)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, control tokens included."""
        return self.tokenizer.decode(ids)

    def read(
        self, tokens: Sequence[int] | None = None, positions: Sequence[int] | None = None
    ) -> Reading:
        """Step 1 without sampling: reads, and leaves every byte of the memory as it was.

        Args:
            tokens: T >= 1 token ids. None re-reads the last token (or the pending one).
            positions: T distinct positions; every token sees the rows and tokens before its own.
                None: those after everything said so far.
        Returns:
            Logits [T, vocab] float32, new keys and values, attention mass.
        Raises:
            Refused: There is nothing to read, or the tokens or positions cannot be read.
        """
        self.loop.settle()
        memory, graphs = self.memory, self.graphs
        if tokens is None:
            if positions is not None:
                raise Refused("read: positions were given without tokens")
            self.loop.require_primed()
            ids, padding = [], []
            asked = (memory.cursor.token, memory.cursor.position, graphs.one)
        else:
            ids = token_ids(tokens, self.checkpoint.config.vocab_size, "read: tokens")
            where = self._checked_positions(positions, len(ids))
            padding = [0] * (graphs.read_width(len(ids)) - len(ids))
            asked = (
                memory.int64([*ids, *padding]),
                memory.int64([*where, *padding]),
                memory.int64(len(ids)),
            )
        graphs.begin_step()
        reading = graphs.read(*asked, high_water=memory.account.high_water)
        if padding:
            reading = trimmed(reading, len(ids))
        if graphs.compiled and self.device.type == "cuda":
            # Outputs of a captured graph are overwritten by its next replay.
            reading = Reading(*(tensor.clone() for tensor in reading))
        return reading

    def _checked_positions(self, positions: Sequence[int] | None, length: int) -> list[int]:
        if positions is None:
            first = self.memory.account.position + 1
            return list(range(first, first + length))
        checked = []
        for position in listed(positions, "read: positions"):
            number = integer(position)
            if number is None:
                raise Refused(f"read: position {position!r} is not an integer")
            if not 0 <= number < MOST_POSITIONS:
                raise Refused(f"read: position {position} is not in 0 to {MOST_POSITIONS - 1}")
            checked.append(number)
        if len(checked) != length:
            raise Refused(f"read: {length} tokens at {len(checked)} positions")
        if len(set(checked)) != len(checked):
            raise Refused("read: two tokens at one position")
        return checked

    # Step 0

    def prime(
        self,
        context: str | Sequence[int],
        source: str = "user",
        *,
        special: bool | None = None,
    ) -> None:
        """Replaces the context. Afterwards all N tokens are remembered at positions 0 to N - 1, and
        the first tick re-reads the last of them.

        A text of more tokens than there are slots is read with forgetting: its first rows, as many
        as the loop keeps, are remembered as above, and the rest is fed (``feed_in_chunks``). Then
        ``len`` is what the loop keeps (one less where a single token was fed), the last token is
        pending, and each token that was fed has been a tick.

        A prompt longer than ``engine.chunk`` leaves an empty memory if it is interrupted; one that
        is fed has been read up to its last chunk.

        Args:
            context: Ids, taken literally, or text, which gets BOS if the model wants it.
            source: Who it comes from: one of ``brain.mirror.SOURCES``.
            special: Of a text, as for ``encode``.
        Raises:
            Refused: It is empty, not of the vocabulary, or does not fit where nothing is forgotten.
        """
        first, rest = self.prompt_ids(context, source, special=special)
        self._remember(first, source_number(source))
        for _ in self._feed_in_chunks(rest, source):
            pass

    def prompt_ids(
        self,
        context: str | Sequence[int],
        source: str = "user",
        *,
        special: bool | None = None,
    ) -> tuple[list[int], list[int]]:
        """The tokens that ``prime`` makes of a context: those that it remembers as they are, and
        those that it feeds. Arguments and refusals as there.
        """
        if isinstance(context, str):
            ids = self.encode(context, source, special=special)
            context = self.tokenizer.with_bos(ids) if context else []
        ids = token_ids(context, self.checkpoint.config.vocab_size, "prompt")
        if len(ids) <= self.capacity:
            return ids, []
        target = self.settings.culling.target
        if not target:
            raise Refused(
                f"prompt has {len(ids)} tokens but capacity is {self.capacity} and cull=none "
                f"forgets nothing: set cull=novelty, or capacity={len(ids)} or more"
            )
        return ids[:target], ids[target:]

    def _remember(self, ids: Sequence[int], number: int) -> None:
        """Replaces the context by so many tokens, which fit."""
        rows = [Row(token, position, number) for position, token in enumerate(ids)]
        before, detokenizer = self.memory.account, self.loop.detokenizer
        index = self.loop.index
        try:
            self.loop.detokenizer = Detokenizer(self.tokenizer)
            if len(rows) <= self.graphs.chunk:
                edits.replace_all(self.memory, index, rows)
            else:
                self.memory.forget_everything()
                index.update()
                uncaptured = self.graphs.uncaptured
                edits.append_in_chunks(self.memory, index, uncaptured, rows, Edit(), None)
        except BaseException:
            if self.memory.account is before:
                self.loop.detokenizer = detokenizer
            raise

    # The loop

    def tick(self, token: int | None = None) -> Tick:
        """One tick: reads, speaks one token, forgets, remembers.

        With ``token`` it speaks that one, as if it had drawn it: to replay a record.
        """
        if token is None:
            return self.loop.tick(self._unforced)
        vocab_size = self.checkpoint.config.vocab_size
        return self.loop.tick(self._forced(token_ids([token], vocab_size, "tick"), "model"))

    def speak(self, most: int | None = None) -> tuple[Tick, ...]:
        """One pass of the loop: a tick, or with ``lookup`` as many as came true, ``most`` at most.

        They say what single ticks would say; a token that ends the text is the last of a pass.
        While there is an observer, every tick is a pass of its own, to be looked at.
        """
        if most is not None and (integer(most) or 0) < 1:
            raise Refused(f"speak: a number of at least 1, not {shown(most)}")
        observed = self.loop.observer is not None
        proposal = None if observed else self.lookahead.proposal(most)
        if proposal is None:
            ticks: tuple[Tick, ...] = (self.loop.tick(self._unforced),)
        else:
            ticks = self.loop.ticks_ahead(proposal, self._unforced_ahead)
        if not observed:  # even if the observer has left meanwhile: nothing was followed for it
            self.lookahead.look(ticks)
        self.lookahead.counts.add(ticks)
        return ticks

    @property
    def may_queue(self) -> bool:
        """Whether the next tick may be launched before the token of the last one has arrived: the
        device works by itself, and no observer, lookup or repair has to see that token first; nor
        is anything said, or renumbered, before the next read.
        """
        return (
            has_queue(self.device)
            and self.loop.observer is None
            and self.settings.graphs.lookup is None
            and not self.loop.repairs.due
            and not self.loop.leaves_range
        )

    def replay(self, ids: Sequence[int]) -> tuple[Tick, ...]:
        """One pass of several given tokens, as ``speak`` made it once: to replay a record."""
        self.loop.require_primed()
        checked = token_ids(ids, self.checkpoint.config.vocab_size, "replay")
        proposal = self.lookahead.replayed(checked)
        rest = [UNFORCED] * (self.lookahead.width - len(checked))
        return self.loop.ticks_ahead(proposal, self._forced([*checked, *rest], "model"))

    def stream(self, ticks: int | None = None, *, stop_at_eos: bool = False) -> Iterator[Tick]:
        """Ticks for ever, or for a number of ticks, or until the model ends its text.

        With ``stop_at_eos`` the token that ends the text is spoken and is the last. With
        ``lookup`` the memory may be some ticks ahead of the one that is yielded: it is where the
        last tick of its pass left it.
        """
        if ticks is not None and (integer(ticks) or 0) < 1:
            raise Refused(f"ticks must be a number of at least 1, not {shown(ticks)}")
        self.loop.require_primed()
        return self._stream(ticks, stop_at_eos)

    def _stream(self, ticks: int | None, stop_at_eos: bool) -> Iterator[Tick]:
        spoken = 0
        while ticks is None or spoken < ticks:
            for tick in self.speak(None if ticks is None else ticks - spoken):
                spoken += 1
                yield tick
                if stop_at_eos and tick.token in self.tokenizer.eos_ids:
                    return

    def feed(
        self, ids: str | Sequence[int], source: str = "user", *, special: bool | None = None
    ) -> Tensor:
        """Teacher-forced ticks: these tokens instead of sampled ones. The last one is left pending,
        as after any tick.

        Args:
            ids: Token ids, taken literally, or text, which ``encode`` turns into them.
            source: Who they come from.
            special: Of a text, as for ``encode``.
        Returns:
            The negative log-likelihood of each in nats: [len(ids)] float32 on the host.
        Raises:
            Refused: They are not of the vocabulary, or do not fit where nothing is forgotten.
        """
        if isinstance(ids, str):
            ids = self.encode(ids, source, special=special)
        checked = token_ids(ids, self.checkpoint.config.vocab_size, "feed")
        source_number(source)
        self.loop.require_room(len(checked))
        if len(checked) > self.settings.conf.cull.chunk > 1:
            parts = list(self._feed_in_chunks(checked, source))
            return torch.tensor([nats for part in parts for nats in part], dtype=torch.float32)
        # Of each tick no more is kept than is asked for: a text may be long.
        nats = [self.loop.tick(self._forced([token], source)).arriving for token in checked]
        self.loop.settle()
        return torch.tensor([float(copy.wait()[0]) for copy in nats], dtype=torch.float32)

    def feed_in_chunks(self, ids: Sequence[int], source: str = "user") -> Iterator[list[float]]:
        """``feed`` of a text of any length, chunk by chunk: yields the nats of each when its tokens
        are part of the memory. Stop asking, and the text has been read up to there.
        """
        checked = token_ids(ids, self.checkpoint.config.vocab_size, "feed")
        source_number(source)
        self.loop.require_room(len(checked))
        return self._feed_in_chunks(checked, source)

    def _feed_in_chunks(self, ids: Sequence[int], source: str) -> Iterator[list[float]]:
        number, start = source_number(source), 0
        while start < len(ids):
            end = start + self.chunks.size(len(ids) - start)
            part = ids[start:end]
            if len(part) == 1:
                yield [self.loop.tick(self._forced(part, source)).surprise]
            else:
                yield self.chunks.feed(part, number)
            start = end

    def finish_text(self) -> str:
        """What the stream still owes: U+FFFD for a character never completed, else nothing."""
        return self.loop.detokenizer.finish()

    @property
    def most_pinned(self) -> int:
        """Rows that may be pinned: with more, a tick might find none that it may forget."""
        culling = self.settings.culling
        if not culling.target:
            return self.capacity
        return culling.target - culling.sinks - culling.recent - MOST_CULLED

    # Step 4

    def patch(self, actions: Sequence[Action]) -> None:
        """Applies a batch of actions wholly, or refuses it with nothing changed.

        Rows to append or put in place are first read against the memory as it is before the
        batch, and against each other. An append also commits the pending token, if there is one.

        Where appending would leave the trained range, positions are renumbered first, and stay so
        whatever comes after: an exception then has a note that says it.
        """
        self.loop.settle()
        index, account = self.loop.index, self.memory.account
        index.update()
        limits = Limits(
            vocab_size=self.checkpoint.config.vocab_size,
            capacity=self.capacity,
            count=account.count,
            unforgettable=self.most_pinned,
            chunk=self.graphs.chunk,
            erasable=self.graphs.patched,
            pending=account.uncommitted,
        )
        edit = resolve(actions, index, limits)
        if edit.rewinds:
            edits.edit(self.memory, index, edit)
            self.resume_text(b"")  # what was said last may have ended amid a character
            return
        if not edit.appending or not self.loop.stay_in_range(1 + len(edit.appending)):
            edits.edit(self.memory, index, edit)
            return
        try:
            # The index still says where rows stood before they were renumbered.
            edits.edit(self.memory, index, edit.moved(index.positions))
        except BaseException as error:
            error.add_note("positions have been renumbered before that: look at the mirror")
            raise

    def apply(self, actions: Sequence[Action]) -> None:
        """A batch for a brain that is running: as ``patch``, but what is appended is fed, so
        that a full memory forgets to make room for it.

        Refused as a whole. What has been forgotten cannot be brought back: an exception from amid
        those tokens has a note that says how many are missing.
        """
        actions = listed(actions, "actions")
        appended = [action for action in actions if isinstance(action, Append)]
        rest = [action for action in actions if not isinstance(action, Append)]
        if not appended or not self.settings.culling.target:
            self.patch(actions)
            return
        self.loop.require_primed()
        vocab_size = self.checkpoint.config.vocab_size
        fed = [(token_ids(a.ids, vocab_size, "Append"), a.source) for a in appended]
        for _, source in fed:
            source_number(source)
        self.loop.settle()
        if rest:
            self.patch(rest)  # after all checks but its own: the batch is refused as a whole
        before = self.ticks
        try:
            for ids, source in fed:
                self.feed(ids, source)
        except BaseException as error:
            missing = sum(len(ids) for ids, _ in fed) - (self.ticks - before)
            error.add_note(f"the batch is done but for the last {missing} tokens to append")
            raise

    def warm_up(self, *, edits: bool = True) -> Iterator[str]:
        """Captures every graph, or without ``edits`` those of ticks alone, yielding each one's name
        before it is compiled. Changes nothing that is remembered. Does nothing in eager mode.
        """
        return self.graphs.warm_up(edits=edits)

    # Saving

    def snapshot(self) -> saves.Snapshot:
        """Copies on the host of everything that the brain is at this moment."""
        self.loop.settle()
        return saves.Snapshot(
            model_sha256=self.checkpoint.sha256,
            rows=saves.occupied_rows(self.state),
            cursor=Cursor(*(tensor.cpu().clone() for tensor in self.cursor)),
            high_water=self.memory.account.high_water,
            unfinished=self.unfinished,
            conf=saves.plain(self.settings.conf),
            policy_sha256=self.settings.policy_sha256,
            vocabulary_sha256=self.checkpoint.vocabulary_sha256,
        )

    def resume(self, snapshot: saves.Snapshot) -> None:
        """Becomes what a snapshot holds, which ``saves.read`` has checked. Settings stay."""
        try:
            edits.restore(self.memory, snapshot.rows, snapshot.cursor, snapshot.high_water)
        finally:  # where that fails, nothing is remembered
            self.resume_text(snapshot.unfinished)

    def save(self, folder: str | Path, notes: Any = None) -> None:
        """Writes the whole brain to a folder; ``brain.load`` goes on with the same token.

        Args:
            folder: A new one, or one that holds a save, which is replaced.
            notes: Plain JSON that ``restore`` returns.
        Raises:
            Refused: The folder holds anything else, or cannot be written.
        """
        saves.write(folder, self.snapshot(), notes)

    def restore(self, folder: str | Path) -> Any:
        """Becomes the brain that was saved in a folder, with the settings of this one.

        Args:
            folder: Where it was saved.
        Returns:
            The notes that were saved with it.
        Raises:
            OtherModel: It was saved with another model. Nothing has changed.
            Refused: The save is damaged or does not fit. Nothing has changed.
        """
        snapshot, notes = saves.read(
            folder,
            self.checkpoint,
            self.state,
            self.cursor,
            self.most_pinned,
            self.settings.policy_sha256,
        )
        self.resume(snapshot)
        return notes

    @property
    def unfinished(self) -> bytes:
        """The bytes of a character that the stream has begun and not completed."""
        return self.loop.detokenizer.unfinished

    def resume_text(self, unfinished: bytes) -> None:
        """Takes another beginning of a character for the one that the stream has begun."""
        self.loop.detokenizer = Detokenizer(self.tokenizer, unfinished)

    def best_repair(self) -> Repair | None:
        """The repair of the dimmest pair of rows that may go, if it gains enough. Changes nothing:
        ``patch([repair.action])`` does.
        """
        self.loop.require_primed()
        self.loop.settle()
        return self.loop.repairs.best()

    def _forced(self, tokens: Sequence[int], source: str) -> Forced:
        number = torch.tensor(source_number(source), dtype=torch.uint8, device=self.device)
        return Forced(self.memory.int64(list(tokens)), number.repeat(len(tokens)))
