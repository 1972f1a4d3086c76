"""One pass of the loop, as its caller sees it.

The numbers of a tick are copied to the host asynchronously: the loop itself never waits for them.
Only asking a ``Tick`` for its token, text or surprise does.
"""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from brain.errors import NotFinite
from brain.machine.signals import Uninterrupted
from brain.memory import Account
from brain.repair import Repair
from brain.tokens import StreamDecoder, Tokenizer
from compiled.choose import Choice
from compiled.plan import Plan
from compiled.read import Reading
from compiled.state import NOWHERE, Cursor

MOST_WAITING = 8
"""Ticks whose text may be waiting to be asked for when a pass begins. Bounds what an endless loop
keeps.
"""


class HostCopy:
    """A small tensor on its way to the host; it is there once ``arrival`` has happened."""

    def __init__(self, tensor: Tensor, arrival: torch.cuda.Event | None = None) -> None:
        self._tensor, self._arrival = tensor, arrival

    def wait(self) -> Tensor:
        """The tensor on the host, once it has arrived."""
        if self._arrival is not None:
            self._arrival.synchronize()
            self._arrival = None
        return self._tensor


def has_queue(device: torch.device) -> bool:
    """Whether a device works through what it is sent while the host goes on."""
    return device.type == "cuda"


def host_copies(*tensors: Tensor) -> tuple[HostCopy, ...]:
    """Small tensors of one device, sent to the host together, without waiting."""
    device = tensors[0].device
    if not has_queue(device):
        return tuple(map(HostCopy, tensors))
    sent = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
    for copied, tensor in zip(sent, tensors, strict=True):
        copied.copy_(tensor, non_blocking=True)
    arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrival.record(torch.cuda.current_stream(device))
    return tuple(HostCopy(copied, arrival) for copied in sent)


class Detokenizer:
    """Turns tokens into text in the order they were spoken, however late they are asked for."""

    def __init__(self, tokenizer: Tokenizer, unfinished: bytes = b"") -> None:
        """``unfinished``: bytes of a character that the stream has begun."""
        self._decoder = StreamDecoder(tokenizer, at_start=False)
        self._decoder.go_on(unfinished)
        self._waiting: deque[Tick] = deque()

    def make_room(self) -> None:
        """Decodes the oldest ticks where as many wait as may."""
        while len(self._waiting) >= MOST_WAITING:
            self._decode_one()

    def follow(self, tick: "Tick") -> None:
        """Queues a tick that is done. Cannot fail."""
        self._waiting.append(tick)

    def pass_by(self, ids: Sequence[int]) -> None:
        """Takes tokens whose text nobody asks for, once every tick has its own."""
        for token in ids:
            self._decoder.push(token)

    def decode_until(self, tick: "Tick") -> None:
        """Gives every tick up to this one its text."""
        while tick._text is None:
            self._decode_one()

    def decode_all(self) -> None:
        """Gives every tick its text."""
        while self._waiting:
            self._decode_one()

    def drop_void(self) -> "list[Tick]":
        """Takes the first tick that has not happened, and those after it, out of the queue."""
        happened = list(takewhile(lambda tick: not tick.not_finite, self._waiting))
        void = list(self._waiting)[len(happened) :]
        self._waiting = deque(happened)
        return void

    @property
    def unfinished(self) -> bytes:
        """The bytes of a character that has begun and is not complete."""
        self.decode_all()
        return self._decoder.unfinished

    def finish(self) -> str:
        """What is left of an unfinished character."""
        self.decode_all()
        return self._decoder.finish()

    def _decode_one(self) -> None:
        tick = self._waiting[0]
        token = tick.token
        before = self._decoder.unfinished
        with Uninterrupted():
            try:
                tick._text = self._decoder.push(token)
            except BaseException:  # not decoded: its bytes must not count twice
                self._decoder.go_on(before)
                raise
            self._waiting.popleft()


class Outcome(Protocol):
    """What a tick came to."""

    @property
    def token(self) -> Tensor:
        """The token that was spoken, or fed: [1] int64."""

    @property
    def surprise(self) -> Tensor:
        """Its negative log-likelihood in nats: [1] float32."""

    @property
    def culled(self) -> Tensor:
        """Positions of the rows that were forgotten; NOWHERE is padding."""

    @property
    def not_finite(self) -> Tensor:
        """What was not finite (``compiled/finite.py``): [] int64."""


class AcceptedToken(NamedTuple):
    """The outcome of one of several ticks of one pass, which forget nothing."""

    token: Tensor  # [1] int64
    surprise: Tensor  # [1] float32
    culled: Tensor  # [0] int64
    not_finite: Tensor  # [] int64


class Tick:
    """What one pass of the loop did.

    Attributes: ``number`` (1 for the first tick after a prime), ``position`` of the token that was
    spoken, ``count`` of rows remembered after the tick's patch; before this tick's read:
    ``repairs`` that were made, ``rebased``, whether all positions were renumbered; ``width``, how
    many tokens were read in its pass, of which it may be one of several to come true; ``before``
    and ``after``, the host's account before it and after it, and ``fault``, why it has not
    happened, once that is known.

    Asking for anything else waits for it. It raises NotFinite if the read made NaN or infinity:
    then neither this tick nor any after it has happened.
    """

    def __init__(
        self,
        before: Account,
        after: Account,
        outcome: Outcome,
        detokenizer: Detokenizer,
        when_void: "Callable[[], Callable[[Tick], NoReturn] | None]",
        repairs: tuple[Repair, ...] = (),
        *,
        rebased: bool = False,
        width: int = 1,
    ) -> None:
        self.number = after.tick
        self.position = after.position
        self.count = after.count
        self.before = before
        self.after = after
        self.detokenizer = detokenizer
        self.fault: str | None = None
        self._proved = False
        self.rebased = rebased
        self.repairs = repairs
        self.width = width
        copies = host_copies(outcome.token, outcome.surprise, outcome.culled, outcome.not_finite)
        self._token, self._surprise, self._culled, self._not_finite = copies
        self._when_void = when_void
        self._text: str | None = None

    def prove(self) -> None:
        """Waits for the tick. Raises NotFinite if it has not happened."""
        if self._proved:
            return
        if self.fault is not None:
            raise NotFinite(self.fault)
        if self.not_finite:
            take_back = self._when_void()
            if take_back is None:  # its brain is gone
                raise NotFinite(f"tick {self.number}: NaN or infinity in its read")
            take_back(self)
        self._proved = True

    @property
    def not_finite(self) -> int:
        """What was not finite in its read (``compiled/finite.py``); else 0."""
        return int(self._not_finite.wait().item())

    @property
    def token(self) -> int:
        """The token that was spoken, or fed."""
        self.prove()
        return int(self._token.wait().item())

    @property
    def surprise(self) -> float:
        """Its negative log-likelihood in nats."""
        self.prove()
        return float(self._surprise.wait().item())

    @property
    def arriving(self) -> HostCopy:
        """Its surprise, on its way to the host."""
        return self._surprise

    @property
    def culled(self) -> tuple[int, ...]:
        """Positions of the rows that were forgotten."""
        self.prove()
        culled = self._culled.wait().numpy()
        return tuple(culled[culled != NOWHERE].tolist())

    @property
    def repaired(self) -> tuple[tuple[int, int], ...]:
        """Positions of the pairs that were replaced by one token each."""
        return tuple(repair.positions for repair in self.repairs)

    @property
    def text(self) -> str:
        """The characters that this token completed, often a word, sometimes none."""
        self.prove()
        self.detokenizer.decode_until(self)
        assert self._text is not None
        return self._text

    def __repr__(self) -> str:
        return (
            f"Tick(number={self.number}, token={self.token}, text={self.text!r}, "
            f"position={self.position}, culled={self.culled}, count={self.count})"
        )


class Step(NamedTuple):
    """One tick, after step 3 and before its patch. The tensors are the brain's own: look, copy,
    and be done before returning.
    """

    tick: Tick
    cursor: Cursor  # into step 1: token, position, tick
    reading: Reading  # out of step 1
    choice: Choice  # out of steps 1 to 3
    plan: Plan  # into step 4


Observer = Callable[[Step], None]
