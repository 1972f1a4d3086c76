"""Runs of the Python API, for ``record.py``: played in the environment of the recorded revision.

    python api_runs.py edits FOLDER MODEL ENGINE    # MODEL: smollm2, or toy (a folder of that name)
    python api_runs.py policies FOLDER MODEL ENGINE
    python api_runs.py reopened FOLDER ENGINE       # goes on with the saves that ``edits`` left

Each writes a file of JSON lines into FOLDER, one for each thing that was done, with a checksum of
every tensor that came of it. Only public names of ``brain`` are used.
"""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import brain
from brain import Append, Boost, Brain, Cull, Pin, Redact, Refused, Replace

THREADS = 2
PROMPT = (
    "The lighthouse keeper had not spoken to anyone for eleven years. One evening, when the fog "
    "lay thick upon the sea,"
)
POLICIES = ("h2o", "tova", "keydiff")
"""Those that look at more than the columns of a row. Each is a graph more to compile."""
COLUMNS = (
    *("slot", "token_id", "position", "brightness", "surprise", "novelty"),
    *("source", "born", "lit", "pinned"),
)


class Record:
    """JSON lines about one brain after another."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def add(self, what: str, **told: Any) -> None:
        """One line."""
        self._file.write(json.dumps({"what": what, **told}, ensure_ascii=False) + "\n")
        self._file.flush()

    def memory(self, what: str, b: Brain) -> None:
        """All that can be seen of a brain."""
        columns = {name: _digest_of_array(getattr(b.mirror, name)) for name in COLUMNS}
        self.add(
            what,
            rows=len(b),
            ticks=b.ticks,
            state=_digests(b.state._asdict()),
            cursor=_digests(b.cursor._asdict()),
            mirror=columns,
            text=b.mirror.text(" … "),
            sources=b.mirror.sources(),
            unfinished=b.unfinished.hex(),
        )

    def ticks(self, what: str, b: Brain, number: int) -> None:
        """Ticks, one line each."""
        for tick in b.stream(ticks=number):
            self.add(
                what,
                number=tick.number,
                token=tick.token,
                text=tick.text,
                position=tick.position,
                surprise=tick.surprise,
                culled=tick.culled,
                count=tick.count,
                rebased=tick.rebased,
                repaired=tick.repaired,
                width=tick.width,
            )

    def reading(self, what: str, b: Brain, *asked: Any) -> None:
        """What a read returns, and that it changed nothing."""
        before = _whole(b)
        returned = b.read(*asked)
        self.add(what, returned=_digests(returned._asdict()), unchanged=_whole(b) == before)

    def refused(self, what: str, b: Brain, do: Callable[[], object]) -> None:
        """What must not be done, and that it changed nothing."""
        before = _whole(b)
        try:
            do()
            outcome = "done"
        except Refused:
            outcome = "refused"
        self.add(what, outcome=outcome, unchanged=_whole(b) == before)


def _digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous()
    content = flat.flatten().view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    told = f"{flat.dtype} {list(flat.shape)}\n".encode()
    return hashlib.sha256(told + content).hexdigest()[:32]


def _digest_of_array(array: "np.ndarray[Any, Any]") -> str:
    told = f"{array.dtype} {list(array.shape)}\n".encode()
    return hashlib.sha256(told + array.tobytes()).hexdigest()[:32]


def _digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    return {name: _digest(tensor) for name, tensor in tensors.items()}


def _whole(b: Brain) -> dict[str, str]:
    return _digests(b.state._asdict()) | _digests(b.cursor._asdict())


def _open(model: str, engine: str, **options: Any) -> Brain:
    told: dict[str, Any] = {"capacity": 128, "threads": THREADS, "engine": engine, **options}
    if model == "toy":
        return brain.open("folder", path="toy", **told)
    return brain.open(model, **told)


def edits(folder: Path, model: str, engine: str) -> None:
    """Every call of the API, saves, and what goes on from them."""
    record = Record(folder / "edits.jsonl")
    b = _open(model, engine, positions="rebase")
    b.prime(PROMPT if model != "toy" else PROMPT[:60])
    record.memory("primed", b)
    record.reading("read the cursor", b)
    record.reading("read tokens", b, b.encode(" It"))
    record.reading("read as of old positions", b, [40, 41, 42], [3, 9, 5])
    record.reading("read many", b, list(range(40, 60)))
    record.ticks("tick", b, 6)
    _patches(record, b)
    _refusals(record, b)
    nats = b.feed(b.encode(" And then the door opened,"), source="tool")
    record.add("fed", nats=nats.tolist(), shape=list(nats.shape))
    record.memory("after feeding", b)
    b.apply([Append(b.encode(" slowly,"), source="user"), Pin([2])])
    record.memory("after applying", b)
    record.ticks("tick", b, 90 if model == "toy" else 40)
    record.memory("after ticks", b)
    b.save(folder / "save")
    record.ticks("tick after saving", b, 8)
    record.memory("after ticks after saving", b)
    again = brain.load(folder / "save")
    record.memory("loaded", again)
    record.ticks("tick after loading", again, 8)
    record.memory("after ticks after loading", again)
    b.prime([5, 6, 7, 8, 9, 10, 11], source="system")
    record.memory("primed with ids", b)
    record.ticks("tick", b, 4)
    b.save(folder / "save_of_few")
    record.refused("too small", b, lambda: brain.load(folder / "save", capacity=9))
    if engine == "eager":  # another capacity is another set of graphs to compile
        other = brain.load(folder / "save_of_few", capacity=64)
        record.memory("loaded into a smaller memory", other)
        record.ticks("tick in a smaller memory", other, 6)


def _patches(record: Record, b: Brain) -> None:
    """Every action alone, and all of them together."""
    batches: dict[str, list[Any]] = {
        "append": [Append(b.encode(" Suddenly,"), source="user")],
        "append nothing spoken": [Append(b.encode(" far away,"), source="system")],
        "cull": [Cull([4, 5])],
        "replace": [Replace((7, 8), b.encode("f")[:1])],
        "pin": [Pin([0, 1, 10])],
        "release": [Pin([1], pinned=False)],
        "boost": [Boost([12, 13], 7.5), Boost([13], -100.0)],
        "redact": [Redact([11])],
        "nothing": [],
        "all": [
            Append(b.encode(" Then")[:2], source="tool"),
            Cull([14]),
            Replace((16, 17, 18), b.encode("xy")[:2], source="model"),
            Pin([19]),
            Boost([20], 3.0),
            Redact([21]),
        ],
        "long append": [Append([40 + number % 9 for number in range(20)])],
    }
    for name, batch in batches.items():
        b.patch(batch)
        record.memory(f"patch: {name}", b)
        if name in ("append", "all"):
            record.ticks(f"tick after {name}", b, 2)


def _refusals(record: Record, b: Brain) -> None:
    batches: dict[str, list[Any]] = {
        "cull what is not there": [Cull([99999])],
        "a row twice": [Pin([0, 0])],
        "removed twice": [Cull([0]), Redact([0])],
        "no neighbours": [Replace((0, 2), [40])],
        "too many for a replacement": [Replace((0, 1), [40, 41, 42])],
        "append nothing": [Append([])],
        "outside the vocabulary": [Append([10**9])],
        "unknown source": [Append([40], source="nobody")],
        "no number": [Boost([0], math.nan)],
        "does not fit": [Append([40] * 200)],
        "half of it is good": [Pin([0]), Cull([99999])],
        "pinned and released": [Pin([0]), Pin([0], pinned=False)],
    }
    for name, batch in batches.items():
        record.refused(f"patch: {name}", b, lambda batch=batch: b.patch(batch))  # type: ignore[misc]
    record.refused("read: twice one position", b, lambda: b.read([40, 41], [3, 3]))
    record.refused("feed: nothing", b, lambda: b.feed([]))
    record.refused("prime: too long", b, lambda: b.prime([40] * 500))
    record.refused("unknown model", b, lambda: brain.open("no_such_model"))


def policies(folder: Path, model: str, engine: str) -> None:
    """A run with each of some policies, in a memory that is full."""
    record = Record(folder / "policies.jsonl")
    for policy in POLICIES:
        b = _open(model, engine, cull=policy, **{"cull.target": 48, "cull.recent": 12})
        b.prime(PROMPT[:60])
        record.ticks(policy, b, 30)
        record.memory(policy, b)


def reopened(folder: Path, engine: str) -> None:
    """What goes on from the saves of ``edits``."""
    record = Record(folder / "reopened.jsonl")
    for name in ("save", "save_of_few"):
        b = brain.load(folder / name)
        record.memory(name, b)
        record.reading(name, b)
        record.ticks(name, b, 10)
        record.memory(name, b)
        b.save(folder / f"{name}_again")
    if engine == "eager":
        larger = brain.load(folder / "save", capacity=160)
        record.ticks("larger", larger, 5)
        record.memory("larger", larger)


def main() -> None:
    """The command line."""
    what, folder, *rest = sys.argv[1:]
    runs: dict[str, Callable[..., None]] = {
        "edits": edits,
        "policies": policies,
        "reopened": reopened,
    }
    runs[what](Path(folder), *rest)


if __name__ == "__main__":
    main()
