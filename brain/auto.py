"""What ``auto`` means: the engine and the number format that are fastest on this machine for this
model. It is chosen before anything is recorded, and what was chosen is recorded in its place.
"""

import dataclasses
from typing import NamedTuple

import torch

from brain.checkpoints import stored_format
from brain.config.settings import engine_name, keeps_blocks, known_formats, settings_of
from brain.errors import Refused, warn
from brain.files import given_path
from brain.machine.compiler import require_capture
from brain.machine.cpu_operator import native_libraries
from brain.policies import CustomPolicy
from conf.schema import Conf, DType, EngineConf, WeightFormat

GAINING = {
    "AVX2": "AVX2 reads 16-bit weights in half the time",
    "AVX512": "AVX-512 reads 16-bit weights in half the time",
}
"""CPUs, as PyTorch names what they can do, on which the native engine gains from bfloat16. Of
others it has not been measured."""
GAINING_GPU = (8, 0)
"""The least compute capability of CUDA with products in bfloat16."""
PRECISE = ("F32", "F64")
"""Formats of stored weights of which bfloat16 would lose something that counts."""


class Resolved(NamedTuple):
    """A configuration in which nothing is left to choose."""

    conf: Conf
    reason: str | None  # one line for people; None: nothing was left to choose


def resolved(conf: Conf, policy: CustomPolicy | None = None) -> Resolved:
    """Chooses what is ``auto``; checks everything else first. Raises Refused.

    On a GPU the engine is captured; on a CPU native, whose operators are built here if need be.
    Where that cannot be done it is eager, with a warning. The number format is bfloat16 where the
    stored weights have no more than 16 bits and the engine gains from it on this processor, else
    float32.

    Args:
        conf: As it was given.
        policy: See ``brain.config.settings.settings_of``.
    """
    chooses_engine = None in (conf.engine.captured, conf.engine.native)
    if not chooses_engine and conf.dtype is not DType.auto:
        return Resolved(conf, None)
    device = settings_of(plainest(conf), policy).device
    dtype, because = conf.dtype, ""
    if dtype is DType.auto:
        dtype, because = _dtype(conf, device)
    engine = conf.engine
    if chooses_engine:
        engine = _on_gpu(engine) if device.type == "cuda" else _on_cpu(conf, dtype, device)
    if conf.dtype is DType.auto and dtype is not DType.float32 and not _is_fast(engine, device):
        dtype, because = DType.float32, "the eager engine gains nothing from fewer bits"
    reason = f"engine={engine_name(engine)} dtype={dtype.value}"
    return Resolved(
        dataclasses.replace(conf, engine=engine, dtype=dtype),
        f"{reason} ({because})" if because else reason,
    )


def plainest(conf: Conf) -> Conf:
    """The configuration with what can be had everywhere in place of ``auto``."""
    engine = dataclasses.replace(
        conf.engine, captured=bool(conf.engine.captured), native=bool(conf.engine.native)
    )
    dtype = DType.float32 if conf.dtype is DType.auto else conf.dtype
    return dataclasses.replace(conf, engine=engine, dtype=dtype)


def _dtype(conf: Conf, device: torch.device) -> tuple[DType, str]:
    """The number format for the stored weights, and why."""
    if device.type == "cuda":
        gains = torch.cuda.get_device_capability(device) >= GAINING_GPU
        because = "this GPU multiplies in bfloat16" if gains else "this GPU has no bfloat16"
    else:
        able = torch.backends.cpu.get_cpu_capability()
        gains = able in GAINING
        because = GAINING.get(able, f"bfloat16 has not been measured on a CPU of kind {able}")
    if not gains:
        return DType.float32, because
    stored = stored_format(conf.model, conf.cache_dir)
    if keeps_blocks(conf, device):
        stay = f"stay in {stored}" if conf.weights is WeightFormat.model else "become four bits"
        return DType.float32, f"the weights {stay}, so bfloat16 would gain nothing"
    if stored in PRECISE:
        return DType.float32, f"the weights are stored in {stored}"
    return DType.bfloat16, f"the weights come from {stored}, and {because}"


def _is_fast(engine: EngineConf, device: torch.device) -> bool:
    return bool(engine.captured if device.type == "cuda" else engine.native)


def _on_gpu(engine: EngineConf) -> EngineConf:
    try:
        require_capture()
    except Refused as refusal:
        warn(f"{refusal}; the eager engine runs, which is slow")
        return dataclasses.replace(engine, captured=False, native=False)
    captured = engine.captured is not False
    return dataclasses.replace(engine, captured=captured, native=engine.native is not False)


def _on_cpu(conf: Conf, dtype: DType, device: torch.device) -> EngineConf:
    native = conf.engine.native is not False
    if native:
        known = known_formats(conf, getattr(torch, dtype.value), device)
        try:
            if known is None:
                raise Refused(f"dtype={dtype.value} has no operators for the CPU")
            native_libraries(known, None if conf.cache_dir is None else given_path(conf.cache_dir))
        except Refused as refusal:
            warn(f"{refusal}; the eager engine runs, which is slow")
            native = False
    return dataclasses.replace(conf.engine, captured=bool(conf.engine.captured), native=native)
