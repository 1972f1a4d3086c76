"""The engine that a CPU gets by default, beside its twin in PyTorch, over a long life: it forgets,
repairs, looks up, is edited, saved in the middle and resumed.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import brain
from brain import Append, Boost, Brain, Cull, Pin, Redact, Replace
from brain.mirror import SOURCES, Mirror
from compiled.llama import Weights
from compiled.read import read
from compiled.state import ROW_COLUMNS
from fixture_types import OpenTiny

TICKS = 2000
AHEAD = 200  # ticks made several in one pass, while nothing is forgotten yet
LOOK = 10  # ticks between two looks at logits
LIFE: dict[str, Any] = {
    "capacity": 320,
    "cull.target": 300,
    "cull.recent": 16,
    "repair": "pairs",
    "repair.every": 90,
    "lookup": "ngram",
    "lookup.width": 3,
    "engine.widths": [1, 16],
    "engine.smallest_bucket": 320,
}
MOST_DIFFERENCE = 2e-3  # of float32 logits
MOST_NOISE = 1.5  # times the twin's divergence from float32
"""Both are the contract that the engines keep towards the reference (ARCHITECTURE.md)."""


def edits(mirror: Mirror, rng: random.Random) -> list[Any]:
    """One of each kind, on rows that are neither the newest nor pinned."""
    positions = [int(p) for p in mirror.position[4:-40]]
    a, b, c, d, e = rng.sample(positions, 5)
    return [
        Cull([a]),
        Pin([b], rng.random() < 0.5),
        Boost([c], 2.0),
        Redact([d]),
        Replace([e], [rng.randrange(300)], source="user"),
        Append([rng.randrange(300) for _ in range(3)], source="tool"),
    ]


def assert_same_rows(mine: Brain, other: Brain) -> None:
    a, b = mine.mirror, other.mirror
    for name in ("slot", *ROW_COLUMNS):
        one, two = getattr(a, name), getattr(b, name)
        if one.dtype.kind == "f":
            # Sums of hundreds of terms, each off by some units of 2^-24 times a sensitive draw.
            assert one.tolist() == pytest.approx(two.tolist(), rel=1e-3, abs=1e-3), name
        else:
            assert one.tolist() == two.tolist(), name


def lived(b: Brain, rng: random.Random, *others: Brain) -> None:
    """One pass: several tokens at first, one later; an edit of every kind now and then."""
    ahead = 0 < b.ticks < AHEAD
    ids = [rng.randrange(300) for _ in range(4 if ahead else 1)]
    brains = (b, *others)
    passes = [x.replay(ids) if ahead else (x.tick(ids[0]),) for x in brains]
    for told in zip(*passes, strict=True):
        assert len({(tick.token, tick.culled, tick.repaired) for tick in told}) == 1
    if b.ticks % 250 == 0:
        batch = edits(b.mirror, rng)
        for x in brains:
            x.patch(batch)


def resumed(b: Brain, folder: Path) -> Brain:
    b.save(folder)
    again = brain.load(folder)
    assert again.graphs.decode is not None
    return again


def test_it_lives_as_its_twin_does(open_tiny: OpenTiny, tmp_path: Path) -> None:
    native = open_tiny(engine="native", dtype="float32", **LIFE)
    twin = open_tiny(engine="eager", dtype="float32", **LIFE)
    assert native.graphs.decode is not None
    assert twin.graphs.decode is None
    rng = random.Random(11)
    prompt = [rng.randrange(300) for _ in range(30)]
    for b in (native, twin):
        b.prime(prompt)
    while native.ticks < TICKS:
        lived(native, rng, twin)
        if native.ticks % LOOK == 0:
            ours, theirs = (b.read().logits[-1] for b in (native, twin))
            assert float((ours - theirs).abs().max()) <= MOST_DIFFERENCE
        if native.ticks % 100 == 0:
            assert_same_rows(native, twin)
        if native.ticks == TICKS // 2:
            native = resumed(native, tmp_path / "middle")
    assert (native.mirror.source == SOURCES.index("repair")).any()
    assert len(native) < len(prompt) + TICKS


def test_in_bfloat16_it_is_as_exact_as_its_twin(open_tiny: OpenTiny, tmp_path: Path) -> None:
    """What the operator, the twin, and the twin in float32 make of the same memory."""
    native = open_tiny(engine="native", dtype="bfloat16", **LIFE)
    rng = random.Random(12)
    native.prime([rng.randrange(300) for _ in range(30)])
    noise = {"native": 0.0, "twin": 0.0}
    while native.ticks < TICKS:
        lived(native, rng)
        if native.ticks % LOOK == 0:
            exact = logits_of(native, torch.float32)
            noise["native"] += divergence(native.read().logits[-1], exact)
            noise["twin"] += divergence(logits_of(native, torch.bfloat16), exact)
        if native.ticks == TICKS // 2:
            native = resumed(native, tmp_path / "middle")
    assert 0 < noise["native"] <= MOST_NOISE * noise["twin"]


def logits_of(b: Brain, dtype: torch.dtype) -> torch.Tensor:
    """After the cursor's token, by the layers in PyTorch: [vocab]."""
    tensors = {
        name: tensor if name == "inverse_frequencies" else tensor.to(dtype)
        for name, tensor in b.checkpoint.weights._asdict().items()
        if tensor is not None
    }
    weights = Weights(**tensors)
    state = b.state._replace(keys=b.state.keys.to(dtype), values=b.state.values.to(dtype))
    at = (b.cursor.token, b.cursor.position, torch.tensor(1))
    return read(b.checkpoint.config, weights, state, *at, bucket=b.capacity).logits[-1]


def divergence(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """KL divergence from the truth, in nats."""
    ours, truth = ours.log_softmax(-1), truth.log_softmax(-1)
    return float(F.kl_div(ours, truth, reduction="sum", log_target=True))
