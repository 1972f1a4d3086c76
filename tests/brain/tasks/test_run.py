"""A run whose device works by itself: what is launched before what has arrived.

The device is a CPU that is taken for one. When it is sent a tick, and when the token of a tick is
first asked for, is written down. The last test has a GPU.
"""

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import brain.brain
import brain.loop
from brain.brain import Brain
from brain.config.compose import compose_conf
from brain.errors import MemoryFull, NotFinite, OutputLost
from brain.loop import Loop
from brain.opening import open_brain
from brain.record.commands import INBOX
from brain.record.journal import read_journal
from brain.record.run_record import RunRecord
from brain.tasks import run
from brain.tick import Tick

BEGUN, LAUNCHED, ARRIVED, RECORDED, SAVED = "begun", "launched", "arrived", "recorded", "saved"
Event = tuple[str, int]
TICKS = 9


class Queue:
    """What a device was asked, in order."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def waited(self) -> list[int]:
        """The ticks that had been recorded before the next one was begun."""
        return [
            number
            for what, number in self.events
            if what == RECORDED
            and (BEGUN, number + 1) not in self.events[: self.events.index((what, number))]
        ]

    def ahead(self) -> list[int]:
        """Of every tick that arrived, how many had been launched behind it by then."""
        launched, found = 0, []
        for what, number in self.events:
            if what == LAUNCHED:
                launched = number
            elif what == ARRIVED:
                found.append(launched - number)
        return found


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    """Watches ticks and saves, on any device."""
    watched, loop_tick, token, save = Queue(), Loop.tick, Tick.token, RunRecord._save

    record_ticks = RunRecord.record_ticks

    def tick(self: Loop, *given: Any) -> Tick:
        watched.events.append((BEGUN, self.memory.account.tick + 1))
        made = loop_tick(self, *given)
        watched.events.append((LAUNCHED, made.number))
        return made

    def arriving(self: Tick) -> int:
        if (ARRIVED, self.number) not in watched.events:
            watched.events.append((ARRIVED, self.number))
        return int(token.__get__(self))

    def recording(self: RunRecord, *ticks: Tick) -> str:
        text = record_ticks(self, *ticks)
        watched.events += [(RECORDED, tick.number) for tick in ticks]
        return text

    def saving(self: RunRecord, *given: Any, **named: Any) -> None:
        assert self.spoken == self._brain.ticks  # the memory is not ahead of the journal
        watched.events.append((SAVED, self._brain.ticks))
        save(self, *given, **named)

    monkeypatch.setattr(Loop, "tick", tick)
    monkeypatch.setattr(Tick, "token", property(arriving))
    monkeypatch.setattr(RunRecord, "record_ticks", recording)
    monkeypatch.setattr(RunRecord, "_save", saving)
    monkeypatch.setattr(run, "keep_composed", lambda: None)  # nothing was composed by Hydra
    return watched


@pytest.fixture
def device(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> Queue:
    """A CPU that is taken for a device that works by itself."""
    monkeypatch.setattr(brain.brain, "has_queue", lambda device: True)
    return queue


@pytest.fixture
def runs(tiny_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Runs the tiny model in a folder of that name, and returns it."""
    torch.set_num_threads(1)

    def run_(name: str, *overrides: str) -> Path:
        tiny = ["model=folder", f"model.path={tiny_folder}", "engine=eager", "cull.target=24"]
        given = [*tiny, "capacity=48", "cull.recent=4", "prompt=Hello there", f"ticks={TICKS}"]
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        run.run(compose_conf([*given, *overrides]), folder)
        return folder

    return run_


def told(folder: Path) -> tuple[str, ...]:
    """All that a run leaves of what it said."""
    names = ("transcript.txt", "tokens.txt", "memory.json")
    return tuple((folder / name).read_text("utf-8") for name in names if (folder / name).exists())


def journals(folder: Path) -> list[Any]:
    paths = sorted((folder / "saves").glob("*.journal"), key=lambda path: int(path.stem))
    return [read_journal(path)[0] for path in paths]


def test_a_device_is_sent_the_next_tick_before_the_last_has_arrived(
    runs: Callable[..., Path], device: Queue, capsys: pytest.CaptureFixture[str]
) -> None:
    queued = runs("queued")
    assert device.ahead() == [1] * (TICKS - 1) + [0]
    assert device.events[-1] == (SAVED, TICKS)
    shown = capsys.readouterr().out
    device.events.clear()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(brain.brain, "has_queue", lambda device: False)
        waited = runs("waited")
    assert device.ahead() == [0] * TICKS
    assert capsys.readouterr().out == shown
    assert told(queued) == told(waited)
    assert journals(queued) == journals(waited)


def test_a_cpu_is_not(runs: Callable[..., Path], queue: Queue) -> None:
    runs("run")
    assert queue.ahead() == [0] * TICKS


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], [TICKS]),
        (["stop_at_eos=true"], [*range(1, TICKS + 1)]),
        (["capture=true"], [*range(1, TICKS + 1)]),
        (["save_every=3"], [3, 6, 9]),
        (["repair=pairs", "repair.every=4"], [3, 7, 9]),
    ],
    ids=["nothing", "end of text", "observer", "save", "repair"],
)
def test_it_is_waited_for_where_something_depends_on_it(
    overrides: Sequence[str], expected: list[int], runs: Callable[..., Path], device: Queue
) -> None:
    runs("run", *overrides)
    assert device.waited() == expected
    if overrides == ["save_every=3"]:
        saves = [number for what, number in device.events if what == SAVED]
        assert saves == [3, 6, 9]


def test_lookup_waits_for_every_token(runs: Callable[..., Path], device: Queue) -> None:
    runs("run", "lookup=ngram")
    assert set(device.ahead()) <= {0}


def test_a_warning_comes_where_it_would_without_a_queue(
    runs: Callable[..., Path], device: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the trained range is left, between the same two texts."""
    shown: list[str] = []

    def open_short(*given: Any) -> Brain:
        b = open_brain(*given)
        b.loop._trained = len(b.encode("Hello there")) + 4
        return b

    monkeypatch.setattr(run, "open_brain", open_short)
    monkeypatch.setattr(run, "_print", lambda text: shown.append("text"))
    monkeypatch.setattr(brain.loop, "warn", lambda text: shown.append("warning"))
    runs("queued", "positions=keep")
    queued, shown[:] = list(shown), []
    monkeypatch.setattr(brain.brain, "has_queue", lambda device: False)
    runs("waited", "positions=keep")
    assert queued == shown
    assert 1 < queued.index("warning") < len(queued) - 2


@pytest.mark.parametrize("numbers", [(signal.SIGINT,), (signal.SIGTERM,)])
def test_a_request_to_stop_is_heard_once_all_is_recorded(
    numbers: Sequence[int],
    runs: Callable[..., Path],
    device: Queue,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It comes with the fourth text: the fifth tick, which is under way, is the last, and the same
    command says the rest.
    """
    whole = told(runs("whole"))
    device.events.clear()
    said, left = run._print, [4]

    def shown(text: str) -> None:
        said(text)
        left[0] -= 1
        if left[0] == 0:
            for number in numbers:
                os.kill(os.getpid(), number)

    with monkeypatch.context() as patched:
        patched.setattr(run, "_print", shown)
        with pytest.raises(KeyboardInterrupt):
            runs("run")
    assert device.events[-1] == (SAVED, 5)
    assert told(runs("run")) == whole


def test_a_command_that_comes_with_the_last_text_is_still_executed(
    runs: Callable[..., Path], device: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, left = run._print, [TICKS]

    def shown(text: str) -> None:
        said(text)
        left[0] -= 1
        if left[0] == 0:
            with (tmp_path / "run" / INBOX).open("a") as inbox:
                inbox.write('[{"do": "pin", "positions": [0]}]\n')

    monkeypatch.setattr(run, "_print", shown)
    folder = runs("run")
    assert json.loads((folder / "answers.jsonl").read_text())["applied"] == 1


def test_a_command_finds_the_memory_as_it_has_been_told(
    runs: Callable[..., Path], device: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes while the fourth tick is under way: what was launched is recorded before it."""
    line = json.dumps([{"do": "pin", "positions": [0]}])
    said = run._print

    def shown(text: str) -> None:
        said(text)
        if device.events[-1] == (RECORDED, 3):
            with (tmp_path / "run" / INBOX).open("a") as inbox:
                inbox.write(line + "\n")

    monkeypatch.setattr(run, "_print", shown)
    folder = runs("run", "save_every=0")
    assert device.ahead() == [1, 1, 1, 0, *[1] * (TICKS - 5), 0]
    (entries,) = [entries for entries in journals(folder) if len(entries) > 1]
    kinds = ["heard" if "heard" in entry else "said" for entry in entries]
    assert kinds.index("heard") == 4
    answer = json.loads((folder / "answers.jsonl").read_text().splitlines()[0])
    assert answer["tick"] == 4


def test_a_full_memory_ends_a_run_after_all_that_was_said(
    runs: Callable[..., Path], device: Queue, capsys: pytest.CaptureFixture[str]
) -> None:
    full = ["cull=none", "capacity=16", "ticks=50"]
    with pytest.raises(MemoryFull):
        runs("queued", *full)
    shown = capsys.readouterr().out
    ticks = max(number for what, number in device.events if what == LAUNCHED)
    assert (SAVED, ticks) in device.events
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(brain.brain, "has_queue", lambda device: False)
        with pytest.raises(MemoryFull):
            runs("waited", *full)
    assert capsys.readouterr().out == shown


def test_numbers_that_are_not_finite_end_it_at_the_same_tick(
    runs: Callable[..., Path], device: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tick that was launched behind it has not happened either."""
    speak = Brain.speak

    def speaking(self: Brain, most: int | None = None) -> tuple[Tick, ...]:
        if self.ticks == 4:
            self.checkpoint.weights.final_norm[0] = float("nan")
        return speak(self, most)

    monkeypatch.setattr(Brain, "speak", speaking)
    with pytest.raises(NotFinite, match=r"^tick 5: "):
        runs("run")
    folder = tmp_path / "run"
    assert (folder / "failed.txt").read_text().startswith("tick 5: ")
    assert len((folder / "tokens.txt").read_text().splitlines()) == 4


def test_output_that_is_lost_loses_nothing_that_was_launched(
    runs: Callable[..., Path], device: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was launched is recorded and saved, and the same command says the rest."""
    whole = told(runs("whole"))
    said, left = run._print, [4]

    def breaking(text: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OutputLost("standard output cannot be written")
        said(text)

    with monkeypatch.context() as patched:
        patched.setattr(run, "_print", breaking)
        with pytest.raises(OutputLost):
            runs("run")
    saved = [number for what, number in device.events if what == SAVED]
    assert saved[-1] == 5  # four were recorded, one was under way
    assert told(runs("run")) == whole


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_the_next_tick_before_the_last_has_arrived(
    runs: Callable[..., Path], queue: Queue
) -> None:
    folder = runs("run", "device=cuda", "engine=compiled", "dtype=float32")
    assert queue.ahead() == [1] * (TICKS - 1) + [0]
    assert len((folder / "tokens.txt").read_text().splitlines()) == TICKS


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
