"""Models from the Hugging Face hub: what of a repository a model needs, and nothing else."""

import re
import warnings
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from brain.checkpoints.checkpoint import Checkpoint
from brain.checkpoints.folder import (
    ADAPTER,
    CONFIG,
    EXPLICIT,
    INDEX,
    SINGLE,
    open_folder,
    weight_files,
)
from brain.checkpoints.hf_config import read_config, read_settings
from brain.checkpoints.hub_files import (
    Listing,
    Place,
    Unreachable,
    fetch,
    list_files,
    readable_size,
)
from brain.errors import BrainWarning, Refused, did_you_mean
from conf.schema import WeightFormat

FIRST = (CONFIG, INDEX)
"""They say which weights count, and whether the model can be read at all."""
SMALL = (
    *("generation_config.json", ADAPTER, "tokenizer_config.json"),
    *("added_tokens.json", "special_tokens_map.json", "tokenizer.model", "tokenizer.json"),
    "chat_template.jinja",
)
GGUF = ".gguf"
PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
MOST_NAMED = 40  # files of a refusal

_found: dict[tuple[str, str | None, str | None, Path | None], Path] = {}
"""What this process has found: it keeps to one commit, and asks the hub once."""


def open_hub(
    repo: str,
    *,
    revision: str | None = None,
    file: str | None = None,
    cache_dir: Path | None = None,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    weights: WeightFormat = WeightFormat.model,
    blocks: bool = False,
) -> Checkpoint:
    """Loads a model from the hub as :func:`open_folder` or ``open_gguf`` do, downloading what is
    not cached. Raises Refused. The first four arguments are those of :func:`hub_model`.
    """
    path = hub_model(repo, revision=revision, file=file, cache_dir=cache_dir)
    how: dict[str, Any] = {"dtype": dtype, "device": device, "weights": weights, "blocks": blocks}
    if path.is_dir():
        return open_folder(path, name=repo, **how)
    from brain.checkpoints.gguf_file import open_gguf  # it takes a while

    return replace(open_gguf(path, **how), name=f"{repo}/{path.name}")


def hub_model(
    repo: str,
    *,
    revision: str | None = None,
    file: str | None = None,
    cache_dir: Path | None = None,
) -> Path:
    """The local folder of a repository, or its GGUF file; what is not cached is downloaded.

    Args:
        repo: ``owner/name``.
        revision: A branch, tag or commit; None: main.
        file: The GGUF file to take; None: the only one, where there are no safetensors.
        cache_dir: The cache; None: that of the hub's client.
    Returns:
        A folder with config.json, or a GGUF file.
    Raises:
        Refused: It cannot be had, or it is not clear what to take.
    """
    asked = (repo, revision, file, cache_dir)
    if asked in _found and _is_whole(_found[asked]):
        return _found[asked]
    place = Place(repo, revision, cache_dir)
    try:
        listing = list_files(repo, revision)
    except Unreachable as error:
        if path := _cached(place.known(), file):
            return path
        named = f"{repo}@{revision}" if revision else repo
        raise Refused(f"{named}: no such path here, not in the local cache, and {error}") from None
    except Refused as refusal:
        if not _cached(place.known(), file):
            raise
        raise Refused(f"{refusal}, or use what is in the cache: HF_HUB_OFFLINE=1") from None
    path = _fetch(listing, file, place)
    place.remember(listing.commit)
    _found[asked] = path
    return path


def _fetch(listing: Listing, file: str | None, place: Place) -> Path:
    """The model, fetched. The weights come last: where they are, everything is."""
    if file is None:
        first = [name for name in FIRST if name in listing.files]
        folder = fetch(listing, first, place, quiet=True)
        named = read_settings(folder / CONFIG).get(EXPLICIT) if CONFIG in first else None
        if isinstance(named, str) and named.endswith(".json") and named in listing.files:
            first.append(named)
            fetch(listing, first, place, quiet=True)
        if CONFIG in first and (named is not None or {SINGLE, INDEX} & listing.files.keys()):
            small = [name for name in SMALL if name in listing.files]
            return fetch(listing, [*small, *_weights(listing, folder)], place)
    name = _chosen_gguf(listing, file)
    return fetch(listing, [name], place) / name


def _weights(listing: Listing, folder: Path) -> list[str]:
    """The weight files that count. Raises Refused, before they are fetched, where config.json is of
    a model that is not supported, or a file is missing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BrainWarning)  # they come when the folder is opened
        read_config(folder / CONFIG)
    found = weight_files(folder, listing.files)
    for name in found.names:
        if name not in listing.files:
            raise Refused(
                f"{listing.repo}: {found.named_by.name} names {name}, which the repository lacks; "
                "choose another model.revision, or ask its owner"
            )
    return found.names


def _chosen_gguf(listing: Listing, file: str | None) -> str:
    """The name of the GGUF file to take. Raises Refused."""
    there = sorted(name for name in listing.files if name.lower().endswith(GGUF))
    whole = [name for name in there if not PART.search(name)]
    if file is not None:
        chosen = [n for n in there if file == n] or [
            n for n in there if file == PurePosixPath(n).name
        ]
        if len(chosen) == 1 and chosen[0] in whole:
            return chosen[0]
        if chosen and not set(chosen) & set(whole):
            raise Refused(f"{listing.repo}: {chosen[0]} is one of several parts; {_merge()}")
        near = did_you_mean(file, whole)
        raise Refused(f"{listing.repo}: no GGUF file {file}; {_choices(listing, whole)}{near}")
    if len(whole) == 1:
        return whole[0]
    if whole:
        raise Refused(f"{listing.repo}: several GGUF files; {_choices(listing, whole)}")
    if there:
        raise Refused(f"{listing.repo}: only GGUF files in several parts ({there[0]}); {_merge()}")
    raise Refused(f"{listing.repo}: {_lacking(listing.files)}")


def _choices(listing: Listing, names: list[str]) -> str:
    if not names:
        return "there is none in one part"
    sizes = [f"{name} ({readable_size(listing.files[name].size)})" for name in names[:MOST_NAMED]]
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"give model.file=NAME of one of them: {', '.join(sizes)}{more}"


def _merge() -> str:
    return "merge them (llama-gguf-split --merge) and use model=FILE.gguf"


def _lacking(names: Collection[str]) -> str:
    """Why a repository without GGUF files is no model."""
    if ADAPTER in names:
        return f"it is an adapter ({ADAPTER}); merge it into its base model, and use model=FOLDER"
    if CONFIG not in names:
        return f"no {CONFIG} and no GGUF file there; choose a repository of a model"
    return (
        f"no {SINGLE}, no {INDEX} and no GGUF file there; choose a repository that has one (*.bin "
        "and *.pth are not read)"
    )


def _cached(folder: Path | None, file: str | None) -> Path | None:
    """The model in the folder of a commit, if it is whole there."""
    if folder is None:
        return None
    if file is None and _is_whole(folder):
        return folder
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob(f"*{GGUF}")}
    fitting = [path for name, path in files.items() if file in (None, name, path.name)]
    return fitting[0] if len(fitting) == 1 and fitting[0].exists() else None


def _is_whole(path: Path) -> bool:
    """Whether a GGUF file is there, or a folder with all of its weights, which come last."""
    if not path.is_dir():
        return path.exists()
    try:
        return all((path / name).exists() for name in weight_files(path).names)
    except Refused:
        return False
