"""NaN and infinity: noticed with the token, told in one line, and never remembered."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

import brain
from brain import Append, Brain, Refused
from brain.diagnosis import damaged_tensor
from brain.errors import NotFinite
from brain.measure.evaluation.reading import feed
from compiled.matrix import Matrix
from fixture_types import OpenTiny, SaveLlama
from histories import IDS, everything, said
from toy_models import PARROT_OPTIONS, PARROT_TEXT

NAN = float("nan")


@contextmanager
def damaged(tensor: Matrix, value: float = NAN, at: int = -1) -> Iterator[None]:
    """One number of a weight is replaced for the time being."""
    assert isinstance(tensor, Tensor)
    flat = tensor.view(-1)
    good = flat[at].clone()
    flat[at] = value
    try:
        yield
    finally:
        flat[at] = good


def primed(b: Brain) -> Brain:
    b.prime(IDS[:30])
    b.feed(IDS[30:36])
    return b


@pytest.mark.parametrize("engine", ["eager", "compiled"])
@pytest.mark.parametrize("field", ["down", "final_norm", "qkv", "head"])
@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_what_is_not_finite_is_told_and_never_remembered(
    open_tiny: OpenTiny, warm_brain: Brain, engine: str, field: str, value: float
) -> None:
    b = primed(open_tiny() if engine == "eager" else warm_brain)
    expected = said(b, 12)
    primed(b)
    before = everything(b), b.memory.account, b.unfinished
    with damaged(getattr(b.checkpoint.weights, field), value):
        ticks = [b.tick() for _ in range(4)]  # none of them is waited for
        asked = random.Random(field).choice([0, 2, 3])
        with pytest.raises(NotFinite, match=r"^tick 7: NaN or infinity in .*weights hold") as told:
            _ = ticks[asked].token
        assert "\n" not in str(told.value)
        for tick in ticks:
            for ask in ("token", "surprise", "culled", "text"):
                with pytest.raises(NotFinite, match=r"^tick 7:"):
                    getattr(tick, ask)
        assert (everything(b), b.memory.account, b.unfinished) == before
    assert said(b, 12) == expected


def test_it_is_told_by_whatever_waits_next(open_tiny: OpenTiny, tmp_path: Path) -> None:
    b = primed(open_tiny())
    calls: dict[str, Callable[[], object]] = {
        "ticks": lambda: [b.tick() for _ in range(20)],
        "speak": lambda: [tick.text for tick in b.speak()],
        "feed": lambda: b.feed(IDS[50:53]),
        "read": b.read,
        "patch": partial(b.patch, [Append(IDS[60:62])]),
        "save": partial(b.save, tmp_path / "save"),
        "apply": partial(b.apply, [Append(IDS[60:62])]),
        "replay": lambda: b.tick(5).token,
        "repair": b.best_repair,
    }
    before = everything(b), b.memory.account
    with damaged(b.checkpoint.weights.down):
        for name, call in calls.items():
            b.tick()
            with pytest.raises(NotFinite, match=r"^tick 7:"):
                call()
            assert (everything(b), b.memory.account) == before, name
    assert not (tmp_path / "save").exists()


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_what_is_read_to_be_remembered_is_looked_at_first(
    open_tiny: OpenTiny, warm_brain: Brain, engine: str
) -> None:
    b = primed(open_tiny() if engine == "eager" else warm_brain)
    before = everything(b), b.memory.account
    with damaged(b.checkpoint.weights.down):
        edits: list[Callable[[], None]] = [
            partial(b.patch, [Append(IDS[60:62])]),
            partial(b.prime, IDS[:5]),
        ]
        for edit in edits:
            with pytest.raises(NotFinite, match=r"^reading what is to be remembered:"):
                edit()
            assert (everything(b), b.memory.account) == before
        with pytest.raises(NotFinite, match=r"^reading what is to be remembered:"):
            b.prime(IDS[:40])  # longer than a chunk
        assert len(b) == 0
    primed(b)
    assert everything(b) == before[0]


def test_a_pass_of_several_tokens_tells_it_too(open_parrot: OpenTiny) -> None:
    b = open_parrot(**PARROT_OPTIONS)
    b.prime(PARROT_TEXT)
    spoken = [b.speak() for _ in range(12)]
    while len(spoken[-1]) == 1:
        spoken.append(b.speak())
    before = everything(b), b.memory.account
    with (
        damaged(b.checkpoint.weights.down),
        pytest.raises(NotFinite, match=rf"^tick {b.ticks + 1}:"),
    ):
        b.speak()
    assert (everything(b), b.memory.account) == before


def test_an_observer_never_sees_it(open_tiny: OpenTiny) -> None:
    b = primed(open_tiny())
    seen: list[int] = []
    b.observer = lambda step: seen.append(step.tick.number)
    b.tick()
    with damaged(b.checkpoint.weights.down), pytest.raises(NotFinite):
        b.tick()
    assert seen == [7]


def test_a_weight_is_named(tmp_path: Path, save_llama: SaveLlama) -> None:

    save_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    generator = random.Random(1)
    for name in generator.sample(sorted(weights), 6):
        hurt = {key: tensor.clone() for key, tensor in weights.items()}
        hurt[name].view(-1)[generator.randrange(hurt[name].numel())] = NAN
        save_file(hurt, file, metadata={"format": "pt"})
        for options in ({}, {"weights": "int8"}, {"dtype": "bfloat16"}):
            b = brain.open("folder", path=str(tmp_path), capacity=48, **options)
            assert damaged_tensor(b.checkpoint) == name


def test_float16_that_overflows_says_what_helps(tmp_path: Path, save_llama: SaveLlama) -> None:
    save_llama(tmp_path, std=30.0)
    b = brain.open("folder", path=str(tmp_path), capacity=48, dtype="float16")
    with pytest.raises(Refused, match=r"overflows float16: use dtype=bfloat16 or float32"):
        b.prime(IDS[:4])


def test_an_evaluation_stops_at_it(open_tiny: OpenTiny) -> None:
    b = open_tiny()
    b.prime(IDS[:1])
    with damaged(b.checkpoint.weights.down), pytest.raises(NotFinite, match=r"^tick 1: NaN"):
        feed(b, IDS[1:30], lambda _: None)
