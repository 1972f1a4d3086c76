"""``task=profile``, the names that profilers see, and what their reports are made into."""

import contextlib
import json
import sqlite3
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import nsight_report
import pytest
import torch

import brain
from brain import app
from brain.loop import PATCH, STEP, TICK
from brain.measure.profiling.ranges import (
    BETWEEN,
    Kernel,
    Range,
    legible,
    table,
    warm_up_of,
    with_kernels,
)
from brain.measure.profiling.trace import profiler_ranges, ranges_of_trace, record
from brain.tasks import profile
from compiled.graphs import CHOOSE, READ, WARM_UP
from fixture_types import OpenTiny

GRAPHS = ["step T=1 bucket=32", "patch tick W=1"]


# Names --------------------------------------------------------------------------------------------


def calls_of(run: Callable[[], object]) -> set[str]:
    """Names of every function, of Python or C, that a run calls."""
    names: set[str] = set()

    def seen(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            names.add(frame.f_code.co_qualname)
        elif event == "c_call":
            names.add(getattr(argument, "__qualname__", ""))

    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(None)
    return names


def test_names_cost_nothing_while_nobody_looks(open_tiny: OpenTiny) -> None:
    """No range is made, entered or left: a null context stands in the place of each."""

    def ranges(b: brain.Brain) -> set[str]:
        b.prime([1, 2, 3, 4, 5])
        b.tick()
        return {n for n in calls_of(b.tick) if "annotate" in n}

    assert ranges(open_tiny()) == set()
    assert ranges(open_tiny(nvtx=True))  # the check can fail


def test_every_tick_step_graph_and_warm_up_has_its_name(warm_brain: brain.Brain) -> None:
    opened: list[str] = []
    told: list[tuple[str, ...]] = []

    @contextmanager
    def naming(name: str) -> Iterator[None]:
        opened.append(name)
        told.append(tuple(opened))
        yield
        opened.pop()

    warm_brain.prime([7] * 20)
    warm_brain.graphs.ranges = naming
    try:
        warm_brain.tick()
        list(warm_brain.warm_up())
    finally:
        warm_brain.graphs.ranges = contextlib.nullcontext
    steps = [(TICK, step) for step in (STEP, PATCH)]
    graphs = [(*path, graph) for path, graph in zip(steps, GRAPHS, strict=True)]
    assert told[:5] == [
        (TICK,),
        *(path for pair in zip(steps, graphs, strict=True) for path in pair),
    ]
    assert told[5] == (WARM_UP,)
    assert {path[1:] for path in told[6:]} == {(name,) for name in warm_brain.graphs.expected()}


# The table ----------------------------------------------------------------------------------------


def session() -> list[Range]:
    """Two ticks of 100 and 120 µs, in the second of which something new happens."""
    told = [Range(WARM_UP, 0, 50), Range("step T=1 bucket=32", 5, 45)]
    for start, new in ((100, 0), (300, 20)):
        told += [
            Range(TICK, start, start + 100 + new),
            Range(STEP, start + 10, start + 70),
            Range("step T=1 bucket=32", start + 10, start + 60),
            Range(PATCH, start + 70, start + 90 + new),
        ]
        if new:
            told.append(Range("rebase", start + 75, start + 75 + new))
    return told


def test_the_table_has_medians_and_shares_in_order() -> None:
    rows = {row.name: row for row in table(reversed(session()))}
    assert list(rows) == [TICK, STEP, "step T=1 bucket=32", PATCH, "rebase", BETWEEN]
    assert [row.depth for row in rows.values()] == [0, 1, 2, 1, 2, 1]
    assert [row.microseconds for row in rows.values()] == [110, 60, 50, 30, 20, 20]
    assert rows[TICK].share == 1
    assert rows[STEP].share == pytest.approx(120 / 220, abs=1e-4)
    assert rows["rebase"].ticks == 1
    steps = sum(rows[name].share for name in (STEP, PATCH, BETWEEN))
    assert steps == pytest.approx(1, abs=1e-3)
    assert warm_up_of(session()) == [{"name": "step T=1 bucket=32", "seconds": 0.0}]
    assert len(legible(list(rows.values())).splitlines()) == 7
    assert table([Range(STEP, 0, 1)]) == []


def test_a_kernel_belongs_to_the_range_in_which_it_was_started() -> None:
    kernels = [Kernel(111, 7.0), Kernel(112, 9.0), Kernel(171, 5.0), Kernel(999, 1.0)]
    rows = {row.name: row for row in table(with_kernels(session()[2:6], kernels))}
    counted = {name: (row.kernels, row.device_microseconds) for name, row in rows.items()}
    assert counted[TICK] == (3, 21)
    assert counted[STEP] == (2, 16)
    assert counted[PATCH] == (1, 5)
    assert counted[BETWEEN] == (0, 0)


def event(cat: str, name: str, start: float, taken: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": taken, "tid": 1, "args": args}


def test_a_trace_of_a_gpu_counts_the_kernels_of_a_launched_graph() -> None:
    trace = [
        event("user_annotation", TICK, 0, 100),
        event("user_annotation", STEP, 10, 50),
        event("cuda_runtime", "cudaGraphLaunch", 20, 5, correlation=4),
        event("cpu_op", "aten::mm", 20, 5),
        *(event("kernel", "gemm", 200 + start, 30, correlation=4) for start in (0, 40)),
        event("kernel", "somebody else's", 200, 30, correlation=5),
    ]
    rows = {row.name: row for row in table(ranges_of_trace(trace))}
    assert (rows[STEP].kernels, rows[STEP].device_microseconds) == (2, 60)


def test_a_trace_of_a_cpu_counts_loops_and_operators_that_compute() -> None:
    trace = [
        event("user_annotation", TICK, 0, 100),
        event("cpu_op", "Torch-Compiled Region: 0/1", 1, 90),
        event("cpu_op", "graph_1_cpp_fused_add_0", 2, 5),
        event("cpu_op", "aten::view", 8, 1),
        event("cpu_op", "aten::empty_strided", 10, 1),
        event("cpu_op", "aten::linear", 20, 10),
        event("cpu_op", "aten::addmm", 21, 8),  # inside of linear
        event("cpu_op", "aten::copy_", 40, 2),
    ]
    assert table(ranges_of_trace(trace))[0].kernels == 3


def test_torch_profiler_sees_the_steps_by_name(warm_brain: brain.Brain, tmp_path: Path) -> None:
    b = warm_brain
    b.prime([7] * 20)

    def ticks() -> None:
        for _ in range(3):
            b.tick()

    b.graphs.ranges = profiler_ranges()
    try:
        ranges = record(ticks, torch.device("cpu"), tmp_path / "trace.json")
    finally:
        b.graphs.ranges = contextlib.nullcontext
    rows = table(ranges)
    shown = [row.name for row in rows]
    assert shown == [TICK, STEP, GRAPHS[0], PATCH, GRAPHS[1], BETWEEN]
    assert all(row.ticks == 3 for row in rows)


# The command --------------------------------------------------------------------------------------


def run_main(
    monkeypatch: pytest.MonkeyPatch, where: Path, tiny_folder: Path, *arguments: str
) -> None:
    monkeypatch.chdir(where)
    model = ["model=folder", f"model.path={tiny_folder}", "hydra.run.dir=out", "task=profile"]
    monkeypatch.setattr(sys, "argv", ["brain", *model, *arguments])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    app.main()


def test_the_task_writes_a_table_a_trace_and_a_picture(
    tmp_path: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_main(monkeypatch, tmp_path, tiny_folder, "prompt=abc", "capacity=64", "task.ticks=3")
    report = json.loads((tmp_path / "out" / "profile.json").read_text("utf-8"))
    told = capsys.readouterr().out
    for step in (TICK, STEP, READ, CHOOSE, PATCH):
        (row,) = [row for row in report["tick"] if row["name"] == step]
        assert row["ticks"] == 3
        assert row["microseconds"] > 0
        assert row["kernels"] > 0 or step == PATCH  # that of a native tick is none of PyTorch's
        assert step in told
    assert report["unwatched_tick_microseconds"] > 0
    assert json.loads((tmp_path / "out" / "trace.json").read_text("utf-8"))["traceEvents"]
    assert (tmp_path / "out" / "timeline.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("weights", "told"), [("model", "bfloat16, native"), ("int8", "bfloat16, int8 weights, native")]
)
def test_the_report_and_its_picture_tell_the_format_of_the_weights(
    weights: str,
    told: str,
    tmp_path: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    titles: list[str] = []
    monkeypatch.setattr(profile, "draw_timeline", lambda ranges, path, title: titles.append(title))
    asked = ["prompt=abc", "capacity=64", "task.ticks=1", "dtype=bfloat16", "device=cpu"]
    run_main(monkeypatch, tmp_path, tiny_folder, *asked, f"weights={weights}")
    report = json.loads((tmp_path / "out" / "profile.json").read_text("utf-8"))
    assert report["weights"] == weights
    assert titles == [f"{tiny_folder.name}, {told}, cpu, torch.profiler {torch.__version__}"]


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("task.ticks=0", "task.ticks must be at least 1, not 0"),
        ("lookup=ngram", "task=profile watches plain ticks: use lookup=none"),
        ("lookup.width=3", "task=profile watches plain ticks: use lookup=none"),
        ("capture=true", "task=profile writes no captures: leave out capture=true"),
        (
            "stop_at_eos=true",
            "task=profile watches task.ticks ticks: leave out stop_at_eos=true",
        ),
    ],
)
def test_what_would_not_be_watched_is_refused(
    argument: str,
    told: str,
    tmp_path: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as left:
        run_main(monkeypatch, tmp_path, tiny_folder, argument)
    assert left.value.code == 2
    assert capsys.readouterr().err == f"refused: {told}\n"


# Reports of Nsight Systems ------------------------------------------------------------------------


def nsys_report(path: Path, ranges: list[Range] | None, *, gpu: bool = False) -> Path:
    """A report with the tables of Nsight Systems; its times are in nanoseconds."""
    with closing(sqlite3.connect(path)) as report, report:
        report.execute("CREATE TABLE StringIds (id INTEGER, value TEXT)")
        report.execute("CREATE TABLE EXPORT_META_DATA (name TEXT, value TEXT)")
        report.execute("INSERT INTO EXPORT_META_DATA VALUES ('EXPORT_PRODUCT_VERSION', '2022.4')")
        if ranges is not None:
            report.execute(
                "CREATE TABLE NVTX_EVENTS (start INTEGER, end INTEGER, eventType INTEGER, "
                "text TEXT, globalTid INTEGER, textId INTEGER)"
            )
        for number, r in enumerate(ranges or []):
            text, text_id = (r.name, None) if number % 2 else (None, number)
            report.execute("INSERT INTO StringIds VALUES (?, ?)", (number, r.name))
            times = int(r.start * 1e3), int(r.end * 1e3)
            row = (*times, nsight_report.PUSH_POP, text, 1, text_id)
            report.execute("INSERT INTO NVTX_EVENTS VALUES (?, ?, ?, ?, ?, ?)", row)
        if gpu:
            report.executescript(
                "CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER, correlationId INTEGER);"
                "CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL "
                "(start INTEGER, end INTEGER, correlationId INTEGER);"
                "INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (120000, 8);"
                "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (500000, 530000, 8);"
                "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (530000, 540000, 8);"
            )
    return path


def report_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["nsight_report.py", *map(str, arguments)])
    return nsight_report.main()


def test_a_report_becomes_a_table_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = nsys_report(tmp_path / "brain.sqlite", session())
    assert report_main(monkeypatch, path, tmp_path / "out") == 0
    told = json.loads((tmp_path / "out" / "nsight.json").read_text("utf-8"))
    assert told["profiler"] == "Nsight Systems 2022.4"
    assert told["ticks"] == 2
    assert [(r["name"], r["microseconds"]) for r in told["tick"]] == [
        (row.name, row.microseconds) for row in table(session())
    ]
    assert "kernels" not in told["tick"][0]  # nobody counted
    assert str(tmp_path) not in json.dumps(told)
    assert (tmp_path / "out" / "nsight.png").read_bytes().startswith(b"\x89PNG")
    assert STEP in capsys.readouterr().out


def test_a_report_of_a_gpu_has_kernels(tmp_path: Path) -> None:
    _, ranges = nsight_report.read_report(
        nsys_report(tmp_path / "gpu.sqlite", session()[2:6], gpu=True)
    )
    rows = {row.name: row for row in table(ranges)}
    assert (rows[STEP].kernels, rows[STEP].device_microseconds) == (2, 40)


@pytest.mark.parametrize(
    ("ranges", "told"),
    [(None, "no NVTX ranges"), ([], "no NVTX ranges"), ([Range("a", 0, 1)], "no tick")],
    ids=["table", "row", "tick"],
)
def test_a_report_without_ranges_says_why(
    ranges: list[Range] | None,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = nsys_report(tmp_path / "brain.sqlite", ranges)
    assert report_main(monkeypatch, path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("refused: ")
    assert told in line
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [None, b"", b"no database at all" * 100])
def test_what_is_no_report_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "report"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(brain.Refused, match="report"):
        nsight_report.read_report(path)
