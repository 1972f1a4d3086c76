"""Hub models, from a Hugging Face cache laid out by hand; the network is never used."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import errors
from torch import Tensor

from brain.checkpoints import open_folder, open_hub
from brain.config.compose import compose_conf
from brain.errors import Refused
from brain.opening import model_folder, open_checkpoint
from compiled.int8 import dequantize

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


def test_the_cache_folder_that_is_named_is_the_hub_s_too(hub_cache: Path) -> None:
    conf = compose_conf(["model=tinyllama", "model.repo=someone/tiny", f"cache_dir={hub_cache}"])
    checkpoint = open_checkpoint(
        conf.model, conf.cache_dir, torch.float32, torch.device("cpu"), int8=False
    )
    assert checkpoint.name == "someone/tiny"
    assert (model_folder(conf.model, conf.cache_dir) / "config.json").exists()


@pytest.mark.parametrize(
    ("repo", "revision", "message"),
    [
        ("someone/else", None, "not in the local cache"),
        ("someone/tiny", "v2", "someone/tiny@v2: not in the local cache"),
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
