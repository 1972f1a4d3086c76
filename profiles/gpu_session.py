"""The session on a GPU: steps in the order of what they are worth, within a budget.

    python profiles/gpu_session.py OUT [STEP …]       # by way of gpu.sh

Each step is a process with a limit; the budget is one for all of them. A step that fails, or is
cut off when its time is up, stops no other, and what it has measured by then is kept. All results
are in OUT/gpu.json, replaced whole whenever there is something new; what was said is in
OUT/gpu.log. This module needs nothing but Python, so that whatever is missing shows as a step that
failed. What needs PyTorch is in ``gpu_reads.py``.

Environment: BUDGET (570 seconds), REVISION, where there is no git, NCU (ncu), and what
``gpu_reads.py`` says. Exits 1 if a step failed.
"""

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
STEPS = {
    "machine": 60,
    "smollm2": 120,
    "tinyllama": 120,
    "smollm2-int8": 75,
    "tinyllama-int8": 75,
    "large": 100,
    "edits": 80,
    "tests": 150,
    "ncu": 60,
    "llama-8b": 120,
}
"""Seconds that each may take at most, in the order of what they are worth."""
BUDGET = 570.0
"""Seconds for all of them: a GPU is lent for commands of ten minutes."""
FEWEST_SECONDS = 15.0
"""With less of the budget left no step begins."""

GPU_TESTS = (
    "tests/invariants/test_invariants_on_cuda.py",
    "tests/test_cuda_paths.py",
    "tests/brain/tasks/test_run.py",
    "tests/compiled/test_tick_cuda.py",
    "tests/compiled/test_read_cuda.py",
)
"""Where tests are marked ``gpu``. The kernels are last: each case compiles some, and the steps
before have held reads against float32.
"""
OUTCOMES = ("passed", "failed", "error", "skipped")

KERNELS = ("project", "attend", "combine", "add_out", "gate_up", "add_down", "head")
"""Those of ``compiled/read_kernels.py``."""
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__t_sector_hit_rate.pct",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__grid_size",
    "launch__occupancy_limit_registers",
)


# The report --------------------------------------------------------------------------------------


class Found:
    """What a step has measured so far, kept in the session's file.

    Attributes: ``values``, by name; ``failed``, the names of those that could not be had.
    """

    def __init__(self, path: Path, step: str) -> None:
        self._path, self._step = path, step
        self.values: dict[str, Any] = {}
        self.failed: list[str] = []

    def put(self, name: str, value: Any) -> None:
        """Keeps a value."""
        self.values[name] = value
        with changed(self._path) as report:
            report["steps"].setdefault(self._step, {})["found"] = self.values

    def attempt(self, name: str, call: Callable[[], object]) -> None:
        """Calls; keeps why that failed, if it does, beside what has been found by that name."""
        try:
            call()
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            why = f"{type(error).__name__}: {lines[0]}"[:300]
            known = self.values.get(name)
            self.failed.append(name)
            self.put(name, {**(known if isinstance(known, dict) else {}), "failed": why})
            print(f"{name} failed: {why}", flush=True)


@contextlib.contextmanager
def changed(path: Path) -> Iterator[dict[str, Any]]:
    """The report, to be changed; the file is replaced whole."""
    report: dict[str, Any] = {"steps": {}}
    if path.exists():
        report = json.loads(path.read_text("utf-8"))
    yield report
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    beside.replace(path)


def revision() -> str:
    """Of this tree: by git, or as REVISION says, or "unknown"."""
    if os.environ.get("REVISION"):
        return os.environ["REVISION"]
    try:
        top, head, changes = (
            subprocess.run(
                ["git", "-C", ROOT, *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (
                ["rev-parse", "--show-toplevel"],
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no"],
            )
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    if Path(top).resolve() != ROOT.resolve():  # a folder within somebody else's repository
        return "unknown"
    return head + ("-changed" if changes else "")


# Steps without PyTorch ---------------------------------------------------------------------------


def tests(found: Found) -> int:
    """The tests marked ``gpu``, as far as time goes; counted as they end."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--timeout=60", "--no-header"]
    command += ["-p", "older_pytorch", "-p", "no:cacheprovider", "-p", "no:xdist", *GPU_TESTS]
    counts = dict.fromkeys(OUTCOMES, 0)
    wrong: list[str] = []
    found.put("counts", counts)
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        for line in running.stdout:
            print(line, end="", flush=True)
            told = re.match(r"(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", line)
            if told:
                outcome = told[2].lower()
                counts[outcome] += 1
                if outcome in ("failed", "error"):
                    wrong.append(told[1])
                found.put("counts", counts)
                found.put("wrong", wrong)
    found.put("ended", running.returncode in (0, 1, 5))  # 5: none was to be run
    print(", ".join(f"{number} {outcome}" for outcome, number in counts.items()))
    return 0 if running.returncode in (0, 5) else 1


def ncu(found: Found, out: Path) -> int:
    """Nsight Compute on the kernel of ours that takes longest in TinyLlama's dimensions."""
    program = os.environ.get("NCU", "ncu")
    if shutil.which(program) is None:
        found.put("left_out", f"{program} is not there")
        print(f"left out: {program} is not there")
        return 0
    report = json.loads((out / "gpu.json").read_text("utf-8"))
    kernel = slowest(report)
    found.put("kernel", kernel)
    command = [program, "--csv", "--page", "raw", "--metrics", ",".join(METRICS)]
    command += ["--profile-from-start", "off", "--clock-control", "none"]
    command += ["--kernel-name", f"regex:^{kernel}$", "--launch-count", "4"]
    command += [sys.executable, str(ROOT / "profiles" / "gpu_reads.py"), "read", str(out)]
    ran = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=False)
    print(ran.stdout)
    launches = metrics(ran.stdout)
    found.put("launches", launches)
    print(f"{kernel}: {len(launches)} launches")
    return 0 if ran.returncode == 0 and launches else 1


def slowest(report: dict[str, Any]) -> str:
    """Which of our kernels a tick spends most time in; ``gate_up``, which reads most weights, where
    that is not known.
    """
    started = report["steps"].get("tinyllama", {}).get("found", {}).get("kernels_started", {})
    ours = (row["name"] for row in started.get("longest", ()) if row["name"] in KERNELS)
    return next(ours, "gate_up")


def metrics(text: str) -> list[dict[str, str]]:
    """Rows of Nsight Compute's CSV: a header, units, and a line for each launch."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))
    if not rows:
        return []
    units, *launches = rows
    return [
        {name: f"{row[name]} {units[name]}".strip() for name in METRICS if row.get(name)}
        for row in launches
    ]


# The session -------------------------------------------------------------------------------------


def command_of(step: str, out: Path) -> list[str]:
    """The process of a step."""
    if step in ("tests", "ncu"):
        return [sys.executable, __file__, "--step", step, str(out)]
    return [sys.executable, str(ROOT / "profiles" / "gpu_reads.py"), step, str(out)]


def run(command: list[str], seconds: float, log: IO[bytes]) -> int | None:
    """Its exit status, or None if it was cut off. Nothing that it started outlives it."""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            for number, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(patience)


def session(out: Path, steps: list[str], budget: float) -> int:
    """Every step that there is time for; how many failed."""
    path, began, failed = out / "gpu.json", time.monotonic(), 0
    tiny = os.environ.get("TINY", "") not in ("", "0")  # its seconds are a CPU's: no limits
    path.unlink(missing_ok=True)
    with changed(path) as report:
        report |= {
            "revision": revision(),
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "device": os.environ.get("DEVICE", "cuda"),
            "tiny": tiny,
            "budget_seconds": budget,
            "steps": {step: {"ended": "not begun"} for step in steps},
        }
    with open(out / "gpu.log", "wb") as log:
        for step in steps:
            left = budget - (time.monotonic() - began)
            limit = left if tiny else min(float(STEPS[step]), left)
            started, status, why = time.monotonic(), 0, ""
            if left < FEWEST_SECONDS:
                ended, why = "left out", "no time is left"
            else:
                log.write(f"=== {step}, at most {limit:.0f} s\n".encode())
                log.flush()
                found = run(command_of(step, out), limit, log)
                if found is None:
                    ended, why = "cut", f"its {limit:.0f} s were over"
                else:
                    status = found
                    ended = "failed" if status else "ok"
                    why = _why_failed(out, step) if status else ""
            failed += ended == "failed"
            taken = time.monotonic() - started
            with changed(path) as report:
                told = {"ended": ended, "why": why, "seconds": taken, "status": status}
                report["steps"][step] |= told
                report["took_seconds"] = time.monotonic() - began
            print(f"{step}: {ended}, {taken:.0f} s{': ' + why if why else ''}", flush=True)
    print("--- summary")
    print("\n".join(summary(json.loads(path.read_text("utf-8")))))
    return failed


def _why_failed(out: Path, step: str) -> str:
    """What failed of a step, or the last line that it said."""
    report = json.loads((out / "gpu.json").read_text("utf-8"))
    found = report["steps"][step].get("found", {})
    failed = [
        f"{name}: {value['failed']}"
        for name, value in found.items()
        if isinstance(value, dict) and isinstance(value.get("failed"), str)
    ]
    lines = (out / "gpu.log").read_text("utf-8", errors="replace").splitlines()
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return ("; ".join(failed) or said)[:300]


def summary(report: dict[str, Any]) -> list[str]:
    """The report for people: a line or two for each step that found something."""
    tiny = " (tiny sizes: these numbers say nothing)" if report["tiny"] else ""
    lines = [f"revision {report['revision']}, {report['device']}{tiny}"]
    for step, told in report["steps"].items():
        values = told.get("found", {})
        lines.append(f"{step}: {told['ended']}" + (f", {told['why']}" if told.get("why") else ""))
        for name, value in values.items():
            if isinstance(value, dict):
                lines += [f"  {line}" for line in _line(name, value, values)]
        if "left_out" in values:
            lines.append(f"  left out: {values['left_out']}")
        if "launches" in values:
            lines += [f"  {values['kernel']}: {launch}" for launch in values["launches"]]
        if values.get("wrong"):
            lines.append(f"  wrong: {' '.join(values['wrong'])}")
    return lines


def _line(name: str, value: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """What one result says, if it is one for people."""
    lines = []
    for key in ("failed", "left_out", "says"):
        if isinstance(value.get(key), str):
            lines.append(f"{name}: {value[key]}")
    if name == "card":
        lines.append(f"card: {value.get('name')}, {value['asked']}")
    if name == "environment":
        lines.append(", ".join(f"{key} {value[key]}" for key in ("torch", "cuda", "triton")))
    if name in ("copy", "plain_reading"):
        lines.append(f"{name}: {value['gb_per_second']['median']:.0f} GB/s")
    if name == "case":
        lines.append("{shape} {precision}, {rows:,} rows of {slots:,}".format(**value))
    if "queued_ms" in value:
        line = (
            f"{name}: {_ms(value['queued_ms'])} queued, {value['ticks_per_second_queued']:.0f}/s; "
            f"{_ms(value['waited_ms'])} waited for, host {value['host_ms']['median']:.3f}; "
            f"step {value['step_ms']['median']:.3f}"
        )
        if "share_of_copy" in value:
            line += f"; {value['share_of_copy']:.0%} of the copy's rate"
        lines.append(line)
    elif name == "transformers" and "waited_ms" in value:
        lines.append(f"{name}: {_ms(value['waited_ms'])} waited for")
        if "over_kernels" in value:
            lines.append(
                f"  × kernels {_times(value['over_kernels']['waited'])}; "
                f"{value['same_as_ours']} of {value['ticks']} tokens as ours"
            )
    if "correct" in value:
        lines.append(_correct(value["correct"]))
    if name == "correct":
        lines.append(_correct(value))
    if name == "twin_over_kernels":
        lines.append(f"{name}: " + ", ".join(f"{key} {_times(of)}" for key, of in value.items()))
    if name == "agreement" and "ticks" in value:
        lines.append(
            "agreement: {spoken_alike} of {ticks} tokens spoken alike, {likeliest_alike} likeliest "
            "alike, widest gap {widest_gap:.2g}".format(**value)
        )
    if name.endswith("_started") and "longest" in value:
        lines.append(f"{name}: {value['per_tick']:.0f} a tick, {value['microseconds']:.0f} µs")
        lines += [
            f"  {row['microseconds']:8.1f} µs in {row['per_tick']:5.1f}: {row['name'][:60]}"
            for row in value["longest"][:8]
        ]
    if "above_a_tick_ms" in value:
        lines.append(
            f"{name}: {_ms(value['above_a_tick_ms'])} above a tick, without its read "
            f"{_ms(value['above_without_its_read_ms'])}"
        )
    if name == "counts":
        lines.append(", ".join(f"{number} {outcome}" for outcome, number in value.items()))
    return lines


def _ms(value: dict[str, float]) -> str:
    return f"{value['median']:.3f} ms ({value['least']:.3f}–{value['most']:.3f})"


def _times(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['least']:.2f}–{value['most']:.2f})"


def _correct(value: dict[str, Any]) -> str:
    return (
        f"  {'right' if value['right'] else 'WRONG'}: logits off {value['logits_off']:.2g} of "
        f"{value['logits_size']:.2g}, mass {value['mass_off']:.2g} of {value['mass_size']:.2g}, "
        f"its sum {value['mass_sum']:.4f}; {value['repeated_alike']} of {value['repeated']} alike"
    )


def main() -> int:
    """Runs the session, or one step of it; the exit status."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["--step"]:
        step, out = arguments[1], Path(arguments[2])
        found = Found(out / "gpu.json", step)
        return tests(found) if step == "tests" else ncu(found, out)
    if not arguments:
        print("refused: give a folder for the results", file=sys.stderr)
        return 2
    steps = arguments[1:] or list(STEPS)
    for step in steps:
        if step not in STEPS:
            known = " ".join(STEPS)
            print(f"refused: {step} is no step; use some of: {known}", file=sys.stderr)
            return 2
    out = Path(arguments[0]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and no step outlives it
    return 1 if session(out, steps, float(os.environ.get("BUDGET") or BUDGET)) else 0


if __name__ == "__main__":
    sys.exit(main())
