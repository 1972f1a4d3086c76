"""Models from the Hugging Face hub, through its own cache."""

from pathlib import Path

import torch

from brain.checkpoints.checkpoint import Checkpoint
from brain.checkpoints.folder import open_folder
from brain.errors import Refused, one_line

PATTERNS = [
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "model*.safetensors",
    "model.safetensors.index.json",
]


def open_hub(
    repo: str,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    int8: bool = False,
) -> Checkpoint:
    """Loads a model from the hub, downloading what is not cached.

    Args:
        repo: ``owner/name``.
        revision: a branch, tag or commit; None: main.
        cache_dir: None: the Hugging Face cache.
        dtype: float32, bfloat16 or float16, whatever the files hold.
        device: where the weights go.
        int8: rounds matrices to eight bits.

    Raises:
        Refused: the repository cannot be downloaded, or its model cannot be used.

    """
    folder = hub_folder(repo, revision=revision, cache_dir=cache_dir)
    return open_folder(folder, dtype=dtype, device=device, int8=int8, name=repo)


def hub_folder(repo: str, *, revision: str | None = None, cache_dir: Path | None = None) -> Path:
    """The local folder of a repository, downloaded if it is not cached. Raises Refused."""
    # Imported here because it takes a fifth of a second and most models come from elsewhere.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    elsewhere = "or download it elsewhere and use model=folder path=FOLDER"
    at = f"{repo}@{revision}" if revision else repo
    try:
        return Path(
            snapshot_download(repo, revision=revision, cache_dir=cache_dir, allow_patterns=PATTERNS)
        )
    except GatedRepoError:
        raise Refused(
            f"{at}: access must be granted on the hub; log in with 'hf auth login'"
        ) from None
    except RepositoryNotFoundError:
        raise Refused(
            f"{at}: no such repository on the hub, or it is private; check its name"
        ) from None
    except RevisionNotFoundError:
        raise Refused(f"{at}: no such revision on the hub; check model.revision") from None
    except HFValidationError:
        raise Refused(f"{repo!r} is not a hub repository; give owner/name") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise Refused(
            f"{at}: not in the local cache and the hub cannot be reached; "
            f"connect to the network, {elsewhere}"
        ) from None
    except Exception as error:  # the client lets its HTTP library's errors through
        raise Refused(
            f"{at}: could not be downloaded ({one_line(error)}); try again, {elsewhere}"
        ) from None
