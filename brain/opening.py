"""From a configuration to a brain."""

from pathlib import Path
from typing import Any

import torch

from brain.brain import Brain
from brain.checkpoints import Checkpoint, open_folder, open_hub, open_wheel
from brain.checkpoints.hub import hub_folder
from brain.checkpoints.wheel import converted_wheel
from brain.config.compose import compose_conf
from brain.config.overrides import override
from brain.config.settings import Settings, settings_of
from brain.errors import Refused
from brain.files import given_path
from brain.machine.cpu_operator import begin_native_decoder
from compiled.capture import prepared
from compiled.read_cpu import formats
from conf.schema import Conf, ModelConf, Source, WeightFormat

MOST_THREADS = 1024
"""More than any machine gains from; of a billion, the process would die in starting them."""


def open(model: str = "smollm2", **overrides: Any) -> Brain:
    """Opens a brain. ``overrides`` are Hydra overrides, as on the command line: ``capacity=512``,
    ``engine="compiled"``, ``**{"cull.target": 400}``.

    With ``engine="compiled"`` graphs are captured when first needed; ``Brain.warm_up`` captures
    all of them at once. Raises Refused for anything that cannot be used.
    """
    options = {"model": model, **overrides}
    return open_brain(compose_conf([override(key, value) for key, value in options.items()]))


def open_brain(conf: Conf) -> Brain:
    """Opens the brain that a configuration describes."""
    settings = settings_of(conf)
    use_threads(conf.threads)
    int8 = conf.weights is WeightFormat.int8
    if settings.compiled and settings.device.type == "cpu":  # both go on while weights are loaded
        wanted = formats(settings.dtype, settings.device, int8=int8) if settings.native else None
        if wanted is not None:
            begin_native_decoder(wanted, settings.cache)
        prepared()
    return Brain(checkpoint_of(conf, settings), settings, conf)


def use_threads(threads: int | None) -> None:
    """From now on as many threads of the CPU; None leaves them as they are. Raises Refused."""
    if threads is None:
        return
    if not 1 <= threads <= MOST_THREADS:
        raise Refused(f"threads must be 1 to {MOST_THREADS}, not {threads}")
    torch.set_num_threads(threads)


def checkpoint_of(conf: Conf, settings: Settings) -> Checkpoint:
    """The model that a configuration names, in its number formats. Raises Refused."""
    int8 = conf.weights is WeightFormat.int8
    return open_checkpoint(conf.model, conf.cache_dir, settings.dtype, settings.device, int8=int8)


def open_checkpoint(
    model: ModelConf,
    cache_dir: str | None,
    dtype: torch.dtype,
    device: torch.device,
    *,
    int8: bool,
) -> Checkpoint:
    """Finds, checks and loads a model, with ``int8`` in eight bits. Raises Refused."""
    how: dict[str, Any] = {"dtype": dtype, "device": device, "int8": int8}
    cache = None if cache_dir is None else given_path(cache_dir)
    if model.source is Source.wheel:
        wheel = None if model.wheel is None else given_path(model.wheel)
        return open_wheel(cache_dir=cache, wheel=wheel, **how)
    if model.source is Source.hub:
        if model.repo is None:
            raise Refused("model.repo is missing: give owner/name on the hub")
        return open_hub(model.repo, revision=model.revision, cache_dir=cache, **how)
    if model.path is None:
        raise Refused("model.path is missing: give the folder that holds config.json")
    return open_folder(given_path(model.path), **how)


def model_folder(model: ModelConf, cache_dir: str | None) -> Path:
    """The Hugging Face folder of a model, fetched and converted where need be. Raises Refused."""
    cache = None if cache_dir is None else given_path(cache_dir)
    if model.source is Source.wheel:
        wheel = None if model.wheel is None else given_path(model.wheel)
        return converted_wheel(cache_dir=cache, wheel=wheel)
    if model.source is Source.hub and model.repo is not None:
        return hub_folder(model.repo, revision=model.revision, cache_dir=cache)
    if model.source is Source.folder and model.path is not None:
        return given_path(model.path)
    raise Refused(f"model={model.name} has no source: give model.repo or model.path")
