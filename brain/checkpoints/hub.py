"""Models from the Hugging Face hub, through its own cache."""

import glob
from pathlib import Path

import torch

from brain.checkpoints.checkpoint import Checkpoint
from brain.checkpoints.folder import INDEX, SINGLE, open_folder, weight_files
from brain.errors import Refused, one_line
from conf.schema import WeightFormat

PATTERNS = [
    *("config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json"),
    *("added_tokens.json", "special_tokens_map.json", "tokenizer.model", "tokenizer.json"),
    *("chat_template.jinja", SINGLE, INDEX),
]
"""What is fetched first; shards, whatever they are called, when the index has named them."""
ELSEWHERE = "or download it elsewhere and use model=FOLDER"


def open_hub(
    repo: str,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    weights: WeightFormat = WeightFormat.model,
    blocks: bool = False,
) -> Checkpoint:
    """Loads a model from the hub as :func:`open_folder` does, downloading what is not cached.
    Raises Refused. ``repo`` is ``owner/name``. ``revision`` is a branch, tag or commit; None: main.
    ``cache_dir`` defaults to the Hugging Face cache.
    """
    folder = hub_folder(repo, revision=revision, cache_dir=cache_dir)
    return open_folder(
        folder, dtype=dtype, device=device, weights=weights, blocks=blocks, name=repo
    )


def hub_folder(repo: str, *, revision: str | None = None, cache_dir: Path | None = None) -> Path:
    """The local folder of a repository, downloaded if it is not cached. Raises Refused."""
    # Imported here because it takes a fifth of a second and most models come from elsewhere.
    from huggingface_hub import errors, snapshot_download

    def fetch(revision: str | None, patterns: list[str]) -> Path:
        return Path(
            snapshot_download(repo, revision=revision, cache_dir=cache_dir, allow_patterns=patterns)
        )

    try:
        folder = fetch(revision, PATTERNS)
        if not (folder / "config.json").exists():
            raise Refused(
                f"{repo}: no config.json there; if it has GGUF files, download one: model=FILE.gguf"
            )
        asked: set[str] = set()
        while wanted := set(weight_files(folder).names) - asked:
            asked |= wanted
            if not all((folder / name).exists() for name in wanted):
                # Of the same commit, which is what the folder is called.
                fetch(folder.name, [glob.escape(name) for name in sorted(wanted)])
        return folder
    except Refused:
        raise
    except errors.GatedRepoError:
        reason = "access must be granted on the hub; log in with 'hf auth login'"
    except errors.RepositoryNotFoundError:
        reason = "no such path here, and no such repository on the hub, or it is private; check it"
    except errors.RevisionNotFoundError:
        reason = "no such revision on the hub; check model.revision"
    except errors.HFValidationError:
        reason = "not a hub repository; give owner/name"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        lacking = "no such path here, not in the local cache, and the hub cannot be reached"
        reason = f"{lacking}; connect to the network, {ELSEWHERE}"
    except Exception as error:  # the client lets its HTTP library's errors through
        reason = f"could not be downloaded ({one_line(error)}); try again, {ELSEWHERE}"
    raise Refused(f"{repo}@{revision}: {reason}" if revision else f"{repo}: {reason}")
