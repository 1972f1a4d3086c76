"""``task=bench``: who is timed, what becomes of those who cannot be, and what the numbers mean."""

import importlib.util
import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from seeded_gguf import write_seeded
from torch import Tensor

from brain.checkpoints.hf_config import read_config
from brain.config.compose import compose_conf
from brain.config.overrides import override
from brain.measure.bench import comparison
from brain.measure.bench import contestants as who
from brain.measure.bench.command import default_command
from brain.measure.bench.contestants import (
    Contestant,
    contestants,
    row_bytes,
    weight_bytes,
    why_missing,
)
from brain.measure.bench.job import Failed, Job, Waiting, result_of
from brain.measure.bench.ours import Ours
from brain.measure.bench.progress import Progress
from brain.measure.bench.results import command_rows, engine_rows, limit_rows, scaling_rows
from brain.measure.bench.tables import command_table, decode_table, flatness, scaling_table
from compiled.llama import LlamaConfig
from fixture_types import CommandLine

SaveLlama = Callable[..., dict[str, Tensor]]


def a_run(seconds: list[float], *, count: int = 512, prefill: float = 2.0) -> dict[str, Any]:
    return {
        "token_seconds": {str(count): seconds},
        "prefill_seconds": [prefill],
        "open_seconds": 1.0,
        "capture_seconds": 2.0,
        "weight_bytes": 1_000_000,
        "row_bytes": 1_000,
        "peak_mb": 900.0,
        "before_mb": 300.0,
    }


RUNS = {
    Contestant(who.MEMORY, "float32"): [
        {"read_seconds": [0.001, 0.002, 0.002], "operation": "sum", "bytes": 8_000_000}
    ],
    Contestant("compiled", "float32"): [a_run([0.001, 0.001]), a_run([0.002, 0.002, 0.002])],
    Contestant("llama-cpp", "float32"): [a_run([0.004], prefill=1.0)],
    Contestant("transformers-dynamic", "float32"): [],
    Contestant("compiled", "int8"): [a_run([0.001])],
}


def test_rates_ratios_and_shares_follow_from_the_timings() -> None:
    ours, peer, alone = engine_rows(RUNS, 512, 1000)
    (limit,) = limit_rows(RUNS)
    assert limit["gb_per_second"] == pytest.approx(4.0)
    assert ours["tokens_per_second"] == pytest.approx(500)  # the median of all five tokens
    assert (ours["slowest_run"], ours["fastest_run"]) == pytest.approx((500, 1000))
    assert ours["bytes_per_token"] == 1_000_000 + 512 * 1_000
    assert ours["gb_per_second"] == pytest.approx(1_512_000 * 500 / 1e9)
    assert ours["share_of_limit"] == pytest.approx(ours["gb_per_second"] / 4.0)
    assert ours["tokens_per_second_ratios"] == {"llama-cpp": pytest.approx(2.0)}
    assert ours["prefill_tokens_per_second_ratios"] == {"llama-cpp": pytest.approx(0.5)}
    assert peer["tokens_per_second_ratios"] == {"llama-cpp": pytest.approx(1.0)}
    assert ours["model_mb"] == 600
    assert alone["tokens_per_second_ratios"] == {}  # a peer at another precision is none
    assert alone["share_of_limit"] is None


def test_one_table_has_a_line_for_everybody_who_was_timed() -> None:
    lines = decode_table(engine_rows(RUNS, 512, 1000), limit_rows(RUNS)).splitlines()
    assert [line.split()[:2] for line in lines[2:]] == [
        ["compiled", "float32"],
        ["llama-cpp", "float32"],
        ["compiled", "int8"],
    ]
    assert lines[1].startswith("(reading memory)")
    assert len(set(map(len, lines[2:]))) == 1
    assert "×llama" in lines[0]
    assert "×hf" not in lines[0]


def test_what_capacity_costs_is_told_beside_what_is_wanted() -> None:
    runs = {
        ("compiled", "float32", 512): [a_run([0.010], count=256)],
        ("compiled", "float32", 8192): [a_run([0.012], count=256), a_run([0.012], count=256)],
        ("llama-cpp", "float32", 8192): [a_run([0.020], count=256)],
    }
    rows = scaling_rows(runs)
    (line,) = flatness(rows, 256)
    assert "capacity 8192 costs 1.200 of one at capacity 512 (wanted: at most 1.1)" in line
    assert flatness([row for row in rows if row["capacity"] == 512], 256) == []
    table = scaling_table(rows, [256], 256).splitlines()
    assert table[1].split() == ["256", "12.00", "20.00"]
    assert table[4].split() == ["512", "10.00", "–"]


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_of_a_token_are_those_of_the_tensors(
    save_llama: SaveLlama, tmp_path: Path, tied: bool
) -> None:
    save_llama(tmp_path, tie_word_embeddings=tied, intermediate_size=64)
    config = read_config(tmp_path / "config.json")
    for name, formats in who.PRECISIONS.items():
        asked = [override("model.path", str(tmp_path)), "device=cpu", *formats.overrides]
        engine = "eager" if name == "float16" else "native"
        job = Job(engine, name, None, "cpu", 1, 8)
        job.overrides.extend(["model=folder", f"engine={engine}", *asked])
        assert weight_bytes(config, formats) == Ours(job).weight_bytes, name
    of_float32, of_int8 = (row_bytes(config, who.PRECISIONS[name]) for name in ("float32", "int8"))
    assert of_float32 == 2 * of_int8 == 2 * 3 * 2 * 8 * 4


COMMANDS: dict[Contestant, list[dict[str, Any]]] = {
    Contestant(who.DEFAULT, "bfloat16"): [
        {"first_character_seconds": s, "tokens_per_second": r, "engine": "compiled"}
        for s, r in ((4.0, 50.0), (3.0, 60.0), (9.0, 10.0))
    ],
    Contestant(who.LLAMA_CPP_COMMAND, "bfloat16"): [
        {"first_character_seconds": 1.0, "tokens_per_second": 25.0}
    ],
}


def test_commands_are_told_by_their_first_character_and_their_rate() -> None:
    ours, peer = command_rows({**COMMANDS, Contestant(who.DEFAULT, "float32"): []})
    assert (ours["engine"], ours["precision"]) == ("compiled", "bfloat16")
    assert ours["first_character_seconds"] == 4.0
    assert (ours["soonest_run"], ours["latest_run"]) == (3.0, 9.0)
    assert (ours["tokens_per_second"], ours["slowest_run"], ours["fastest_run"]) == (50, 10, 60)
    assert ours["tokens_per_second_ratios"] == {who.LLAMA_CPP_COMMAND: pytest.approx(2.0)}
    assert peer["engine"] is None
    lines = command_table([ours, peer]).splitlines()
    assert lines[1].split()[:4] == ["default", "compiled", "bfloat16", "4.0"]
    assert len(lines[1]) == len(lines[2]) == len(lines[0])
    assert lines[3:] == [
        f"default says 2.00 times the tokens per second of {who.LLAMA_CPP_COMMAND}"
    ]


def test_the_default_command_chooses_engine_and_precision_itself() -> None:
    prompt = 'He said: "a, b" '
    asked = [override("prompt", prompt), "engine=compiled", "dtype=bfloat16", "capacity=64"]
    command = default_command(compose_conf(asked), asked, 7)
    assert command.arguments[1:] == [
        "-m",
        "brain.app",
        f"prompt={prompt}",
        "capacity=64",
        "ticks=7",
    ]


def test_the_time_left_follows_from_the_runs_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("brain.measure.bench.progress.time.perf_counter", lambda: now)
    progress = Progress("decode", ["a", "b"], 2)
    with progress.run("a", "engine a"):
        assert progress.seconds_left() is None
        now = 10.0
    with progress.run("b", "engine b"):  # taken to last as long as a did
        assert progress.seconds_left() == pytest.approx(30)
        now = 14.0
        assert progress.seconds_left() == pytest.approx(26)
        now = 50.0
        assert progress.seconds_left() == pytest.approx(20)
    progress.drop("b")
    with progress.run("a", "engine a"):
        assert progress.seconds_left() == pytest.approx(10)
    progress.close()


def test_transformers_has_neither_int8_nor_int4() -> None:
    engines = ["compiled", "llama-cpp", "transformers-dynamic"]
    labels = [entry.label for entry in contestants(engines, ["float32", "int8", "int4"])]
    assert labels == [
        *(f"{engine} float32" for engine in engines),
        *(f"{engine} {name}" for name in ("int8", "int4") for engine in engines[:2]),
    ]


def test_the_precision_replaces_what_was_asked_for() -> None:
    asked = ["dtype=float16", "capacity=64", "+weights=model", "dtype_not=1", "++engine=eager"]
    overrides = Contestant("compiled", "int8").overrides(asked, who.PRECISIONS["int8"])
    assert overrides == [
        "capacity=64",
        "dtype_not=1",
        "sampler=greedy",
        "engine=compiled",
        "dtype=bfloat16",
        "weights=int8",
    ]


@pytest.mark.parametrize("asked", ["sampler=default", "sampler.top_k=5", "++sampler.seed=1"])
def test_all_engines_take_the_likeliest_token_unless_a_sampler_is_named(asked: str) -> None:
    entry, formats = Contestant("compiled", "float32"), who.PRECISIONS["float32"]
    assert entry.overrides([], formats) == ["sampler=greedy", "engine=compiled", "dtype=float32"]
    assert entry.overrides([asked], formats) == [asked, "engine=compiled", "dtype=float32"]


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    formats = who.PRECISIONS["float32"]
    for engine, package in who.PEERS.items():
        reason = why_missing(Contestant(engine, "float32"), [], formats)
        assert reason is not None
        assert package in reason
        assert "positronic-brain[peers]" in reason
    assert why_missing(Contestant("eager", "float32"), [], formats) is None
    reason = why_missing(Contestant("eager", "float32"), ["weights_that_are_not=there"], formats)
    assert reason is not None
    assert "weights_that_are_not" in reason


def test_a_process_that_fails_says_why_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job("eager", "float32", folder="", device="cpu", threads=1, capacity=8)
    interpreter = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(interpreter))
    for script, told in {
        "kill -SEGV $$": "killed by SIGSEGV",
        "echo 'Traceback' >&2; echo 'RuntimeError: no room' >&2; exit 1": "RuntimeError: no room",
        "echo 'refused: not a model' >&2; exit 2": "not a model",
        "exit 3": "it printed no error",
        "echo hello": "it printed no result",
    }.items():
        interpreter.write_text(f"#!/bin/sh\n{script}\n")
        interpreter.chmod(interpreter.stat().st_mode | stat.S_IXUSR)
        with pytest.raises(Failed) as failure:
            result_of(job, lambda: None)
        assert str(failure.value) == told


Bench = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run_bench(tmp_path: Path, tiny_folder: Path, command_line: CommandLine) -> Bench:
    """``run_bench(*arguments)`` in this process, in the run folder ``out`` → status, out, err."""
    model = ["model=folder", f"model.path={tiny_folder}", f"cache_dir={tmp_path / 'cache'}"]

    def run(*arguments: str) -> tuple[int, str, str]:
        return command_line("task=bench", *model, "hydra.run.dir=out", *arguments)

    return run


def invented(job: Job, waiting: Waiting) -> dict[str, Any]:
    """What a process might have measured."""
    if job.engine == who.MEMORY:
        return {"read_seconds": [1e-4], "operation": "sum", "bytes": job.bytes}
    if job.engine == "transformers-static-compiled":
        raise Failed("RuntimeError: backend='inductor' raised")
    result = a_run([0.01, 0.02])
    return result | {"token_seconds": {str(count): [0.01, 0.02] for count in job.counts}}


SMALL = ["task.context=16", "task.prefill=20", "task.tokens=3", "task.repeats=2", "capacity=64"]


def test_one_run_reports_everybody_and_names_who_is_missing(
    tmp_path: Path, run_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Job] = []

    def timed(job: Job, waiting: Waiting) -> dict[str, Any]:
        asked.append(job)
        return invented(job, waiting)

    monkeypatch.setattr(comparison, "result_of", timed)
    engines = "[compiled,eager,transformers-static-compiled]"
    scaling = ["task.capacities=[64,128]", "task.counts=[8,32,100]", "task.rows=32"]
    status, out, err = run_bench(
        *SMALL,
        f"task.engines={engines}",
        "task.scaling_engines=[eager]",
        "task.precisions=[float32,bfloat16]",
        "task.measures=[decode,scaling]",
        "threads=3",
        *scaling,
    )
    assert status == 0, err
    report = json.loads((tmp_path / "out" / "bench.json").read_text("utf-8"))
    timings = [(row["engine"], row["precision"]) for row in report["engines"]]
    assert timings == [(e, p) for p in ("float32", "bfloat16") for e in ("compiled", "eager")]
    static = "transformers-static-compiled"
    assert report["missing"] == {
        f"{static} {p}": "failed: RuntimeError: backend='inductor' raised"
        for p in ("float32", "bfloat16")
    }
    for name, reason in report["missing"].items():
        assert f"missing: {name}: {reason}" in out.splitlines()
    for picture in ("decode.png", "scaling.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 10_000

    decode = [(job.engine, job.precision) for job in asked if job.smallest_bucket is None]
    entries = [(e, p) for p in ("float32", "bfloat16") for e in ("memory", "compiled", "eager")]
    assert [entry for entry in decode if entry[0] != static] == 2 * entries  # in alternation
    assert sum(entry[0] == static for entry in decode) == 2  # not tried again
    assert {job.threads for job in asked} == {3}
    assert {(job.capacity, job.prefill) for job in asked if job.prefill} == {(64, 20)}
    points = [(j.capacity, j.counts, j.smallest_bucket) for j in asked if j.smallest_bucket]
    assert points == 4 * [(64, [32], 64), (128, [8, 32, 100], 64)]
    reads = {job.precision: job.bytes for job in asked if job.engine == who.MEMORY}
    assert reads["float32"] == 2 * reads["bfloat16"]


def test_without_task_precisions_the_dtype_decides(
    tmp_path: Path, run_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "result_of", invented)
    status, _, err = run_bench(*SMALL, "task.engines=[eager]", "dtype=bfloat16", "task.repeats=1")
    assert status == 0, err
    report = json.loads((tmp_path / "out" / "bench.json").read_text("utf-8"))
    assert [row["precision"] for row in report["engines"]] == ["bfloat16"]


@pytest.mark.parametrize(
    ("arguments", "precisions"),
    [
        ([], ["float32", "bfloat16", "int8"]),
        (["++dtype=bfloat16"], ["bfloat16"]),
        (["++weights=int8"], ["int8"]),
        (["weights=int8", "dtype=bfloat16"], ["int8"]),
        (["weights=int4"], ["int4"]),
        (["dtype=auto"], ["float32", "bfloat16"]),
        (["weights=model"], ["float32", "bfloat16"]),
        (["weights=model", "dtype=float16"], ["float16"]),
        (["++task.precisions=[int8,float32,int4]"], ["int8", "float32", "int4"]),
    ],
    ids=lambda value: " ".join(value) or "nothing",
)
def test_dtype_and_weights_choose_however_they_are_given(
    tmp_path: Path,
    run_bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    precisions: list[str],
) -> None:
    monkeypatch.setattr(comparison, "result_of", invented)
    status, _, err = run_bench(*SMALL, "task.engines=[eager]", "device=cpu", *arguments)
    assert status == 0, err
    report = json.loads((tmp_path / "out" / "bench.json").read_text("utf-8"))
    assert [row["precision"] for row in report["engines"]] == precisions
    assert report["missing"] == {}


def test_a_target_that_holds_all_rows_is_timed(
    tmp_path: Path, run_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "result_of", invented)
    for target in ("cull.target=24", "cull.target=64", "cull=none"):
        status, _, err = run_bench(*SMALL, "task.engines=[eager]", "dtype=float32", target)
        assert status == 0, err


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["engine=compiled"], "engine is ignored"),
        (["++engine.captured=true"], "engine is ignored"),
        (["task.precisions=[float32]", "dtype=bfloat16"], "dtype is ignored"),
        (["task.precisions=[float32]", "++weights=model"], "weights is ignored"),
    ],
)
def test_what_is_not_looked_at_is_named(
    asked: list[str], told: str, run_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "result_of", invented)
    status, _, err = run_bench(*SMALL, "task.engines=[eager]", *asked)
    assert status == 0, err
    assert told in err


def test_if_nobody_could_be_timed_it_says_so(
    run_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "result_of", invented)
    engines = "task.engines=[transformers-static-compiled]"
    status, out, err = run_bench(*SMALL, engines, "dtype=float32")
    assert status == 2
    assert "inductor" in err.splitlines()[-1]
    assert out == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["task.precisions=[int3]"], "int3"),
        (["task.measures=[guess]"], "guess"),
        (["task.engines=[]"], "task.engines"),
        (["task.repeats=0"], "task.repeats"),
        (["threads=0"], "threads must be 1 to 1024, not 0"),
        (["threads=1025"], "threads must be 1 to 1024, not 1025"),
        (["dtype=float32", "weights=int8"], "dtype=bfloat16 here, not float32"),
        (["dtype=bfloat16", "weights=int4"], "dtype=float32 here, not bfloat16"),
        (["++dtype=float16", "++weights=int8"], "dtype=bfloat16 here, not float16"),
        (["lookup=ngram"], "lookup=none"),
        (["lookup.width=3"], "lookup=none"),
        (["cull.target=23"], "cull.target=24 or more, not 23"),
        (
            [
                *("task.measures=[scaling]", "task.capacities=[64,128]", "task.rows=32"),
                *("task.counts=[8,50]", "cull.target=57"),
            ],
            "cull.target=58 or more, not 57",
        ),
        (
            [
                *("task.measures=[scaling]", "task.capacities=[64,128]", "task.rows=32"),
                *("task.counts=[8,100]", "capacity=128", "cull.target=108"),
            ],
            "the smallest of task.capacities, 64",
        ),
        (["task.measures=[scaling]", "task.capacities=[64]"], "task.capacities"),
        (["task.measures=[scaling]", "task.counts=[9000]"], "task.counts"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_refused_before_anything_is_timed(
    run_bench: Bench, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str
) -> None:
    monkeypatch.setattr(comparison, "result_of", lambda *_: pytest.fail("something was timed"))
    status, _, err = run_bench(*SMALL, *arguments)
    assert status == 2
    assert told in err.splitlines()[-1]


@pytest.mark.parametrize("before", [0, 1, 5])
def test_interrupted_it_prints_the_table_of_what_it_has(
    tmp_path: Path, run_bench: Bench, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    done: list[Job] = []

    def timed(job: Job, waiting: Waiting) -> dict[str, Any]:
        if len(done) == before:
            raise KeyboardInterrupt
        done.append(job)
        return invented(job, waiting)

    monkeypatch.setattr(comparison, "result_of", timed)
    engines = ["compiled", "eager"]
    status, out, err = run_bench(
        *SMALL,
        f"task.engines=[{','.join(engines)}]",
        "task.measures=[decode,scaling]",
        "dtype=float32",
        *("task.capacities=[64,128]", "task.counts=[8,100]", "task.rows=32"),
    )
    assert status == 130
    assert err.splitlines()[-1] == "interrupted"
    lines = [line.split()[:3] for line in out.splitlines()]
    told = [line[0] for line in lines if line[1:2] == ["float32"]]
    assert told == [job.engine for job in done[1:3]]
    assert (["(reading", "memory)", "float32"] in lines) == (before > 1)
    assert "rows of" not in out  # scaling did not begin
    report = json.loads((tmp_path / "out" / "bench.json").read_text("utf-8"))
    assert [row["engine"] for row in report["engines"]] == told
    assert sum(map(len, report.get("decode_runs", {}).values())) == before


def test_the_default_command_is_a_process_that_speaks(tmp_path: Path, run_bench: Bench) -> None:
    status, out, err = run_bench(
        *SMALL,
        "task.engines=[default]",
        "task.command_tokens=20",
        "task.repeats=1",
        "dtype=bfloat16",
        "threads=1",
        "prompt=it said, twice",
    )
    assert status == 0, err
    report = json.loads((tmp_path / "out" / "bench.json").read_text("utf-8"))
    (row,) = report["commands"]
    assert row["command"] == "default"
    assert row["precision"] in who.PRECISIONS
    assert row["first_character_seconds"] > 0
    assert row["tokens_per_second"] > 0
    assert f"default {row['precision']}" in report["decode_runs"]
    line = out.splitlines()[3]
    assert line.split()[:3] == ["default", row["engine"], row["precision"]]


def test_a_default_command_that_fails_says_why(run_bench: Bench) -> None:
    status, out, err = run_bench(*SMALL, "task.engines=[default]", "save_every=-1")
    assert (status, out) == (2, "")
    assert "default: failed: save_every must be 0" in err.splitlines()[-1]


def test_real_processes_time_real_engines(tmp_path: Path, run_bench: Bench) -> None:
    """All that start at once: ours, and the peers that are installed."""
    engines = ["eager", "llama-cpp", "transformers-dynamic"]
    status, out, err = run_bench(
        *SMALL,
        f"task.engines=[{','.join(engines)}]",
        "dtype=float32",
        "task.repeats=1",
        "threads=1",
    )
    assert status == 0, err
    report = json.loads((tmp_path / "out" / "bench.json").read_text("utf-8"))
    timed = [row["engine"] for row in report["engines"]]
    absent = [name.split()[0] for name in report["missing"]]
    assert sorted(timed + absent) == sorted(engines)
    assert "failed" not in out
    sizes = {row["engine"]: row["bytes_per_token"] for row in report["engines"]}
    assert sizes["eager"] == sizes["transformers-dynamic"]
    (limit,) = report["limits"]
    assert limit["gb_per_second"] > 0
    for row in report["engines"]:
        assert row["tokens_per_second"] > 0
        assert row["model_mb"] >= 0
        assert len(report["decode_runs"][f"{row['engine']} float32"][0]["token_seconds"]["16"]) == 3


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    write_seeded(path, LlamaConfig(600, 256, 512, 2, 4, 2, 64, 1e-5, 1e4, 128), "Q4_K_M")
    return path


def needed_bytes(path: Path) -> int:
    """Of the tensors that a token reads, as the gguf package has them."""
    tensors = gguf.GGUFReader(path).tensors
    return sum(int(tensor.n_bytes) for tensor in tensors if tensor.name != "token_embd.weight")


def test_a_gguf_file_is_timed_as_it_lies(
    tmp_path: Path, gguf_file: Path, command_line: CommandLine
) -> None:
    """Ours and llama.cpp, where it is installed, on the same bytes."""
    status, out, err = command_line(
        "task=bench",
        f"model={gguf_file}",
        "hydra.run.dir=out",
        *(*SMALL, "capacity=128", "task.repeats=1", "task.command_tokens=20", "threads=1"),
        *("task.engines=[default,native,llama-cpp,transformers-dynamic]", "prompt=it said"),
    )
    assert status == 0, err
    report = json.loads((tmp_path / "out" / "bench.json").read_text("utf-8"))
    found = {row["engine"] for row in [*report["engines"], *report["commands"]]}
    has_llama_cpp = importlib.util.find_spec("llama_cpp") is not None
    assert found == {"native", *(["llama-cpp", None] if has_llama_cpp else [])}
    rows = [row for name in ("engines", "commands", "limits") for row in report[name]]
    assert {row["precision"] for row in rows} == {"Q4_K"}
    missing = report["missing"]
    assert "cannot multiply" in missing.pop("transformers-dynamic Q4_K")
    assert all("llama_cpp is not installed" in reason for reason in missing.values())
    assert bool(missing) != has_llama_cpp

    weights = needed_bytes(gguf_file)
    runs = {name: run for name, (run,) in report["decode_runs"].items()}
    numbers = 2 * 2 * 2 * 64  # of a row, in two layers
    assert runs["memory Q4_K"]["bytes"] == weights + 16 * 4 * numbers
    assert runs["native Q4_K"]["weight_bytes"] == weights
    assert runs["native Q4_K"]["row_bytes"] == 4 * numbers
    if has_llama_cpp:
        assert runs["llama-cpp Q4_K"]["weight_bytes"] == weights
        assert runs["llama-cpp Q4_K"]["row_bytes"] == 2 * numbers
        assert "ours is in float32" in out


@pytest.mark.parametrize(
    ("mix", "arguments", "dtype"),
    [
        ("Q4_K_M", [], "float32"),
        ("Q4_K_M", ["weights=model", "dtype=auto"], "float32"),
        ("Q4_K_M", ["dtype=bfloat16"], "bfloat16"),
        ("Q8_0", ["dtype=float32"], "float32"),
        ("F32", [], "float32"),
        ("BF16", [], "bfloat16"),
        ("F16", [], "bfloat16"),
    ],
)
def test_activations_beside_a_gguf_file_are_what_auto_or_dtype_says(
    tmp_path: Path,
    command_line: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    mix: str,
    arguments: list[str],
    dtype: str,
) -> None:
    path = tmp_path / "tiny.gguf"
    write_seeded(path, LlamaConfig(600, 256, 256, 1, 4, 2, 64, 1e-5, 1e4, 128), mix)
    asked: list[Job] = []

    def timed(job: Job, waiting: Waiting) -> dict[str, Any]:
        asked.append(job)
        return invented(job, waiting)

    monkeypatch.setattr(comparison, "result_of", timed)
    engines = ["task.engines=[native]", "hydra.run.dir=out", "device=cpu"]
    status, _, err = command_line("task=bench", f"model={path}", *SMALL, *engines, *arguments)
    assert status == 0, err
    (formats,) = {tuple(job.overrides[-2:]) for job in asked if job.engine == "native"}
    assert formats == ("engine=native", f"dtype={dtype}")
    ours = Ours(next(job for job in asked if job.engine == "native"))
    width = {"float32": 4, "bfloat16": 2}[dtype]
    assert ours.row_bytes == width * 2 * 2 * 64
    if mix not in ("F32", "F16", "BF16"):
        norms = 3 * 256  # float32 in the file
        assert ours.weight_bytes == needed_bytes(path) - (4 - width) * norms


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["task.precisions=[int8]"], "is timed as it lies, in Q4_K: leave out task.precisions"),
        (["weights=int4"], "is timed as it lies, in Q4_K: leave out weights"),
        (["experiment=fast"], "is timed as it lies, in Q4_K: leave out weights"),
        (["task.engines=[transformers-dynamic]"], "it cannot multiply"),
    ],
)
def test_what_a_gguf_file_is_not_timed_with_is_refused(
    gguf_file: Path,
    command_line: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    told: str,
) -> None:
    monkeypatch.setattr(comparison, "result_of", lambda *_: pytest.fail("something was timed"))
    status, out, err = command_line("task=bench", f"model={gguf_file}", *SMALL, *arguments)
    assert (status, out) == (2, "")
    assert told in err.splitlines()[-1]
