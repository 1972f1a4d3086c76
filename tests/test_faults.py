"""I4 under faults: whatever goes wrong, wherever, the memory is as before or wholly as after.

A fault is raised at every tensor operation of everything that writes, and a signal comes at line
after line of the Python around it. After each, every byte and the host's account of them are
compared; the interrupted call is made again, and the loop goes on with the token it would have
said.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import brain
from brain import Append, Boost, Brain, Cull, Pin, Redact, Replace
from brain.actions import Action
from brain.machine.signals import Uninterrupted
from brain.memory import Account
from brain.saves import read as read_save
from compiled.state import State
from conftest import OpenTiny
from toys import raw_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = [(7 * n) % 300 for n in range(64)]
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
        b.speak_on(self.unfinished)

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


class Case(NamedTuple):
    """Something that writes, in a brain that is ready for it."""

    b: Brain
    act: Callable[[], object]
    free_slots: bool = True  # whether even they are as before
    may_empty: bool = False  # whether it may end with nothing remembered


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
    b.prime(IDS[:ids])
    for _ in range(ticks):
        assert b.tick().text is not None
    return b


def tick(open_tiny: OpenTiny, _: Path) -> Case:
    b = ready(open_tiny(), 24)
    return Case(b, b.tick)


def first_tick(open_tiny: OpenTiny, _: Path) -> Case:
    b = ready(open_tiny(), ticks=0)
    return Case(b, b.tick)


def edit(open_tiny: OpenTiny, _: Path) -> Case:
    b = ready(open_tiny())
    return Case(b, lambda: b.patch(batch()))


def full_memory(open_tiny: OpenTiny, _: Path) -> Case:
    b = ready(open_tiny(cull="none"), 45)
    return Case(b, lambda: b.patch([Replace((7, 8), [11, 12]), Redact([2])]))


def prime(open_tiny: OpenTiny, _: Path) -> Case:
    b = ready(open_tiny())
    return Case(b, lambda: b.prime(IDS[30:41]))


def first_long_prime(open_tiny: OpenTiny, _: Path) -> Case:
    b = open_tiny()
    return Case(b, lambda: b.prime(IDS[:20]), free_slots=False)


def long_prime(open_tiny: OpenTiny, _: Path) -> Case:
    b = ready(open_tiny())
    return Case(b, lambda: b.prime(IDS[30:50]), free_slots=False, may_empty=True)


def long_append(open_tiny: OpenTiny, _: Path) -> Case:
    b = ready(open_tiny(cull="none"), 6)
    return Case(b, lambda: b.patch([Append(IDS[:17])]), free_slots=False)


def rebase(open_tiny: OpenTiny, _: Path) -> Case:
    b = ready(open_tiny(), 24, 9)
    return Case(b, b.memory.rebase)


def load(open_tiny: OpenTiny, folder: Path) -> Case:
    b = ready(open_tiny(), 24, 9)
    b.patch([Cull([5])])
    b.save(folder / "save")
    saved, _ = read_save(folder / "save", b.checkpoint, b.state, b.cursor, b.most_pinned)
    b.prime(IDS[40:50])
    return Case(b, lambda: b.resume(saved), free_slots=False, may_empty=True)


CASES = (
    *(tick, first_tick, edit, full_memory, prime),
    *(first_long_prime, long_prime, long_append, rebase, load),
)


def next_token(b: Brain) -> int | None:
    return b.tick().token if b.memory.count else None


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
    undisturbed = Fault(-1)
    with undisturbed, monkeypatch.context() as patched:
        for name in ("patch", "rebase"):
            patched.setattr(b.graphs, name, undisturbed.writing(getattr(b.graphs, name)))
        case.act()
    after = Held.of(b)
    token = next_token(b)
    names, written = undisturbed.names, undisturbed.written
    assert len(written) > 20
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


# Signals ------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("make", [tick, edit, prime, long_append, rebase], ids=lambda c: c.__name__)
def test_I4_a_signal_at_any_line_changes_all_or_nothing(
    make: Callable[..., Case], open_tiny: OpenTiny, tmp_path: Path
) -> None:
    case = make(open_tiny, tmp_path)
    b, before = case.b, Held.of(case.b)
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
    patch = b.graphs.patch
    for act in (b.tick, lambda: b.patch(batch()), lambda: b.prime(IDS[3:12])):
        before = Held.of(b)
        act()
        after, token = Held.of(b), b.tick().token
        before.put_back(b)

        def signalled(plan: Any, **how: Any) -> None:
            if not late:
                signal.raise_signal(number)
            patch(plan, **how)
            if late:
                signal.raise_signal(number)

        with monkeypatch.context() as patched:
            patched.setattr(b.graphs, "patch", signalled)
            with pytest.raises(raised):
                act()
        assert Held.of(b).bytes(free_slots=True) == after.bytes(free_slots=True)
        assert b.tick().token == token


def test_signals_are_heard_after_what_must_be_whole() -> None:
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with Uninterrupted():
            with Uninterrupted():
                signal.raise_signal(signal.SIGINT)
                told.append("inner")
            told.append("outer")
        told.append("never")
    assert told == ["inner", "outer"]
    with pytest.raises(KeyboardInterrupt) as both, Uninterrupted():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError("out of memory")
    assert isinstance(both.value.__context__, RuntimeError)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# Every step of a tick -----------------------------------------------------------------------------


class Mishap(Exception):
    """Anything."""


def once(call: Callable[..., Any], *, after: bool = False) -> Callable[..., Any]:
    """The function, but its first call fails: before it has done anything, or when it is done."""
    left = [True]

    def failing(*arguments: Any, **named: Any) -> Any:
        if left[0] and not after:
            left[0] = False
            raise Mishap
        result = call(*arguments, **named)
        if left[0]:
            left[0] = False
            raise Mishap
        return result

    return failing


STEPS = {
    "read": lambda b, patched: patched.setattr(b.graphs, "read", once(b.graphs.read)),
    "after the read": lambda b, patched: patched.setattr(
        b.graphs, "read", once(b.graphs.read, after=True)
    ),
    "choose": lambda b, patched: patched.setattr(b.graphs, "choose", once(b.graphs.choose)),
    "patch": lambda b, patched: patched.setattr(b.graphs, "patch", once(b.graphs.patch)),
    "observer": lambda b, patched: patched.setattr(b, "observer", once(lambda step: None)),
    "text": lambda b, patched: patched.setattr(
        b._speech._decoder, "push", once(b._speech._decoder.push)
    ),
    "text, too late": lambda b, patched: patched.setattr(
        b._speech._decoder, "push", once(b._speech._decoder.push, after=True)
    ),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_mishap_in_any_step_of_a_tick_is_of_no_consequence(
    step: str, either_brain: Brain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tick is made again, and nothing that is said, or its text, is another."""
    b = ready(either_brain, 24, 0)
    ticks = [b.tick() for _ in range(30)]
    whole = [tick.token for tick in ticks], "".join(tick.text for tick in ticks)
    ready(b, 24, 0)
    ticks, mishaps = [], 0
    while len(ticks) < 30:
        with monkeypatch.context() as patched:
            if mishaps == 0 and len(ticks) == 12:  # eight of them wait for their text by now
                STEPS[step](b, patched)
            try:
                ticks.append(b.tick())
            except Mishap:
                mishaps += 1
    assert mishaps == 1
    assert ([tick.token for tick in ticks], "".join(tick.text for tick in ticks)) == whole


def test_a_tick_that_failed_after_its_repair_does_not_repair_again(
    open_tiny: OpenTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened() -> tuple[Brain, list[Any]]:
        b = open_tiny(**{"repair": "pairs", "repair.every": 2, "repair.least_gain": -100.0})
        told: list[Any] = []
        b.on_repair = told.append
        b.prime(IDS[:24])
        return b, told

    b, told = opened()
    whole = [(t.token, t.count, t.repaired) for t in b.stream(6)]
    assert len(told) >= 2
    b, told_again = opened()
    found = []
    for number in range(6):
        with monkeypatch.context() as patched:
            patched.setattr(b.graphs, "choose", once(b.graphs.choose))
            with pytest.raises(Mishap):
                b.tick()
        assert b.ticks == number
        t = b.tick()
        found.append((t.token, t.count, t.repaired))
    assert found == whole
    assert told_again == told
