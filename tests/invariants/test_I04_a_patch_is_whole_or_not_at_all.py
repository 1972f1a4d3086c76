"""I4: a patch that is refused or fails leaves every byte unchanged; none is half applied.

A fault is raised at every tensor operation of everything that writes, and a signal comes at line
after line of the Python around it. After each, every byte and the host's account of them are
compared; the interrupted call is made again, and the loop goes on with the token it would have
said.
"""

import functools
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import brain
from brain import Append, Boost, Brain, Cull, Pin, Redact, Refused, Replace
from brain.actions import Action
from brain.memory import Account
from brain.saves import read as read_save
from compiled.state import State
from fixture_types import OpenTiny
from histories import IDS, VOCABULARY, everything, mixed_up
from toys import digest, raw_bytes

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::brain.BrainWarning"),  # nothing here is worth one
]
BAD: dict[str, list[Any]] = {
    "no ids": [Append([])],
    "id past the vocabulary": [Append([1, VOCABULARY])],
    "negative id": [Append([-1])],
    "a huge id": [Append([1 << 70])],
    "bool as id": [Append([True])],
    "float as id": [Append([1.0])],  # type: ignore[list-item]
    "text as ids": [Append("hello")],  # type: ignore[arg-type]
    "unknown source": [Append([1], source="nobody")],
    "more than fits": [Append(IDS[:40])],
    "a forgotten row": [Cull([4])],
    "a row never there": [Cull([99])],
    "a negative position": [Cull([-1])],
    "a huge position": [Cull([1 << 70])],
    "the pending token": [Cull([24])],
    "a position twice": [Cull([2, 2])],
    "bool as position": [Cull([True])],
    "float as position": [Cull([1.5])],  # type: ignore[list-item]
    "text as position": [Cull(["1"])],  # type: ignore[list-item]
    "culled in two actions": [Cull([2]), Cull([2])],
    "culled and redacted": [Cull([2]), Redact([2])],
    "culled and replaced": [Cull([2]), Replace([1, 2], [5])],
    "culled and pinned": [Cull([2]), Pin([2])],
    "pinned and culled": [Pin([2]), Cull([2])],
    "redacted and boosted": [Redact([2]), Boost([2], 1.0)],
    "pinned and released": [Pin([2]), Pin([2], pinned=False)],
    "pin nothing there": [Pin([4])],
    "pin twice": [Pin([2, 2])],
    "boost nothing there": [Boost([4], 1.0)],
    "boost by infinity": [Boost([2], float("inf"))],
    "boost by nan": [Boost([2], float("nan"))],
    "boost by a word": [Boost([2], "x")],  # type: ignore[arg-type]
    "replace nothing": [Replace([], [5])],
    "replace by nothing": [Replace([1, 2], [])],
    "replace by more": [Replace([1, 2], [5, 6, 7])],
    "replace strangers": [Replace([2, 6], [5])],
    "replace by no token": [Replace([1, 2], [VOCABULARY])],
    "replace by nobody": [Replace([1, 2], [5], source="nobody")],
    "redact nothing there": [Redact([4])],
    "redact twice": [Redact([2, 2])],
    "redact more than a chunk": [Redact([0, 1, 2, *range(5, 9), *range(10, 20)])],
    "a chunk and a removal": [Append(IDS[:16]), Cull([2])],
    "no action": ["cull"],
    "an action class": [Cull],
}


@pytest.mark.parametrize("case", BAD)
def test_I4_a_refused_patch_changes_no_byte(case: str, either_brain: Brain) -> None:
    b = either_brain
    b.prime(IDS[:20])
    b.patch([Cull([3, 4, 9]), Pin([6])])
    b.feed(IDS[30:35])
    assert (int(b.cursor.position), len(b)) == (24, 21)
    good: list[Any] = [Cull([0]), Append([7]), Boost([10], 2.0), Pin([13]), Redact([14])]
    for batch in (BAD[case], [*good, *BAD[case]], [*BAD[case], *good]):
        before = everything(b), len(b), b.ticks
        with pytest.raises(Refused) as refusal:
            b.patch(batch)
        assert (everything(b), len(b), b.ticks) == before
        assert "\n" not in str(refusal.value)
        assert len(str(refusal.value)) > 10
    b.patch(good)  # what is not bad is not refused


def test_I4_too_many_pins_are_refused(either_brain: Brain) -> None:
    b = either_brain
    b.prime(IDS[:30])
    most = 24 - 4 - 4 - 2  # target, less sinks, recent rows and what a tick culls
    b.patch([Pin(list(range(most)))])
    before = everything(b)
    batches: list[list[Any]] = [[Pin([20])], [Pin([20]), Append([1])]]
    for batch in batches:
        with pytest.raises(Refused, match="pinned"):
            b.patch(batch)
        assert everything(b) == before
    b.patch([Pin([20]), Pin([3], pinned=False)])
    assert int(b.state.pinned.sum()) == most


class Interruption(BaseException):
    """Ctrl-C, out of memory, a power cut: anything that strikes between two chunks."""


@pytest.mark.parametrize("survives", [0, 1, 2])
def test_I4_an_append_interrupted_between_chunks_is_taken_back(
    survives: int, open_tiny: OpenTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = mixed_up(open_tiny(**{"engine.widths": [1, 4]}))
    twin = mixed_up(open_tiny(**{"engine.widths": [1, 4]}))
    before = b.mirror
    done: list[Any] = []

    def interrupted(patch: Callable[..., None], plan: Any) -> None:
        done.append(plan)
        if len(done) == survives + 1:
            raise Interruption
        patch(plan)

    for owner in (b.graphs, b.graphs.uncaptured):
        monkeypatch.setattr(owner, "patch", functools.partial(interrupted, owner.patch))
    with pytest.raises(Interruption):
        b.patch([Append(IDS[:11])])
    after = b.mirror
    for name in ("slot", "token_id", "position", "brightness", "surprise", "source", "born"):
        assert np.array_equal(getattr(after, name), getattr(before, name)), name
    assert len(b) == int(b.state.valid.sum()) == len(twin)
    assert digest(*b.cursor) == digest(*twin.cursor)
    assert [b.tick().token for _ in range(5)] == [twin.tick().token for _ in range(5)]


SEVENS = [(7 * n) % 300 for n in range(64)]
FAULTS: tuple[Callable[[], BaseException], ...] = (
    lambda: RuntimeError("out of memory"),
    MemoryError,
    KeyboardInterrupt,
)


class Held(NamedTuple):
    """Everything a brain is: each tensor's bytes, what the host believes, and what it has begun to
    say.
    """

    state: list[torch.Tensor]
    cursor: list[torch.Tensor]
    account: Account
    unfinished: bytes

    @staticmethod
    def of(b: Brain) -> "Held":
        state, cursor = ([t.clone() for t in tensors] for tensors in (b.state, b.cursor))
        return Held(state, cursor, b.memory.account, b.unfinished)

    def put_back(self, b: Brain) -> None:
        for held, content in zip((*b.state, *b.cursor), (*self.state, *self.cursor), strict=True):
            held.copy_(content)
        b.memory.account = self.account
        b.resume_text(self.unfinished)
        b.loop.index.clear()  # so that every attempt looks at the mirror, and takes the same steps

    def bytes(self, *, free_slots: bool) -> tuple[Any, ...]:
        """To compare. What free slots hold is nobody's, where a text longer than a chunk, or all
        that was remembered, was taken back out of them.
        """
        valid = self.state[State._fields.index("valid")]
        columns = [raw_bytes(valid)]
        for tensor in self.state:
            content = tensor if free_slots else tensor[..., valid] if tensor.dim() == 1 else None
            columns.append(raw_bytes(tensor[:, :, valid] if content is None else content))
        cursor = [raw_bytes(tensor) for tensor in self.cursor]
        return *columns, *cursor, self.account, self.unfinished


class Fault(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises once, at the nth tensor operation (from 0): before it happens, or after."""

    def __init__(self, at: int, error: BaseException | None = None, *, after: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.at, self.error, self.after = at, error, after
        self.names: list[str] = []
        self.written: list[int] = []  # numbers of the operations within ``writing``

    def writing(self, call: Callable[..., None]) -> Callable[..., None]:
        def noted(*arguments: Any, **named: Any) -> None:
            start = len(self.names)
            call(*arguments, **named)
            self.written += range(start, len(self.names))

        return noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number = len(self.names)
        self.names.append(func._schema.name.split("::")[1])
        if number == self.at and self.error is not None and not self.after:
            raise self.error
        result = func(*args, **(kwargs or {}))
        if number == self.at and self.error is not None:
            raise self.error
        return result


def writers(b: Brain) -> list[tuple[object, str]]:
    """Every way of a brain to write."""
    return [(b.graphs, "patch"), (b.graphs, "rebase"), (b.graphs.uncaptured, "patch")]


class Case(NamedTuple):
    """Something that writes, in a brain that is ready for it."""

    b: Brain
    act: Callable[[], object]
    free_slots: bool = True  # whether even they are as before
    may_empty: bool = False  # whether it may end with nothing remembered
    in_one: bool = False  # whether one call writes it all, in which nothing is raised


def batch() -> list[Action]:
    return [
        Cull([3, 4]),
        Append([9, 8, 7]),
        Replace((7, 8), [11]),
        Pin([0]),
        Boost([10], 2.0),
        Redact([12, 13]),
    ]


def ready(b: Brain, ids: int = 20, ticks: int = 3) -> Brain:
    b.prime(SEVENS[:ids])
    for _ in range(ticks):
        assert b.tick().text is not None
    return b


def tick(open_tiny: OpenTiny, _: Path) -> Case:
    b = ready(open_tiny(engine="eager"), 24)
    return Case(b, b.tick)


def first_tick(open_tiny: OpenTiny, _: Path) -> Case:
    b = ready(open_tiny(engine="eager"), ticks=0)
    return Case(b, b.tick)


def native_tick(open_tiny: OpenTiny, _: Path) -> Case:
    b = ready(open_tiny(engine="native"), 24)
    return Case(b, b.tick, in_one=True)


def chunk(open_tiny: OpenTiny, _: Path) -> Case:
    b = ready(open_tiny(**{"cull.chunk": 6}), 24)
    return Case(b, lambda: next(b.feed_in_chunks(SEVENS[30:40])))


def edit(open_tiny: OpenTiny, _: Path) -> Case:
    b = ready(open_tiny())
    return Case(b, lambda: b.patch(batch()))


def full_memory(open_tiny: OpenTiny, _: Path) -> Case:
    b = ready(open_tiny(cull="none"), 45)
    return Case(b, lambda: b.patch([Replace((7, 8), [11, 12]), Redact([2])]))


def prime(open_tiny: OpenTiny, _: Path) -> Case:
    b = ready(open_tiny())
    return Case(b, lambda: b.prime(SEVENS[30:41]))


def first_long_prime(open_tiny: OpenTiny, _: Path) -> Case:
    b = open_tiny()
    return Case(b, lambda: b.prime(SEVENS[:20]), free_slots=False)


def long_prime(open_tiny: OpenTiny, _: Path) -> Case:
    b = ready(open_tiny())
    return Case(b, lambda: b.prime(SEVENS[30:50]), free_slots=False, may_empty=True)


def long_append(open_tiny: OpenTiny, _: Path) -> Case:
    b = ready(open_tiny(cull="none"), 6)
    return Case(b, lambda: b.patch([Append(SEVENS[:17])]), free_slots=False)


def rebase(open_tiny: OpenTiny, _: Path) -> Case:
    b = ready(open_tiny(), 24, 9)
    return Case(b, b.memory.rebase)


def load(open_tiny: OpenTiny, folder: Path) -> Case:
    b = ready(open_tiny(), 24, 9)
    b.patch([Cull([5])])
    b.save(folder / "save")
    saved, _ = read_save(folder / "save", b.checkpoint, b.state, b.cursor, b.most_pinned)
    b.prime(SEVENS[40:50])
    return Case(b, lambda: b.resume(saved), free_slots=False, may_empty=True)


CASES = (
    *(tick, first_tick, native_tick, chunk, edit, full_memory, prime),
    *(first_long_prime, long_prime, long_append, rebase, load),
)


def next_token(b: Brain) -> int | None:
    return b.tick().token if b.memory.account.count else None


def check(case: Case, before: Held, after: Held, where: object, *, again: bool = True) -> None:
    """That all is as before or as after; ``again``: and that the same call does it now."""
    b, found = case.b, Held.of(case.b)
    assert len(b) == int(b.state.valid.sum()), where
    assert len(b.mirror) == len(b), where
    same = found.bytes(free_slots=case.free_slots)
    if same == before.bytes(free_slots=case.free_slots) or (
        case.may_empty and found.account == Account()
    ):
        if not again:
            return
        case.act()
        found = Held.of(b)
        same = found.bytes(free_slots=case.free_slots)
    assert same == after.bytes(free_slots=case.free_slots), where


@pytest.mark.parametrize("make", CASES, ids=lambda case: case.__name__)
def test_I4_a_fault_at_any_operation_changes_all_or_nothing(
    make: Callable[..., Case],
    open_tiny: OpenTiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = make(open_tiny, tmp_path)
    b, before = case.b, Held.of(case.b)
    before.put_back(b)
    undisturbed = Fault(-1)
    with undisturbed, monkeypatch.context() as patched:
        for owner, name in writers(b):
            patched.setattr(owner, name, undisturbed.writing(getattr(owner, name)))
        case.act()
    after = Held.of(b)
    token = next_token(b)
    names, written = undisturbed.names, undisturbed.written
    assert len(written) > 20 or (case.in_one and not written)
    sites = [(at, False) for at in written]
    sites += [(at, True) for at in written if names[at].endswith("_")]
    # A read writes nothing, whatever happens in it: one in so many of its operations will do.
    sites += [(at, False) for at in range(0, len(names), 1 + len(names) // 12)]
    for number, (at, late) in enumerate(sites):
        before.put_back(b)
        error = FAULTS[number % len(FAULTS)]()
        with pytest.raises(type(error)), Fault(at, error, after=late):
            case.act()
        check(case, before, after, (at, names[at], late), again=number % 16 == 0)
    before.put_back(b)
    case.act()
    assert next_token(b) == token


ROOTS = tuple(str(Path(brain.__file__).parents[1] / name) for name in ("brain", "compiled"))


class Interrupted:
    """Sends SIGINT to this process before the nth line (from 0) of ours that is run within."""

    def __init__(self, at: int) -> None:
        self.at, self.lines = at, 0

    def __enter__(self) -> "Interrupted":
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(ROOTS):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at + 1:
                signal.raise_signal(signal.SIGINT)
        return self._trace


SIGNALLED = (tick, native_tick, chunk, edit, prime, long_append, rebase)


@pytest.mark.parametrize("make", SIGNALLED, ids=lambda case: case.__name__)
def test_I4_a_signal_at_any_line_changes_all_or_nothing(
    make: Callable[..., Case], open_tiny: OpenTiny, tmp_path: Path
) -> None:
    case = make(open_tiny, tmp_path)
    b, before = case.b, Held.of(case.b)
    before.put_back(b)
    with Interrupted(-1) as undisturbed:
        case.act()
    after = Held.of(b)
    handler = signal.getsignal(signal.SIGINT)
    lines = undisturbed.lines
    assert lines > 50
    for at in range(0, lines, max(1, lines // 60)):
        before.put_back(b)
        with pytest.raises(KeyboardInterrupt), Interrupted(at):
            case.act()
        assert signal.getsignal(signal.SIGINT) is handler
        check(case, before, after, at, again=at % 5 == 0)


@pytest.fixture
def alarm() -> Iterator[None]:
    """A time limit, as test runners and programs set them."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    held = signal.signal(signal.SIGALRM, late)
    yield
    signal.signal(signal.SIGALRM, held)


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGALRM, TimeoutError)]
)
@pytest.mark.parametrize("late", [False, True], ids=["before the graph", "after the graph"])
def test_I4_a_patch_and_its_account_are_one(
    number: signal.Signals,
    raised: type[BaseException],
    late: bool,
    either_brain: Brain,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eager or captured: a signal on either side of the call is heard after the account."""
    b = ready(either_brain)
    for act in (b.tick, lambda: b.patch(batch()), lambda: b.prime(SEVENS[3:12])):
        before = Held.of(b)
        act()
        after, token = Held.of(b), b.tick().token
        before.put_back(b)

        def signalled(patch: Callable[..., None], plan: Any) -> None:
            if not late:
                signal.raise_signal(number)
            patch(plan)
            if late:
                signal.raise_signal(number)

        with monkeypatch.context() as patched:
            for owner in (b.graphs, b.graphs.uncaptured):
                patched.setattr(owner, "patch", functools.partial(signalled, owner.patch))
            with pytest.raises(raised):
                act()
        assert Held.of(b).bytes(free_slots=True) == after.bytes(free_slots=True)
        assert b.tick().token == token
