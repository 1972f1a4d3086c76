"""Hub models, from a Hugging Face cache laid out by hand; the network is never used."""

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from torch import Tensor

from brain.checkpoints import Checkpoint, model_folder, open_checkpoint, open_folder, open_hub
from brain.config.compose import compose_conf
from brain.config.overrides import literal_arguments
from brain.errors import BrainWarning, Refused
from compiled.matrix import dequantize
from fixture_types import EditJson

SaveLlama = Callable[..., dict[str, Tensor]]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


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
        ("someone/else", None, "not in the local cache, and the hub"),
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


@pytest.fixture
def hub(save_llama: SaveLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A hub whose only repository is ``tmp_path / "source"``; every request's files."""
    save_llama(tmp_path / "source")
    requests: list[list[str]] = []

    def fetch(
        repo: str, *, revision: str | None, cache_dir: Path, allow_patterns: list[str]
    ) -> str:
        assert revision == (COMMIT if requests else "main")
        there = sorted(file.name for file in (tmp_path / "source").iterdir())
        asked = {name for name in there for like in allow_patterns if fnmatch(name, like)}
        requests.append(sorted(asked))
        (cache_dir / COMMIT).mkdir(exist_ok=True, parents=True)
        for name in requests[-1]:
            shutil.copy(tmp_path / "source" / name, cache_dir / COMMIT / name)
        return str(cache_dir / COMMIT)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    return requests


def cut(folder: Path, index: str) -> None:
    """Makes two shards of odd names of the whole file, which goes."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    half = len(tensors) // 2
    for shard, names in zip(SHARDS, (list(tensors)[:half], list(tensors)[half:]), strict=True):
        save_file({name: tensors[name] for name in names}, folder / shard)
    weight_map = {name: SHARDS[at >= half] for at, name in enumerate(tensors)}
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))


def from_hub(tmp_path: Path) -> Checkpoint:
    return open_hub(
        "someone/tiny", revision="main", cache_dir=tmp_path / "cache", dtype=torch.float32
    )


@pytest.mark.parametrize("named", [False, True])
def test_what_names_weights_is_fetched_first(
    hub: list[list[str]], tmp_path: Path, edit_json: EditJson, named: bool
) -> None:
    source, index = tmp_path / "source", "model.safetensors.index.json"
    if named:
        index = "mine.safetensors.index.json"
        edit_json(source / "config.json", {"transformers_weights": index})
    cut(source, index)
    (source / "model-of-another.safetensors").touch()
    checkpoint = from_hub(tmp_path)
    assert hub[1:] == ([[index]] if named else []) + [sorted(SHARDS)]
    assert checkpoint.sha256 == open_folder(source, dtype=torch.float32).sha256


def test_a_whole_file_is_fetched_without_shards(hub: list[list[str]], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copy(source / "model.safetensors", tmp_path / "kept")
    cut(source, "model.safetensors.index.json")
    shutil.copy(tmp_path / "kept", source / "model.safetensors")
    with pytest.warns(BrainWarning, match="index.json is overruled by model.safetensors"):
        from_hub(tmp_path)
    assert len(hub) == 1
    assert not set(hub[0]) & set(SHARDS)


def test_shards_that_the_hub_lacks_are_refused(hub: list[list[str]], tmp_path: Path) -> None:
    cut(tmp_path / "source", "model.safetensors.index.json")
    (tmp_path / "source" / SHARDS[1]).unlink()
    with pytest.raises(Refused, match=r"index.json: weights\[2\].safetensors is missing"):
        from_hub(tmp_path)
    assert len(hub) == 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.RepositoryNotFoundError, "no such repository"),
        (errors.RevisionNotFoundError, "no such revision"),
        (errors.GatedRepoError, "access must be granted"),
        (errors.LocalEntryNotFoundError, "connect to the network"),
        (ConnectionError, "could not be downloaded"),
    ],
)
def test_errors_of_the_hub_are_one_line(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], message: str
) -> None:
    def fail(*_: object, **__: object) -> str:
        raised = error.__new__(error)
        raised.args = ("several\nlines",)
        raise raised

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(Refused) as refusal:
        open_hub("someone/tiny", dtype=torch.float32)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
