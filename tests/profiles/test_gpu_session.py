"""What the session on a GPU is made of, as far as it can be tried without one."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import seeded_folder
import torch
from large_cache import broken
from seeded_folder import SHAPES, SHARD_BYTES, write_folder

import brain
from brain.measure.golden.seeded import TOY, SeededModel

SCRIPT = Path(__file__).parents[2] / "profiles" / "gpu.sh"


def report(rate: float, allocated: int | None) -> dict[str, Any]:
    one = {"per_second": rate, "allocated_bytes": allocated}
    return {"cache_gb": 40.0, "patch": one, "decide_and_patch": dict(one)}


def test_the_rule_is_kept_or_broken() -> None:
    assert broken(report(101.0, 1000)) == []
    assert broken(report(101.0, None)) == []
    assert len(broken(report(99.0, 1000))) == 2
    assert "allocates" in broken(report(101.0, 500_000_000))[0]


def test_a_seeded_folder_is_the_seeded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seeded_folder, "SHARD_BYTES", SHARD_BYTES >> 9)  # more than one shard
    model = SeededModel("toy", TOY, seed=7)
    write_folder(tmp_path, model)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    b = brain.open("folder", capacity=32, dtype="bfloat16", **{"model.path": str(tmp_path)})
    assert b.checkpoint.config == TOY
    expected = model.checkpoint(torch.bfloat16, torch.device("cpu")).weights
    for ours, theirs in zip(b.checkpoint.weights.tensors(), expected.tensors(), strict=True):
        assert torch.equal(ours, theirs)
    b.prime([5, 31_000, 7])
    assert b.tick().position == 3
    assert {"smollm2", "tinyllama", "llama-8b"} == set(SHAPES)


def test_an_unknown_step_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", SCRIPT, tmp_path / "out", "nonsense"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "nonsense is no step" in done.stderr


def test_a_step_that_fails_stops_no_other(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", SCRIPT, tmp_path / "out", "machine", "eval"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHON": "false"},
    )
    assert done.returncode == 0
    told = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert told[0].startswith("machine: exit 1")
    assert told[1].startswith("eval: exit 0")
    assert told[1].endswith("left out: give TEXT=FILE")
