"""At the limits of the machine: shared pages, full and read-only disks, odd locales, clocks."""

import contextlib
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import brain
from brain import app
from brain.brain import Brain
from brain.checkpoints.hf_config import read_config
from brain.checkpoints.llama_names import packed_parts
from brain.checkpoints.safetensors_file import TensorFile, write_safetensors
from brain.config.compose import compose_conf
from brain.config.overrides import literal_arguments
from brain.config.settings import settings_of
from brain.errors import Refused
from brain.machine.built_folder import ensure_built
from fixture_types import OpenTiny

IDS = [(7 * n) % 300 for n in range(64)]
SEEDS = range(8)
TICKS = 20
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """The tiny model, its weights in an order in which no part of them need be copied."""
    folder = tmp_path_factory.mktemp("packed")
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((tiny_folder / name).read_bytes())
    source = TensorFile(tiny_folder / WEIGHTS)
    parts = packed_parts(read_config(folder / "config.json"))
    tensors = [
        (name, shape, lambda name=name: source.tensor(name))
        for field in parts.values()
        for name, shape in field
    ]
    write_safetensors(folder / WEIGHTS, tensors, torch.float32)
    return folder


def pages(file: Path) -> dict[str, int]:
    """What this process's mappings of a file take, in KiB: Rss, Pss, Private_Dirty and others."""
    sums: dict[str, int] = {}
    within = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if rest.endswith(" kB"):
            if within:
                sums[name] = sums.get(name, 0) + int(rest.split()[0])
        elif "-" in line.split()[0]:
            within = line.endswith(str(file))
    return sums


def speak(b: Brain) -> list[int]:
    b.prime(IDS[:12])
    return [tick.token for tick in b.stream(TICKS)]


smaps = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")


@smaps
@pytest.mark.usefixtures("one_thread")
def test_eight_brains_in_one_process_share_their_weights_and_nothing_else(
    packed_folder: Path, open_tiny: OpenTiny
) -> None:
    def opened() -> list[Brain]:
        return [open_tiny(**{"model.path": str(packed_folder)}, seed=seed) for seed in SEEDS]

    alone = [speak(b) for b in opened()]
    assert len({tuple(tokens) for tokens in alone}) == len(SEEDS)

    brains = opened()
    for b in brains:
        b.prime(IDS[:12])
    interleaved = [[b.tick().token for b in brains] for _ in range(TICKS)]
    assert [list(tokens) for tokens in zip(*interleaved, strict=True)] == alone

    found: dict[int, list[int]] = {}

    def think(number: int) -> None:
        torch.set_num_threads(1)  # of this thread
        found[number] = speak(brains[number])

    threads = [threading.Thread(target=think, args=(number,)) for number in SEEDS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in SEEDS] == alone

    size = (packed_folder / WEIGHTS).stat().st_size / 1024
    taken = pages(packed_folder / WEIGHTS)
    assert taken["Private_Dirty"] == 0
    assert taken["Rss"] > 4 * size
    assert taken["Pss"] < 1.2 * size


FORKS = """
import json, os, sys, time
from pathlib import Path
import brain
{pages}
folder, out = map(Path, sys.argv[1:])
children = []
for seed in range(4):
    child = os.fork()
    if child:
        children.append(child)
        continue
    b = brain.open("folder", seed=seed, capacity=48, **{{"model.path": str(folder)}})
    b.prime([(7 * n) % 300 for n in range(12)])
    tokens = [tick.token for tick in b.stream({ticks})]
    (out / f"{{seed}}.there").touch()
    while len(list(out.glob("*.there"))) < 4:
        time.sleep(0.01)
    told = {{"tokens": tokens, "pages": pages(folder / "{weights}")}}
    (out / f"{{seed}}.json").write_text(json.dumps(told))
    while len(list(out.glob("*.json"))) < 4:
        time.sleep(0.01)
    os._exit(0)
sys.exit(max(os.waitpid(child, 0)[1] for child in children))
"""


@smaps
@pytest.mark.usefixtures("one_thread")
def test_four_processes_share_the_pages_of_the_weights(packed_folder: Path, tmp_path: Path) -> None:
    script = FORKS.format(pages=inspect.getsource(pages), ticks=TICKS, weights=WEIGHTS)
    subprocess.run(
        [sys.executable, "-c", script, str(packed_folder), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    size = (packed_folder / WEIGHTS).stat().st_size / 1024
    for seed in range(4):
        told = json.loads((tmp_path / f"{seed}.json").read_text())
        b = brain.open("folder", seed=seed, capacity=48, **{"model.path": str(packed_folder)})
        assert told["tokens"] == speak(b)
        assert told["pages"]["Private_Dirty"] == 0
        assert told["pages"]["Rss"] > size / 2
        assert told["pages"]["Pss"] < told["pages"]["Rss"] / 3


# Disks --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def disk(where: Path, options: str) -> Iterator[None]:
    """A file system of its own there; skips where that is not permitted."""
    where.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(where)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError as error:
        pytest.skip(f"cannot mount ({error})")
    if done.returncode:
        pytest.skip(f"cannot mount ({done.stderr.decode().strip()})")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


Outcome = tuple[int, str, str]
Call = Callable[..., Outcome]


@pytest.fixture
def call(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    """``brain`` in this process: status, standard output, standard error."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def call(*arguments: str, model: Path = tiny_folder) -> Outcome:
        own = ["brain", "model=folder", f"model.path={model}", "capacity=48", *arguments]
        monkeypatch.setattr(sys, "argv", own)
        status = 0
        try:
            app.main()
        except SystemExit as left:
            status = int(left.code or 0)
        told = capsys.readouterr()
        return status, told.out, told.err

    return call


def refusal(outcome: Outcome) -> str:
    """The one line of somebody who was refused."""
    status, _, told = outcome
    assert status == 2
    lines = [line for line in told.splitlines() if line.startswith("refused: ")]
    assert len(lines) == 1
    assert "Traceback" not in told
    return lines[0]


def fill(folder: Path, left: int) -> Path:
    """Takes all room on the disk but for so many bytes."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    os.truncate(filler, filler.stat().st_size - left)
    return filler


def test_a_disk_that_fills_up_loses_nothing_and_says_so(call: Call, tmp_path: Path) -> None:
    settings = ["prompt=abc abc abc", "save_every=10"]
    whole, small = tmp_path / "whole", tmp_path / "disk"
    assert call(*settings, "ticks=60", f"hydra.run.dir={whole}")[0] == 0
    with disk(small, "size=1m"):
        run = [*settings, f"hydra.run.dir={small / 'run'}"]
        assert call(*run, "ticks=20")[0] == 0
        filler = fill(small, 20 << 10)
        assert "No space left" in refusal(call(*run, "ticks=60"))
        saves = [path.parent for path in (small / "run" / "saves").glob("*/brain.json")]
        assert len(saves) == 2
        assert all(brain.load(save).ticks >= 10 for save in saves)
        fill(small, 0)
        assert "No space left" in refusal(call(*run, "ticks=60"))
        filler.unlink()
        assert call(*run, "ticks=60")[0] == 0
        for name in ("transcript.txt", "tokens.txt"):
            assert (small / "run" / name).read_bytes() == (whole / name).read_bytes()


def test_a_read_only_disk_is_refused_or_does_not_matter(call: Call, tmp_path: Path) -> None:
    built = tmp_path / "disk" / "built"
    with disk(tmp_path / "disk", "size=1m"):
        ensure_built(built, lambda folder: folder.joinpath("x").touch())
        remount = ["mount", "-o", "remount,ro", str(tmp_path / "disk")]
        subprocess.run(remount, check=True)
        assert ensure_built(built, lambda folder: None) == built  # what is there is used
        with pytest.raises(Refused, match=r"Read-only file system.*another cache folder"):
            ensure_built(tmp_path / "disk" / "other", lambda folder: None)
        told = refusal(call("ticks=3", f"hydra.run.dir={tmp_path / 'disk' / 'run'}"))
        assert "Read-only file system" in told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("while_", ["brain.tasks.run.open_brain", "brain.brain.Brain.prime"])
def test_whoever_asks_it_to_stop_before_it_speaks_is_heard(
    while_: str, number: signal.Signals, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["prompt=abc", "ticks=3", f"hydra.run.dir={tmp_path / 'run'}"]
    with monkeypatch.context() as patched:
        patched.setattr(while_, lambda *_: signal.raise_signal(number))
        status, said, told = call(*arguments)
    assert (status, said, told.splitlines()[-1]) == (130, "", "interrupted")
    assert "Traceback" not in told
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert call(*arguments)[0] == 0


# Names, locales, clocks ---------------------------------------------------------------------------


@pytest.mark.parametrize("home", [None, "/not/there"])
def test_names_in_any_script_work_without_a_home(
    home: str | None, call: Call, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if home is None:
        monkeypatch.delenv("HOME", raising=False)
    else:
        monkeypatch.setenv("HOME", home)
    model, run = tmp_path / "módel 模型", tmp_path / "rün é, (1)"
    model.symlink_to(tiny_folder, target_is_directory=True)
    status, said, _ = call("prompt=Hé", "ticks=9", f"hydra.run.dir={run}", model=model)
    assert status == 0
    assert said.strip() == (run / "transcript.txt").read_text("utf-8").strip()
    assert len(brain.load(run / "saves" / "1")) > 0


def test_a_home_that_nobody_has_is_refused(call: Call, tmp_path: Path) -> None:
    assert "~nobody-at-all" in refusal(call("ticks=3", model=Path("~nobody-at-all/model")))


def test_a_locale_without_letters_still_gets_the_text(tiny_folder: Path, tmp_path: Path) -> None:
    """Text is UTF-8; what cannot be read in the locale is refused, not guessed."""
    own = [sys.executable, "-m", "brain.app", "model=folder", f"model.path={tiny_folder}"]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}
    arguments = ["prompt=abc", "ticks=40", "capacity=48", "hydra.run.dir=out"]
    done = subprocess.run(
        [*own, *arguments], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "out" / "transcript.txt").read_bytes()
    assert not done.stdout.isascii()
    with pytest.raises(Refused, match="locale"):
        literal_arguments(["prompt=H\udcc3\udca9"])


def test_a_clock_that_jumps_is_of_no_consequence(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["prompt=abc abc", "save_every=5"]
    assert call(*arguments, "ticks=30", f"hydra.run.dir={tmp_path / 'whole'}")[0] == 0
    clock = time.time
    jumps = iter(range(1 << 30))
    jumping = lambda: clock() + (-1) ** next(jumps) * 10_000_000  # noqa: E731
    monkeypatch.setattr(time, "time", jumping)
    run = f"hydra.run.dir={tmp_path / 'run'}"
    assert call(*arguments, "ticks=12", run)[0] == 0
    assert call(*arguments, "ticks=30", run)[0] == 0
    for name in ("transcript.txt", "tokens.txt"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("name", ["with a space", "it's"])
def test_graphs_that_cannot_be_linked_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__file__", f"/opt/{name}/torch/__init__.py")
    with pytest.raises(Refused, match=f"{name}.*engine=eager"):
        settings_of(compose_conf(["engine=compiled", "device=cpu", "dtype=float32"]))
    settings_of(compose_conf(["engine=eager", "device=cpu", "dtype=float32"]))
