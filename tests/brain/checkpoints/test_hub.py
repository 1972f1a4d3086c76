"""Hub models, from a Hugging Face cache laid out by hand and from a hub on this machine."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from brain.checkpoints import hub as hub_module
from brain.checkpoints import (
    hub_files,
    model_folder,
    open_checkpoint,
    open_folder,
    open_hub,
    stored_format,
)
from brain.checkpoints.hub import hub_model
from brain.config.compose import compose_conf
from brain.config.overrides import literal_arguments
from brain.errors import BrainWarning, Refused
from compiled.matrix import dequantize
from fixture_types import CommandLine, EditJson
from gguf_files import byte_level_fields, write_gguf
from hub_server import COMMIT, REPO, Hub, serving
from processes import ENVIRONMENT

SaveLlama = Callable[..., dict[str, Tensor]]


@pytest.fixture
def hub_cache(save_llama: SaveLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache holding ``someone/tiny`` at ``main``, its files linked to blobs, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    save_llama(tmp_path / "source", max_shard_size="20KB")
    model = tmp_path / "cache" / "models--someone--tiny"
    for folder in ("refs", "blobs", f"snapshots/{COMMIT}"):
        (model / folder).mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    for file in (tmp_path / "source").iterdir():
        shutil.copy(file, model / "blobs" / file.name)
        (model / "snapshots" / COMMIT / file.name).symlink_to(f"../../blobs/{file.name}")
    return tmp_path / "cache"


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_cached_repositories_load_offline(hub_cache: Path, revision: str | None) -> None:
    checkpoint = open_hub(
        "someone/tiny", revision=revision, cache_dir=hub_cache, dtype=torch.float32
    )
    original = open_folder(hub_cache.parent / "source", dtype=torch.float32)
    assert checkpoint.name == "someone/tiny"
    assert checkpoint.config == original.config
    assert torch.equal(dequantize(checkpoint.weights.qkv), dequantize(original.weights.qkv))
    assert checkpoint.sha256 == original.sha256


@pytest.mark.parametrize("given", [["model=tinyllama", "model.repo=someone/tiny"], None])
def test_the_cache_folder_that_is_named_is_the_hub_s_too(
    hub_cache: Path, given: list[str] | None
) -> None:
    given = given or literal_arguments(["model=someone/tiny"])
    conf = compose_conf([*given, f"cache_dir={hub_cache}"])
    checkpoint = open_checkpoint(conf.model, conf.cache_dir, torch.float32, torch.device("cpu"))
    assert checkpoint.name == "someone/tiny"
    assert (model_folder(conf.model, conf.cache_dir) / "config.json").exists()


@pytest.mark.parametrize(
    ("repo", "revision", "message"),
    [
        ("someone/else", None, "not in the local cache, and HF_HUB_OFFLINE"),
        ("someone/tiny", "v2", "someone/tiny@v2: no such path here, not in the local cache"),
        ("not a repository", None, "owner/name"),
    ],
)
def test_what_cannot_be_had_is_refused(
    hub_cache: Path, repo: str, revision: str | None, message: str
) -> None:
    with pytest.raises(Refused) as refusal:
        open_hub(repo, revision=revision, cache_dir=hub_cache, dtype=torch.float32)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


SHARDS = ("pytorch_model-1.safetensors", "weights[2].safetensors")
INDEX = "model.safetensors.index.json"


@pytest.fixture
def hub(save_llama: SaveLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub whose only repository is ``tmp_path / "source"``."""
    save_llama(tmp_path / "source", vocab_size=260)
    with serving(tmp_path / "source") as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setattr(hub_files, "PAUSE", 0.0)
        monkeypatch.setattr(hub_module, "_found", {})
        yield hub


def from_hub(tmp_path: Path, **how: Any) -> Path:
    """The model of the hub, as another process would ask for it."""
    hub_module._found.clear()
    return hub_model(REPO, cache_dir=tmp_path / "cache", **how)


def blobs(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").glob("models--*/blobs/*")}


def cut_in_shards(folder: Path, index: str) -> None:
    """Makes two shards of odd names of the whole file, which goes."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    half = len(tensors) // 2
    for shard, names in zip(SHARDS, (list(tensors)[:half], list(tensors)[half:]), strict=True):
        save_file({name: tensors[name] for name in names}, folder / shard)
    weight_map = {name: SHARDS[at >= half] for at, name in enumerate(tensors)}
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))


def make_gguf(hub: Hub, library: str, name: str) -> None:
    state = load_file(hub.folder / "model.safetensors")
    (hub.folder / name).parent.mkdir(exist_ok=True)
    write_gguf(hub.folder / name, state, byte_level_fields(library, "smollm"))


def refusal(tmp_path: Path, **how: Any) -> str:
    with pytest.raises(Refused) as told:
        from_hub(tmp_path, **how)
    return str(told.value)


def test_only_what_the_model_needs_is_fetched_and_only_once(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        *("original/consolidated.00.pth", "original/tokenizer.model", "onnx/model.onnx"),
        *("pytorch_model.bin", "model.fp16.safetensors", "README.md", "tiny.Q4_0.gguf"),
    ):
        (hub.folder / name).parent.mkdir(exist_ok=True)
        (hub.folder / name).write_bytes(b"not needed")
    folder = from_hub(tmp_path)
    needed = {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"}
    assert set(hub.sent) == needed
    size = sum((hub.folder / name).stat().st_size for name in needed - {"config.json"})
    assert capsys.readouterr().err == (
        f"fetching {REPO} at {COMMIT[:12]}: 3 files, {size / 1e3:.1f} kB, into "
        f"{tmp_path / 'cache' / 'models--someone--tiny'}\n"
    )
    opened = open_folder(folder, dtype=torch.float32)
    assert opened.sha256 == open_folder(hub.folder, dtype=torch.float32).sha256

    hub.sent.clear()
    assert from_hub(tmp_path) == folder
    for answer in ((503, {}), (429, {"Retry-After": "3600"})):
        hub.fails["/"] = answer
        assert from_hub(tmp_path) == folder
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert from_hub(tmp_path) == from_hub(tmp_path, revision=COMMIT) == folder
    assert not hub.sent
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert from_hub(tmp_path) == folder
    assert capsys.readouterr() == ("", "")


def test_a_process_asks_the_hub_once(hub: Hub, tmp_path: Path) -> None:
    conf = compose_conf([*literal_arguments([f"model={REPO}"]), f"cache_dir={tmp_path / 'cache'}"])
    assert stored_format(conf.model, conf.cache_dir) == "F32"
    assert model_folder(conf.model, conf.cache_dir).is_dir()
    assert hub.lists == 1


@pytest.mark.parametrize("detailed", [True, False], ids=["hub", "mirror"])
@pytest.mark.parametrize("index", [INDEX, "mine.safetensors.index.json"])
def test_shards_of_any_name_are_fetched_as_the_index_names_them(
    hub: Hub, tmp_path: Path, edit_json: EditJson, index: str, detailed: bool
) -> None:
    hub.detailed = detailed
    if index != INDEX:
        edit_json(hub.folder / "config.json", {"transformers_weights": index})
    cut_in_shards(hub.folder, index)
    (hub.folder / "model-of-another.safetensors").touch()
    folder = from_hub(tmp_path)
    assert {*SHARDS, index} <= set(hub.sent)
    assert "model-of-another.safetensors" not in hub.sent
    opened = open_folder(folder, dtype=torch.float32)
    assert opened.sha256 == open_folder(hub.folder, dtype=torch.float32).sha256


def test_a_whole_file_is_fetched_without_shards(hub: Hub, tmp_path: Path) -> None:
    shutil.copy(hub.folder / "model.safetensors", tmp_path / "kept")
    cut_in_shards(hub.folder, INDEX)
    shutil.copy(tmp_path / "kept", hub.folder / "model.safetensors")
    folder = from_hub(tmp_path)
    assert not set(hub.sent) & set(SHARDS)
    with pytest.warns(BrainWarning, match=r"index.json is overruled by model.safetensors"):
        open_folder(folder, dtype=torch.float32)


def test_a_whole_file_may_have_any_name(hub: Hub, tmp_path: Path, edit_json: EditJson) -> None:
    (hub.folder / "model.safetensors").rename(hub.folder / "mine.safetensors")
    edit_json(hub.folder / "config.json", {"transformers_weights": "mine.safetensors"})
    assert (from_hub(tmp_path) / "mine.safetensors").exists()


@pytest.mark.parametrize("name", ["../mine.safetensors", "sub/mine.safetensors", ["mine"], 5])
def test_weights_of_impossible_names_are_refused_before_anything_comes(
    hub: Hub, tmp_path: Path, edit_json: EditJson, name: object
) -> None:
    edit_json(hub.folder / "config.json", {"transformers_weights": name})
    assert "is not a plain *.safetensors file name" in refusal(tmp_path)
    assert set(hub.sent) == {"config.json"}


def test_what_cannot_be_read_is_refused_before_weights_are_fetched(
    hub: Hub, tmp_path: Path, edit_json: EditJson
) -> None:
    edit_json(hub.folder / "config.json", {"hidden_act": "quick_gelu"})
    assert "hidden_act" in refusal(tmp_path)
    edit_json(hub.folder / "config.json", {"hidden_act": "silu"})
    cut_in_shards(hub.folder, INDEX)
    (hub.folder / SHARDS[1]).unlink()
    told = refusal(tmp_path)
    assert f"{INDEX} names {SHARDS[1]}, which the repository lacks" in told
    (hub.folder / INDEX).unlink()
    (hub.folder / "pytorch_model.bin").touch()
    assert f"no {INDEX} and no GGUF file there" in refusal(tmp_path)
    (hub.folder / "adapter_config.json").touch()
    assert "it is an adapter" in refusal(tmp_path)
    assert set(hub.sent) <= {"config.json", INDEX}


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_other_content_than_the_hub_names_is_removed(hub: Hub, tmp_path: Path, name: str) -> None:
    whole = (hub.folder / name).read_bytes()
    hub.instead[name] = whole[:-9] + b"?" + whole[-8:]
    told = refusal(tmp_path)
    assert f"{name} came with hash" in told
    assert "run this again" in told
    before = blobs(tmp_path)
    assert not any("incomplete" in blob for blob in before)
    hub.instead.clear()
    assert (from_hub(tmp_path) / name).read_bytes() == whole
    assert before < blobs(tmp_path)


def test_a_file_that_was_cut_short_in_the_cache_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    weights = from_hub(tmp_path) / "model.safetensors"
    os.truncate(weights.resolve(), 100)
    assert (from_hub(tmp_path) / weights.name).read_bytes() == (
        hub.folder / weights.name
    ).read_bytes()


def test_a_lost_connection_is_taken_up_where_it_was_lost(hub: Hub, tmp_path: Path) -> None:
    hub.cut["model.safetensors"] = 5000
    folder = from_hub(tmp_path)
    size = (folder / "model.safetensors").stat().st_size
    assert hub.ranges == ["bytes=5000-"]
    assert hub.sent["model.safetensors"] == size


def test_large_files_of_another_host_get_ranges_and_no_token(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    hub.redirects = True
    hub.cut["model.safetensors"] = 5000
    folder = from_hub(tmp_path)
    assert hub.ranges == ["bytes=5000-"] * len(hub.ranges)
    assert hub.sent["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert hub.tokens == {("127.0.0.1", "Bearer hf_mine"), ("localhost", None)}


def test_a_download_moves_a_bar_on_a_terminal(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    from_hub(tmp_path)
    size = sum((hub.folder / name).stat().st_size for name in set(hub.sent) - {"config.json"})
    bars = [bar for bar in terminal.getvalue().split("\r") if f"fetching {REPO}: " in bar]
    assert f"/{size / 1e3:.0f}k" in bars[-1]
    assert bars[0].lstrip().startswith(f"fetching {REPO}:   0%")


def test_a_hub_that_stops_sending_is_one_line_and_the_next_run_goes_on(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    hub.stalls["model.safetensors"] = 7000
    with monkeypatch.context() as within:
        within.setattr(hub_files, "ATTEMPTS", 1)
        told = refusal(tmp_path)
    assert f"{REPO}: model.safetensors is not whole: the hub cannot be reached (" in told
    assert told.endswith("The same command goes on where it stopped")
    first = hub.sent.pop("model.safetensors")
    hub.stalls.clear()
    hub.go_on.set()
    capsys.readouterr()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 30)
    folder = from_hub(tmp_path)
    assert hub.ranges[-1] == f"bytes={first}-"
    assert first + hub.sent["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert "of it there already" in capsys.readouterr().err


def test_killed_in_the_middle_of_a_shard_the_same_command_goes_on(hub: Hub, tmp_path: Path) -> None:
    command = [f"model={REPO}", f"cache_dir={tmp_path / 'cache'}", "prompt=abc", "ticks=2"]
    environment = {**ENVIRONMENT, "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0"}
    for number, bytes_more, status, end in (
        (signal.SIGKILL, 9000, -signal.SIGKILL, ""),
        (signal.SIGINT, 500, 130, "interrupted\n"),
    ):
        hub.stalls["model.safetensors"] = bytes_more
        wanted = hub.sent.get("model.safetensors", 0) + bytes_more
        with subprocess.Popen(
            [sys.executable, "-m", "brain.app", *command],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            while sum(p.stat().st_size for p in tmp_path.rglob("*.incomplete")) < wanted:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(number)
            out, told = process.communicate(timeout=60)
        assert (process.returncode, out) == (status, "")
        assert told.endswith(end)
        assert "Traceback" not in told
    hub.stalls.clear()
    folder = from_hub(tmp_path)
    assert hub.ranges == ["bytes=9000-", "bytes=9500-"]
    assert hub.sent["model.safetensors"] == (folder / "model.safetensors").stat().st_size


def test_two_at_once_fetch_once(hub: Hub, tmp_path: Path) -> None:
    both = [threading.Thread(target=from_hub, args=[tmp_path]) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert hub.sent["model.safetensors"] == (hub.folder / "model.safetensors").stat().st_size


def test_a_full_disk_is_told_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=5000))
    told = refusal(tmp_path)
    assert "are to be fetched, and" in told
    assert "has 5.0 kB free" in told
    assert set(hub.sent) == {"config.json"}


def test_a_disk_that_fills_up_is_one_line_and_keeps_what_came(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = hub_files._Appended.write

    def fills_up(file: Any, block: memoryview) -> int:
        if file.tell() == 20_000:
            raise OSError(28, "No space left on device")
        return write(file, block[: 20_000 - file.tell()])

    with monkeypatch.context() as full:
        full.setattr(hub_files._Appended, "write", fills_up)
        told = refusal(tmp_path)
    assert "cannot be written (No space left on device); free some space there" in told
    folder = from_hub(tmp_path)
    assert hub.ranges == ["bytes=20000-"]
    name = "model.safetensors"
    assert (folder / name).read_bytes() == (hub.folder / name).read_bytes()


def test_a_cache_that_cannot_be_written_is_one_line(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert "cannot be written" in refusal(tmp_path)


GATED = "access must be granted: ask for it at https://huggingface.co/someone/tiny, then log in"


@pytest.mark.parametrize("where", ["/api/", "/resolve/"])
@pytest.mark.parametrize(
    ("status", "headers", "told"),
    [
        (404, {"X-Error-Code": "RepoNotFound"}, "no such repository on the hub, or it is private"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "no such revision on the hub"),
        (401, {"X-Error-Code": "GatedRepo"}, GATED),
        (403, {"X-Error-Code": "GatedRepo"}, GATED),
        (403, {}, "denies access (403): check the rights of your token"),
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "your token"),
        (429, {"Retry-After": "3600"}, "too many requests (429): try again in 3600 seconds"),
        (503, {}, "the hub has a fault (503): try again later"),
        (418, {}, "could not be downloaded"),
    ],
)
def test_errors_of_the_hub_are_one_line(
    hub: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    where: str,
    status: int,
    headers: dict[str, str],
    told: str,
) -> None:
    hub.fails[where] = (status, headers)
    said = refusal(tmp_path, revision="v2")
    assert said.startswith(f"{REPO}@v2: " if where == "/api/" else f"{REPO}: ")
    assert told in said
    assert "\n" not in said
    assert capsys.readouterr() == ("", "")  # nothing of the client's own
    assert not list(tmp_path.glob("cache/models--*/refs/*"))


def test_a_repository_of_gguf_files_gives_one(
    hub: Hub, tmp_path: Path, byte_level_json: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_gguf(hub, byte_level_json, "tiny.F32.gguf")
    make_gguf(hub, byte_level_json, "more/tiny.F32.gguf")
    (hub.folder / "more").rename(tmp_path / "more")
    (hub.folder / "big-00001-of-00002.gguf").write_bytes(b"part")
    (hub.folder / "model.safetensors").unlink()  # config.json stays, as in many such repositories
    path = from_hub(tmp_path)
    assert path.name == "tiny.F32.gguf"
    assert f"fetching {REPO} at {COMMIT[:12]}: 1 file, " in capsys.readouterr().err

    (tmp_path / "more").rename(hub.folder / "more")
    (hub.folder / "tiny.Q8_0.gguf").write_bytes(b"another")
    size = path.stat().st_size
    assert refusal(tmp_path) == (
        f"{REPO}: several GGUF files; give model.file=NAME of one of them: more/tiny.F32.gguf "
        f"({size / 1e3:.1f} kB), tiny.F32.gguf ({size / 1e3:.1f} kB), tiny.Q8_0.gguf (7 bytes)"
    )
    assert "did you mean tiny.Q8_0.gguf?" in refusal(tmp_path, file="tiny.Q8.gguf")
    assert "one of several parts" in refusal(tmp_path, file="big-00001-of-00002.gguf")
    chosen = from_hub(tmp_path, file="more/tiny.F32.gguf")
    assert chosen.parent.name == "more"
    assert from_hub(tmp_path, file="tiny.Q8_0.gguf").read_bytes() == b"another"

    cache = f"cache_dir={tmp_path / 'cache'}"
    arguments = literal_arguments([f"model={REPO}", "model.file=tiny.F32.gguf", cache])
    conf = compose_conf(arguments)
    opened = open_checkpoint(conf.model, conf.cache_dir, torch.float32, torch.device("cpu"))
    assert opened.name == f"{REPO}/tiny.F32.gguf"
    assert stored_format(conf.model, conf.cache_dir) == "F32"
    with pytest.raises(Refused, match="is a GGUF file: this task needs a model's folder"):
        model_folder(conf.model, conf.cache_dir)
    with pytest.raises(Refused, match=r"model\.file does not apply to model=smollm2"):
        compose_conf(["model=smollm2", "model.file=x.gguf"])

    for name in ("tiny.F32.gguf", "tiny.Q8_0.gguf", "more/tiny.F32.gguf"):
        (hub.folder / name).unlink()
    assert "only GGUF files in several parts (big-00001" in refusal(tmp_path)


def test_a_model_of_the_hub_speaks(hub: Hub, tmp_path: Path, command_line: CommandLine) -> None:
    asked = [f"model={REPO}", "cache_dir=cache", "prompt=abc", "ticks=2", "capacity=16"]
    status, _, told = command_line(*asked)
    assert status == 0, told
    hub_module._found.clear()
    hub.fails["/api/"] = (403, {"X-Error-Code": "GatedRepo"})
    status, out, told = command_line(*asked)
    assert (status, out) == (2, "")
    refused = told.splitlines()[-1]
    assert refused.startswith(f"refused: {REPO}: {GATED}")
    assert refused.endswith("or use what is in the cache: HF_HUB_OFFLINE=1")


@pytest.mark.parametrize(
    "change",
    [
        {"path": "../../model.safetensors"},
        {"path": "/tmp/model.safetensors"},
        {"oid": "../../../mine"},
        {"oid": None},
    ],
)
def test_names_that_leave_the_cache_are_refused(
    hub: Hub, tmp_path: Path, change: dict[str, Any]
) -> None:
    hub.listed = [hub.files()[0] | change]
    assert "which cannot be: check HF_ENDPOINT" in refusal(tmp_path)
    assert not (tmp_path / "cache").exists()


def test_a_revision_that_leaves_the_cache_is_not_written_down(hub: Hub, tmp_path: Path) -> None:
    from_hub(tmp_path, revision="../../../mine")
    assert not list(tmp_path.rglob("mine"))
