"""From a configuration, or a save that holds one, to a brain."""

import dataclasses
from pathlib import Path, PurePath
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from brain.actions import integer
from brain.auto import resolved
from brain.brain import Brain
from brain.checkpoints import Checkpoint, open_checkpoint
from brain.config.compose import compose_conf, typed
from brain.config.older import bring_up_to_date
from brain.config.overrides import literal, model_overrides, override
from brain.config.settings import Settings, engine_name, keeps_blocks, settings_of
from brain.errors import Refused, one_line, shown, warn
from brain.files import given_path
from brain.machine.graph_cache import name_graph_folder
from brain.policies import CustomPolicy, custom_policy
from brain.saves import read_description
from compiled.capture import prepared
from compiled.choose import KeepScore
from conf.schema import Conf, WeightFormat, register

MOST_THREADS = 1024
"""More than any machine gains from. A process that starts a billion dies of it."""
UNUSABLE = (ValueError, TypeError, ArithmeticError, RecursionError, OmegaConfBaseException)
"""Errors of making a configuration from JSON that is not one."""


def open(
    model: str | PurePath = "smollm2", *, policy: str | KeepScore | None = None, **overrides: Any
) -> Brain:
    """Opens a brain. Raises Refused if something given cannot be used.

    With ``engine="compiled"`` graphs are captured when first needed; ``Brain.warm_up`` captures
    all of them at once.

    Args:
        model: A built-in name (``smollm2``, ``tinyllama``), the path of a folder or a GGUF file, or
            ``org/name`` on the Hugging Face hub: the first that fits.
        policy: What decides which rows are forgotten first: a function ``(state, look) → scores``,
            or its name ``package.module:function``; None: as ``cull`` says.
        overrides: Hydra overrides, as on the command line: ``capacity=512``,
            ``engine="compiled"``, ``**{"cull.target": 400}``.
    """
    options = dict(overrides)
    given = None if policy is None else custom_policy(policy)
    if given is not None:
        options["cull.policy"] = given.name
    given_as = [override(key, value) for key, value in options.items()]
    conf = compose_conf([*model_overrides(model), *given_as])
    return open_brain(conf, given)


def load(
    folder: str | Path, *, capacity: int | None = None, policy: str | KeepScore | None = None
) -> Brain:
    """Opens the brain that was saved in a folder. Its next tick is the one that would have come.

    Args:
        folder: Where ``Brain.save`` wrote it.
        capacity: Slots of its memory, instead of as many as it had. Rows get other slots where
            they need them.
        policy: The policy that it was saved with, if that is a custom one.
    Raises:
        Refused: The save is damaged, its model or policy is not the one that is found now, or it
            holds more rows than fit.
    """
    folder = given_path(folder)
    conf = _saved_conf(folder)
    if capacity is not None:
        slots = integer(capacity)
        if slots is None:
            raise Refused(f"capacity must be a number of slots, not {shown(capacity)}")
        conf = dataclasses.replace(conf, capacity=slots)
    given = None if policy is None else custom_policy(policy)
    if given is not None:
        conf = dataclasses.replace(conf, cull=dataclasses.replace(conf.cull, policy=given.name))
    elif ":" in conf.cull.policy:  # code that a file names is never imported
        raise Refused(
            f"{folder} was saved with the policy {conf.cull.policy}, which a save does not hold: "
            "give policy=…"
        )
    brain = open_brain(conf, given)
    brain.restore(folder)
    return brain


def open_brain(conf: Conf, policy: CustomPolicy | None = None) -> Brain:
    """Opens the brain that a configuration describes, with the policy that it names, if that need
    not be imported. Raises Refused if it cannot be used.
    """
    conf = resolved(conf, policy).conf
    settings = settings_of(conf, policy)
    use_threads(conf.threads)
    if settings.graphs.compiled and settings.device.type == "cpu":
        name_graph_folder()
        prepared()  # goes on while weights are loaded
    return Brain(checkpoint_of(conf, settings), settings)


def use_threads(threads: int | None) -> None:
    """Sets how many threads of the CPU PyTorch uses; None leaves that as it is. Raises Refused."""
    if threads is None:
        return
    if not 1 <= threads <= MOST_THREADS:
        raise Refused(f"threads must be 1 to {MOST_THREADS}, not {threads}")
    torch.set_num_threads(threads)


def checkpoint_of(conf: Conf, settings: Settings) -> Checkpoint:
    """Loads the model that a configuration names, in its number formats. Raises Refused."""
    blocks = keeps_blocks(conf, settings.device)
    if conf.weights is WeightFormat.int4 and not blocks:
        where = f"engine={engine_name(conf.engine)} on {settings.device}"
        warn(f"weights=int4: {where} reads matrices in {conf.dtype.value}, rounded to four bits")
    return open_checkpoint(
        conf.model,
        conf.cache_dir,
        settings.dtype,
        settings.device,
        weights=conf.weights,
        blocks=blocks,
    )


def _saved_conf(folder: Path) -> Conf:
    """The configuration that a save holds. Raises Refused if it is damaged."""
    saved = read_description(folder).get("conf")
    register()
    try:
        if not isinstance(saved, dict):
            raise TypeError("it is missing")
        # Text stays text: an interpolation in it would read the environment.
        values = {str(key): literal(value) for key, value in saved.items()}
        bring_up_to_date(values)
        task = values.pop("task", None)
        conf = OmegaConf.merge(OmegaConf.structured(Conf), values, {"task": task})
        return typed(conf)  # type: ignore[arg-type]
    except UNUSABLE as error:
        raise Refused(f"{folder}: its configuration is damaged ({one_line(error)})") from None
