"""The command line as its users run it: a process of its own, on a tiny model."""

import json
import signal
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import brain
from brain import app
from conf.schema import register
from fixture_types import CommandLine
from processes import ENVIRONMENT, call, command


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A captured run of eight ticks."""
    where = tmp_path_factory.mktemp("cli")
    done = call(
        where,
        tiny_folder,
        "prompt=Hello, it's me",
        "ticks=8",
        "seed=5",
        "capacity=64",
        "capture=true",
        "hydra.run.dir=out",
    )
    (where / "out" / "stdout.txt").write_text(done.stdout, "utf-8", newline="")
    return where / "out"


def test_standard_output_is_the_text_alone(run_folder: Path, tiny_folder: Path) -> None:
    report = json.loads((run_folder / "run.json").read_text("utf-8"))
    spoken = brain.open("folder", **{"model.path": str(tiny_folder)}).decode(report["tokens"])
    assert len(report["tokens"]) == 8
    assert (run_folder / "transcript.txt").read_text("utf-8") == spoken
    assert (run_folder / "stdout.txt").read_bytes() == (run_folder / "transcript.txt").read_bytes()


def test_the_command_line_and_the_library_say_the_same(run_folder: Path, tiny_folder: Path) -> None:
    b = brain.open("folder", **{"model.path": str(tiny_folder)}, seed=5, capacity=64)
    b.prime("Hello, it's me")
    report = json.loads((run_folder / "run.json").read_text("utf-8"))
    assert [tick.token for tick in b.stream(8)] == report["tokens"]


def test_inspect_prints_a_captured_tick(run_folder: Path, tiny_command_line: CommandLine) -> None:
    tokens = json.loads((run_folder / "run.json").read_text("utf-8"))["tokens"]
    for tick in (1, 8):
        task = ["task=inspect", f"task.path={run_folder}", f"task.tick={tick}"]
        status, shown, _ = tiny_command_line(*task)
        assert status == 0
        assert shown.startswith(f"tick {tick}\n")
        assert f"spoke token {tokens[tick - 1]} " in shown
        assert "read.out.mass" in shown


def test_multirun_runs_every_combination(tmp_path: Path, tiny_folder: Path) -> None:
    call(tmp_path, tiny_folder, "-m", "seed=1,2", "prompt=abc", "ticks=2", "hydra.sweep.dir=all")
    assert (tmp_path / "all" / "0" / "transcript.txt").exists()
    assert (tmp_path / "all" / "1" / "run.json").exists()


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("import brain; dir(brain); brain.Refused", 0),
        ("import sys; sys.argv[1:] = ['--help']; from brain.app import main; main()", 0),
        ("import sys; sys.argv[1:] = ['tix=3']; from brain.app import main; main()", 2),
        ("import sys; sys.argv[1:] = ['ticks=x']; from brain.app import main; main()", 2),
        ("import sys; sys.argv[1:] = ['model=gpt9']; from brain.app import main; main()", 2),
    ],
    ids=["import", "help", "key", "value", "choice"],
)
def test_what_needs_no_pytorch_imports_none(code: str, status: int, tmp_path: Path) -> None:
    heavy = "{'torch', 'numpy', 'gguf', 'safetensors', 'tokenizers', 'matplotlib', 'tqdm'}"
    code = f"import atexit, sys; atexit.register(lambda: print({heavy} & set(sys.modules))); {code}"
    process = [sys.executable, "-c", code]
    done = subprocess.run(
        process, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.splitlines()[-1]) == (status, "set()"), done.stderr


def test_help_is_what_hydra_would_print(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from_hydra = app._application
    monkeypatch.setattr(sys, "argv", ["brain", "--help"])
    register()
    with pytest.raises(SystemExit):
        from_hydra()
    assert capsys.readouterr().out == app._help() + "\n"


def test_the_package_lists_and_gives_its_names() -> None:
    assert set(brain.__all__) <= set(dir(brain))
    assert brain.open.__module__ == "brain.opening"
    with pytest.raises(AttributeError, match="'brain' has no attribute 'opne'"):
        brain.opne  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["ticks=0"], "ticks"),
        (["ticks=-3"], "ticks"),
        (["prompt="], "prompt"),
        (["tix=3"], "tix"),
        (["capacity=0"], "capacity"),
        (["capacity=9", "cull=none", "prompt=a prompt of more than nine tokens"], "capacity"),
        (["cull=none", "cull.chunk=129"], "cull.chunk must be 1"),
        (["cull.chunk=0"], "cull.chunk must be 1"),
        (["model.path=not/there"], "not/there"),
        (["model=gpt9"], "gpt9"),
        (["dtype=int3"], "int3"),
        (["device=tpu"], "tpu"),
        (["cull.policy=whim"], "whim"),
        (["cull.target=5000"], "cull.target"),
        (["sampler.top_p=0"], "top_p"),
        (["engine.widths=[2,4]"], "widths"),
        (["source=nobody"], "nobody"),
        (["model=smollm2"], "model.path does not apply to model=smollm2: use model=folder"),
        (["path=elsewhere"], "path=elsewhere and model.path="),
        (["model.wheel=x.whl"], "model.wheel does not apply to model=folder"),
        (["sampler.temperature=1e-40"], "sampler.temperature must be 1e-15 to 1e+15"),
        (["cull.brightness.seeds={user: 1e39}"], "cull.brightness.seeds: user is 1e+39"),
        (["task=golden", "threads=7777"], "threads must be 1 to 1024"),
        (["task=golden", "weights=int8"], "weights=int8 has no goldens"),
        (["capture_top=-1"], "capture_top"),
        (["task=inspect"], "task.path"),
        (["task=inspect", "task.path=."], "captures"),
        (["task=bench", "task.engines=[warp]"], "warp"),
        (["task=bench", "capacity=16"], "capacity"),
        (["prompt=hi", "capacity=8", "cull=none", "ticks=50"], "cull"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_status_2(
    tiny_folder: Path, command_line: CommandLine, arguments: list[str], told: str
) -> None:
    # In this process, because there are many: importing torch takes longer than refusing.
    status, _, err = command_line(*command(tiny_folder, *arguments)[3:])
    assert status == 2
    lines = err.splitlines()
    refusals = [line for line in lines if line.startswith("refused: ")]
    assert len(refusals) == 1
    assert told in refusals[0]
    assert lines[-1] == refusals[0]


def test_a_refusal_is_status_2_for_the_shell(tmp_path: Path, tiny_folder: Path) -> None:
    done = call(tmp_path, tiny_folder, "ticks=0", status=2)
    assert done.stderr == "refused: ticks must be at least 1, not 0\n"
    assert done.stdout == ""


def test_a_memory_that_forgets_nothing_ends_its_run_with_everything_written(
    tmp_path: Path, tiny_command_line: CommandLine
) -> None:
    arguments = ["prompt=abcdefgh", "ticks=50", "capacity=16", "cull=none", "hydra.run.dir=out"]
    for _ in range(2):  # the same again adds nothing
        status, _, told = tiny_command_line(*arguments)
        assert status == 2
        assert told.splitlines()[-1].startswith("refused: memory is full: 17 rows")
        report = json.loads((tmp_path / "out" / "run.json").read_text("utf-8"))
        assert report["rows"] == 16
        assert len(report["tokens"]) == 9
        assert (tmp_path / "out" / "memory.json").exists()
        (save,) = (tmp_path / "out" / "saves").glob("*/brain.json")
    assert tiny_command_line("task=inspect", "task.path=out")[0] == 0
    roomier = brain.load(save.parent, capacity=32)
    assert len(list(roomier.stream(4))) == 4


def test_the_folder_of_a_model_has_a_short_name(
    command_line: CommandLine, tiny_folder: Path
) -> None:
    asked = ["model=folder", f"path={tiny_folder}", "prompt=abc", "ticks=2"]
    status, _, told = command_line(*asked)
    assert status == 0, told
    opened = brain.open("folder", path=str(tiny_folder), capacity=16)
    assert opened.settings.conf.path is None
    assert opened.settings.conf.model.path == str(tiny_folder)


def test_ctrl_c_ends_with_status_130_and_a_whole_transcript(
    tmp_path: Path, tiny_folder: Path
) -> None:
    arguments = ["prompt=abc", "ticks=1000000", "capacity=32", "hydra.run.dir=out"]
    with subprocess.Popen(
        command(tiny_folder, *arguments),
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        heard = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        rest, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in told
    assert told.decode().splitlines()[-1] == "interrupted"
    assert (tmp_path / "out" / "transcript.txt").read_bytes() == heard + rest


def test_a_closed_pipe_is_no_error(tmp_path: Path, tiny_folder: Path) -> None:
    with subprocess.Popen(
        command(tiny_folder, "prompt=abc", "ticks=1000000", "capacity=32"),
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(5)
        process.stdout.close()
        told = process.stderr.read()
        assert process.wait(timeout=60) == 0
    assert b"Traceback" not in told
    assert b"BrokenPipe" not in told
    assert not list(tmp_path.rglob("failed.txt"))  # a reader who leaves is no failure


def test_a_reader_who_leaves_the_help_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "brain.app", "--help"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (0, b"")


def test_the_version_is_ours_pytorchs_and_the_device(command_line: CommandLine) -> None:
    status, out, err = command_line("--version")
    assert (status, err) == (0, "")
    (line,) = out.splitlines()
    assert line.startswith(f"positronic-brain {version('positronic-brain')}, PyTorch ")
    assert torch.__version__ in line
    assert line.partition(", PyTorch ")[2].split(", ")[1].startswith(("cpu", "cuda"))


def test_help_reads_like_a_manual(command_line: CommandLine) -> None:
    status, manual, _ = command_line("--help")
    assert status == 0
    for heading in ("NAME", "SYNOPSIS", "DESCRIPTION", "KEYS", "GROUPS", "TASKS", "EXIT STATUS"):
        assert f"\n{heading}" in "\n" + manual
    conf = Path(brain.__file__).parents[1] / "conf"
    for group in ("model", "engine", "sampler", "cull", "task"):
        for choice in (conf / group).glob("*.yaml"):
            assert choice.stem in manual


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free.\nSee docs"
            ),
            "CUDA out of memory; use a smaller capacity, model or dtype",
        ),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate "
                "memory: you tried to allocate 40 bytes. Error code 12 (Cannot allocate memory)"
            ),
            "can't allocate memory: you tried to allocate 40 bytes; "
            "use a smaller capacity, model or dtype",
        ),
        (MemoryError(), "MemoryError; use a smaller capacity, model or dtype"),
        (
            RuntimeError("can't start new thread"),
            "can't start new thread; set threads=1, or allow more processes (ulimit -u)",
        ),
    ],
    ids=["device", "host", "python", "threads"],
)
def test_what_the_machine_lacks_is_told_in_one_line(
    error: Exception,
    told: str,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr("brain.tasks.run.open_brain", full)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["brain", "model=folder", f"model.path={tiny_folder}"])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(SystemExit) as left:
        app.main()
    assert left.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"refused: {told}"
