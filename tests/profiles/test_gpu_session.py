"""What the session on a GPU is made of, as far as it can be tried without one."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_reads
import gpu_session
import pytest
import seeded_folder
import torch
from gpu_reads import CASES, case_of, reads
from large_cache import broken
from seeded_folder import SHAPES, SHARD_BYTES, write_folder

import brain
from brain.measure.golden.seeded import TOY, SeededModel

TRITON = importlib.util.find_spec("triton") is not None
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


def session(out: Path, *steps: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script on this CPU, in tiny sizes, its kernels interpreted."""
    known = {"PYTHON": sys.executable, "TINY": "1", "DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", SCRIPT, out, *steps],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **known, "BUDGET": "840", **environment},
    )


def report_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "gpu.json").read_text())
    return found


def test_the_whole_session_runs_to_its_end(tmp_path: Path) -> None:
    """All steps, of which one fails and stops no other. One test, since it takes a minute."""
    done = session(tmp_path, NCU="false", REVISION="")
    report = report_of(tmp_path)
    ended = {step: of["ended"] for step, of in report["steps"].items()}
    expected = {**dict.fromkeys(gpu_session.STEPS, "ok"), "ncu": "failed"}
    assert ended == expected, done.stdout + done.stderr
    assert list(ended)[-1] == "llama-8b"  # it comes after the one that fails
    assert done.returncode == 1
    assert "ncu: failed" in done.stdout
    assert report["tiny"]
    assert report["device"] == "cpu"
    assert report["revision"] == gpu_session.revision()
    assert not list(tmp_path.glob("*.new"))
    found = {step: of["found"] for step, of in report["steps"].items()}
    says_what_it_ran_on(found["machine"])
    for step in CASES:
        says_how_right_it_is(found[step])
        assert f"{step}: ok" in done.stdout
    if TRITON:
        is_held_beside_others(found["smollm2"])
    tells_edits_beside_a_tick(found["edits"])
    counts = found["tests"]["counts"]
    assert counts["failed"] == counts["error"] == 0
    assert counts["passed" if torch.cuda.is_available() else "skipped"] > 20


def says_what_it_ran_on(found: dict[str, Any]) -> None:
    for name in ("torch", "python", "numpy", "hydra-core", "transformers"):
        assert found["environment"][name], name
    assert found["environment"]["torch"] == torch.__version__
    assert found["copy"]["gb_per_second"]["median"] > 0
    assert found["card"] == {"asked": None}  # there is none: nothing is made up


def says_how_right_it_is(found: dict[str, Any]) -> None:
    """Beside every number."""
    kinds = ["twin"]
    if TRITON:
        kinds.append("kernels")
        assert found["agreement"]["likeliest_alike"] == found["agreement"]["ticks"]
        for name in ("waited", "queued", "step"):
            assert all(number > 0 for number in found["twin_over_kernels"][name].values())
    else:
        assert found["kernels"] == {"left_out": "Triton is not installed"}
    for kind in kinds:
        correct = found[kind]["correct"]
        assert correct["right"]
        assert correct["logits_off"] <= 0.02 * correct["logits_size"]
        assert correct["mass_off"] <= 0.02 * correct["mass_size"]
        assert correct["mass_sum"] == pytest.approx(1, abs=0.005)
        assert correct["repeated_alike"] == correct["repeated"]
        for name in ("waited_ms", "queued_ms", "host_ms", "step_ms"):
            spread = found[kind][name]
            assert 0 < spread["least"] <= spread["median"] <= spread["most"]
        assert found[kind]["ticks_per_second_queued"] > 0
        assert found[kind]["share_of_copy"] > 0


def is_held_beside_others(found: dict[str, Any]) -> None:
    assert found["overlap"]["same_bits"]
    assert found["overlap"]["says"].startswith("left out")  # no kernel overlaps another on a CPU
    assert found["kernels_started"]["per_tick"] > 0
    peer = found["transformers"]
    assert peer["same_as_ours"] == peer["ticks"]
    assert peer["over_kernels"]["waited"]["median"] > 0


def tells_edits_beside_a_tick(found: dict[str, Any]) -> None:
    assert found["correct"]["right"]
    for name in ("pin", "cull", "inject"):
        assert isinstance(found[name]["above_a_tick_ms"]["median"], float)
    assert found["inject"]["reading_ms"]["median"] > 0
    assert found["pin"]["reading_ms"]["median"] == 0


def test_all_files_with_gpu_tests_are_run() -> None:
    root = SCRIPT.parents[1]
    marked = "pytest.mark." + "gpu"
    files = (root / "tests").rglob("test_*.py")
    having = {str(file.relative_to(root)) for file in files if marked in file.read_text()}
    assert having == set(gpu_session.GPU_TESTS)


@pytest.mark.skipif(not TRITON, reason="Triton is not installed")
def test_nsight_compute_looks_at_one_kernel(tmp_path: Path) -> None:
    stand_in = tmp_path / "ncu"
    stand_in.write_text(
        f"#!{sys.executable}\n"
        "import subprocess, sys\n"
        "at = [a.endswith('gpu_reads.py') for a in sys.argv].index(True)\n"
        "subprocess.run(sys.argv[at - 1 :], check=True)\n"
        """print('==PROF== x\\n"Kernel Name","launch__grid_size"\\n"",""\\n"gate_up","96"')\n"""
    )
    stand_in.chmod(0o755)
    done = session(tmp_path / "out", "ncu", NCU=str(stand_in))
    assert done.returncode == 0, done.stdout + (tmp_path / "out" / "gpu.log").read_text()
    found = report_of(tmp_path / "out")["steps"]["ncu"]["found"]
    assert found == {"kernel": "gate_up", "launches": [{"launch__grid_size": "96"}]}


def test_without_nsight_compute_it_is_left_out(tmp_path: Path) -> None:
    done = session(tmp_path, "ncu", NCU="no-such-program")
    assert done.returncode == 0
    found = report_of(tmp_path)["steps"]["ncu"]["found"]
    assert found == {"left_out": "no-such-program is not there"}
    assert "left out: no-such-program is not there" in done.stdout


def test_an_unknown_step_is_refused(tmp_path: Path) -> None:
    done = session(tmp_path / "out", "machine", "nonsense")
    assert done.returncode == 2
    assert "nonsense is no step" in done.stderr
    assert not (tmp_path / "out").exists()
    assert subprocess.run(["bash", SCRIPT], capture_output=True, check=False).returncode == 2


def test_no_step_begins_when_the_budget_is_used_up(tmp_path: Path) -> None:
    budget = gpu_session.FEWEST_SECONDS + 0.2  # for one that takes seconds
    session(tmp_path, "machine", "smollm2", "tests", BUDGET=str(budget))
    report = report_of(tmp_path)
    steps = report["steps"]
    assert steps["machine"]["ended"] in ("ok", "cut")
    for step in ("smollm2", "tests"):
        assert steps[step]["ended"] == "left out"
        assert steps[step]["why"] == "no time is left"
        assert "found" not in steps[step]
    assert report["budget_seconds"] == budget


def test_what_is_cut_off_keeps_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step that would take a minute, with a process of its own that would, too."""
    program = (
        "import subprocess, sys, time\n"
        "from pathlib import Path\n"
        "from gpu_session import Found\n"
        "other = subprocess.Popen(['sleep', '60'])\n"
        "Found(Path(sys.argv[1]), 'large').put('measured', other.pid)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "gpu.json")]
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parent))
    monkeypatch.setenv("TINY", "0")
    monkeypatch.setattr(gpu_session, "command_of", lambda step, out: command)
    monkeypatch.setitem(gpu_session.STEPS, "large", 5)
    assert gpu_session.session(tmp_path, ["large"], 500) == 0
    told = report_of(tmp_path)["steps"]["large"]
    assert (told["ended"], told["why"]) == ("cut", "its 5 s were over")
    state = Path(f"/proc/{told['found']['measured']}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    assert "large: cut" in capsys.readouterr().out


def test_one_that_fails_says_why_and_the_others_are_measured(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    found = gpu_session.Found(path, "large")
    found.put("twin", {"capture_seconds": 3.0})

    def fail() -> None:
        raise MemoryError("not enough\nof it")

    found.attempt("twin", fail)
    found.attempt("agreement", lambda: found.put("agreement", {"ticks": 1}))
    assert found.failed == ["twin"]
    assert report_of(tmp_path)["steps"]["large"]["found"] == {
        "twin": {"capture_seconds": 3.0, "failed": "MemoryError: not enough"},
        "agreement": {"ticks": 1},
    }


def test_without_triton_the_twin_is_measured_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY", "1")
    monkeypatch.setattr(gpu_reads, "why_no_kernels", lambda: "Triton is not installed")
    found = gpu_session.Found(tmp_path / "gpu.json", "llama-8b")
    reads(case_of("llama-8b"), found, torch.device("cpu"))
    assert not found.failed
    assert found.values["kernels"] == {"left_out": "Triton is not installed"}
    assert found.values["twin"]["queued_ms"]["median"] > 0
    assert "twin_over_kernels" not in found.values


def test_a_brain_that_cannot_be_captured_is_measured_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(b: brain.Brain) -> float:
        raise brain.Refused("no compiler")

    monkeypatch.setenv("TINY", "1")
    monkeypatch.setattr(gpu_reads, "why_no_kernels", lambda: "Triton is not installed")
    monkeypatch.setattr(gpu_reads, "warmed_up", fail)
    found = gpu_session.Found(tmp_path / "gpu.json", "llama-8b")
    reads(case_of("llama-8b"), found, torch.device("cpu"))
    assert found.failed == ["twin"]
    assert found.values["twin"]["failed"] == "not captured: no compiler"
    assert found.values["twin"]["correct"]["right"]
    assert found.values["twin"]["queued_ms"]["median"] > 0


def test_the_revision_of_a_tree_without_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REVISION", raising=False)
    monkeypatch.setattr(gpu_session, "ROOT", tmp_path)
    assert gpu_session.revision() == "unknown"
    monkeypatch.setenv("REVISION", "c683b94")
    assert gpu_session.revision() == "c683b94"


def test_kernels_that_begin_early_are_counted() -> None:
    assert gpu_reads.begun_early([(3, 5), (0, 2), (1.5, 3), (6, 7)]) == 1
    assert gpu_reads.begun_early([]) == 0


def test_the_slowest_kernel_is_one_of_ours() -> None:
    started = [{"name": "nvjet"}, {"name": "attend"}, {"name": "head"}]
    found = {"kernels_started": {"longest": started}}
    assert gpu_session.slowest({"steps": {"tinyllama": {"found": found}}}) == "attend"
    assert gpu_session.slowest({"steps": {}}) == "gate_up"
    source = (SCRIPT.parents[1] / "compiled" / "read_kernels.py").read_text()
    for name in gpu_session.KERNELS:
        assert f"def {name}(" in source


def test_wheels_are_for_the_session_alone(tmp_path: Path) -> None:
    """Where they cannot be installed, nothing begins."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "broken-1-py3-none-any.whl").write_bytes(b"no wheel")
    done = session(tmp_path / "out", "ncu", WHEELS=str(wheels))
    assert done.returncode == 1
    assert not (tmp_path / "out").exists()
