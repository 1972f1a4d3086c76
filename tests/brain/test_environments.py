"""The command line where something outside it is missing, closed, full or gone: the text, or one
line and status 2.
"""

import os
import pty
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

import brain
from brain.errors import Refused
from brain.machine.graph_cache import VARIABLE
from fixture_types import CommandLine, OpenTiny
from namespaces import as_nobody, mounting, read_only
from processes import ENVIRONMENT, command
from toys import digest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="shells and streams as on Unix")

PRODUCT = Path(brain.__file__).parents[1]
RUN = ["prompt=Hello", "ticks=6", "capacity=32", "seed=1", "hydra.run.dir=out"]


def run(
    where: Path,
    arguments: list[str],
    redirection: str = "",
    variables: Mapping[str, str | None] = MappingProxyType({}),
) -> subprocess.CompletedProcess[bytes]:
    """A command in a shell that redirects its streams; a variable of None is taken away."""
    around = {**ENVIRONMENT, **variables}
    done = subprocess.run(
        ["bash", "-c", f'"$@" {redirection}', "bash", *arguments],
        cwd=where,
        env={name: value for name, value in around.items() if value is not None},
        capture_output=True,
        check=False,
    )
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    return done


def assert_said(out: bytes, where: Path) -> None:
    """That it is the whole text of a run."""
    assert out == (where / "out" / "transcript.txt").read_bytes()
    assert len((where / "out" / "tokens.txt").read_text().splitlines()) == 6
    assert (where / "out" / "run.json").exists()


def refusal(done: subprocess.CompletedProcess[bytes]) -> str:
    """The one line of a refused run."""
    assert done.returncode == 2, done.stderr
    last = done.stderr.decode().splitlines()[-1]
    assert last.startswith("refused: ")
    return last


# Standard streams ---------------------------------------------------------------------------------


@pytest.mark.parametrize("redirection", ["2>&- <&-", "2>/dev/full"], ids=["closed", "full"])
def test_the_text_survives_standard_error(
    tmp_path: Path, tiny_folder: Path, redirection: str
) -> None:
    done = run(tmp_path, command(tiny_folder, *RUN), redirection)
    assert (done.returncode, done.stderr) == (0, b"")
    assert_said(done.stdout, tmp_path)


def test_the_text_survives_whoever_reads_standard_error(tmp_path: Path, tiny_folder: Path) -> None:
    run(tmp_path, command(tiny_folder, *RUN), "2>&1 >text | true; echo ${PIPESTATUS[0]} >code")
    assert (tmp_path / "code").read_text() == "0\n"
    assert_said((tmp_path / "text").read_bytes(), tmp_path)


def test_without_standard_output_nothing_begins(tmp_path: Path, tiny_folder: Path) -> None:
    done = run(tmp_path, command(tiny_folder, *RUN), ">&-")
    assert refusal(done).startswith("refused: standard output is closed")
    assert not list(tmp_path.iterdir())


def test_a_run_whose_text_is_lost_ends_and_goes_on_elsewhere(
    tmp_path: Path, tiny_folder: Path
) -> None:
    done = run(tmp_path, command(tiny_folder, *RUN), ">/dev/full")
    assert refusal(done).startswith("refused: standard output cannot be written (No space")
    assert len((tmp_path / "out" / "tokens.txt").read_text().splitlines()) == 1
    done = run(tmp_path, command(tiny_folder, *RUN))
    assert done.returncode == 0
    assert done.stdout
    assert_said((tmp_path / "out" / "transcript.txt").read_bytes(), tmp_path)


@pytest.mark.parametrize(
    ("reader", "status"), [("| true", "0"), (">/dev/full", "2")], ids=["gone", "full"]
)
def test_help_that_is_not_read_ends_quietly(tmp_path: Path, reader: str, status: str) -> None:
    asked = [sys.executable, "-m", "brain.app", "--help"]
    done = run(tmp_path, asked, f"{reader}; echo ${{PIPESTATUS[0]}} >code")
    assert (tmp_path / "code").read_text().strip() == status
    assert len(done.stderr.splitlines()) == (status == "2")


def test_notes_of_hydra_that_are_lost_are_said(tmp_path: Path) -> None:
    done = run(tmp_path, [sys.executable, "-m", "brain.app", "--info"], ">/dev/full")
    assert "standard output cannot be written" in refusal(done)
    assert b"Logging error" not in done.stderr


def test_a_terminal_that_goes_away_is_the_end_of_a_run(tmp_path: Path, tiny_folder: Path) -> None:
    arguments = [*RUN, "ticks=1000000"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        # setsid: closing our end hangs up on who has the other one as its terminal
        ["setsid", "--ctty", *command(tiny_folder, *arguments)],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        tokens = tmp_path / "out" / "tokens.txt"
        while not (tokens.exists() and tokens.stat().st_size):
            os.read(ours, 1000)
        os.close(ours)
        assert process.wait(timeout=60) == 130
    assert list((tmp_path / "out" / "saves").glob("*/brain.json"))
    assert (tmp_path / "out" / "run.json").exists()


# Folders and users --------------------------------------------------------------------------------


def test_an_install_that_cannot_be_written_runs_from_any_home(
    tmp_path: Path, tiny_folder: Path
) -> None:
    home = tmp_path / "Jörg's first"
    home.mkdir()
    arguments = mounting(read_only(PRODUCT), *command(tiny_folder, *RUN))
    done = run(home, arguments, variables={"HOME": str(home), "XDG_CACHE_HOME": None})
    assert done.returncode == 0, done.stderr
    assert_said(done.stdout, home)


def test_a_user_without_a_home_needs_a_folder_for_graphs_alone(
    tmp_path: Path, tiny_folder: Path
) -> None:
    nowhere = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME", VARIABLE))
    done = run(tmp_path, as_nobody(*command(tiny_folder, *RUN)), variables=nowhere)
    assert done.returncode == 0, done.stderr
    assert_said(done.stdout, tmp_path)
    done = run(
        tmp_path, as_nobody(*command(tiny_folder, *RUN, "engine=compiled")), variables=nowhere
    )
    assert "no folder is known to keep files in" in refusal(done)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_told_by_its_folder(tmp_path: Path, tiny_folder: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    cxx = compiler(tmp_path, 'for out; do :; done; head -c 900000 /dev/zero >"$out"')
    tiny = command(tiny_folder, *RUN, "engine=compiled", f"cache_dir={cache}")
    done = run(
        tmp_path,
        mounting(f"mount -t tmpfs -o size=64k none '{cache}'", *tiny),
        variables={"CXX": cxx},
    )
    assert "No space left on device" in (told := refusal(done))
    assert "free some space there" in told
    assert str(cache) in told


FIRST_START = """
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from brain.machine.built_folder import ensure_built
from brain.machine.graph_cache import NAME, kept_graphs
cache = Path(sys.argv[1])
with kept_graphs(cache) as record:
    mine = cache / NAME / sys.argv[2]
    mine.write_text("a graph")
    built = ensure_built(cache / "built", lambda folder: (folder / "library").write_text("code"))
    print((built / "library").read_text())
    record()
    assert mine.read_text() == "a graph"
"""


def test_four_first_starts_at_once(tmp_path: Path) -> None:
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", FIRST_START, str(tmp_path / "cache"), str(number)],
            env={**ENVIRONMENT, VARIABLE: ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(4)
    ]
    said = [start.communicate(timeout=120) for start in starts]
    assert said == [(b"code\n", b"")] * 4


# Compilers ----------------------------------------------------------------------------------------


def compiler(folder: Path, script: str) -> str:
    path = folder / "cxx"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


HEADERLESS = """
n=$#
while [ $n -gt 0 ]; do
    a="$1"; shift; n=$((n-1))
    case "$a" in -I*/include/python3*) ;; *) set -- "$@" "$a";; esac
done
exec g++ "$@"
"""
LINKERLESS = """
if [ "$1" = --version ]; then exec g++ --version; fi
echo "ld: cannot find -lgomp"
echo "collect2: error: ld returned 1 exit status"
exit 1
"""


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("TORCH_COMPILE_DISABLE", "1", "TORCH_COMPILE_DISABLE=1 leaves nothing compiled: unset it"),
        ("TORCHDYNAMO_DISABLE", "1", "TORCHDYNAMO_DISABLE=1 leaves nothing compiled: unset it"),
        ("PATH", os.devnull, "no C++ compiler is installed"),
        ("CXX", "/no/such/c++", "CXX=/no/such/c++ cannot be run"),
        ("TORCHINDUCTOR_CACHE_DIR", "/proc/nope", "the graphs cannot be kept"),
    ],
)
def test_what_keeps_graphs_from_being_captured_is_named(
    tiny_folder: Path,
    command_line: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    told: str,
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(variable, value)
    status, out, err = command_line(*command(tiny_folder, *RUN, "engine=compiled")[3:])
    assert (status, out) == (2, "")
    assert told in err.splitlines()[-1]
    assert "engine=eager" in err.splitlines()[-1] or "engine.native=false" in err.splitlines()[-1]
    with pytest.raises(Refused, match=re.escape(told)):
        brain.open("folder", path=str(tiny_folder), engine="compiled")


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (HEADERLESS, "Python.h.*python3-dev"),
        (LINKERLESS, "cannot find -lgomp"),
    ],
    ids=["no Python.h", "no OpenMP"],
)
def test_a_compiler_that_fails_is_one_line_with_the_memory_as_it_was(
    open_tiny: OpenTiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    told: str,
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "graphs"))
    b = open_tiny(engine="compiled", capacity=39, **{"engine.smallest_bucket": 64})
    b.prime("Hello")
    before = digest(*b.state, *b.cursor)
    with torch._inductor.config.patch({"cpp.cxx": (None, compiler(tmp_path, script))}):
        for _ in range(2):
            with pytest.raises(Refused, match=told) as refused:
                b.tick()
            assert str(refused.value).startswith("the graph 'step T=1")
    assert digest(*b.state, *b.cursor) == before
    assert b.ticks == 0


def test_graphs_that_do_not_fit_on_the_disk_are_one_line(
    open_tiny: OpenTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "graphs"))
    b = open_tiny(engine="compiled", capacity=41, **{"engine.smallest_bucket": 64})
    b.prime("Hello")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(Refused, match=r"File too large.*free some space"):
            b.tick()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_pytorch_told_otherwise_to_compile_nothing_is_refused(open_tiny: OpenTiny) -> None:
    b = open_tiny(engine="compiled", capacity=43, **{"engine.smallest_bucket": 64})
    b.prime("Hello")
    with torch.compiler.set_stance("force_eager"), pytest.raises(Refused, match="compile nothing"):
        b.tick()


def test_signals_reach_no_run_that_outlives_its_terminal(tmp_path: Path, tiny_folder: Path) -> None:
    """``nohup`` ignores SIGHUP, and so does the run."""
    with subprocess.Popen(
        ["nohup", *command(tiny_folder, *RUN, "ticks=1000000")],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        process.stdout.read(5)
        process.send_signal(signal.SIGHUP)
        process.stdout.read(200)
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
        assert process.wait(timeout=60) == 130
