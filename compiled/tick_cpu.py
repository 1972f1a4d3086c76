"""Steps 2 to 4 of a tick on a CPU where nothing is captured, built from ``tick_cpu.cpp``.

``scoring`` holds functions that take, return and mean what their twins in ``score.py`` and
``finite.py`` do; ``patch`` writes what its twin in ``patch.py`` writes. They are called, never
traced: a captured graph does without them.

This module knows a built library and calls it. Where a library comes from is not its business.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from compiled.cpu_library import load
from compiled.plan import Plan
from compiled.score import (
    MOST_CULLED,
    Brightness,
    Culling,
    Novelty,
    Scoring,
    decide_cull,
    seed_brightness,
)
from compiled.state import ROW_COLUMNS, Cursor, State

SOURCE = Path(__file__).with_name("tick_cpu.cpp")

TickPatch = Callable[[State, Cursor, Plan], None]
"""Carries out a tick's plan."""


class Steps(NamedTuple):
    """What a library stands for."""

    scoring: Scoring
    patch: TickPatch


class _Column(ctypes.Structure):
    """``Column`` of ``tick_cpu.cpp``, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("held", "updated", "rows")),
        ("width", ctypes.c_int64),
    )


class Arguments(ctypes.Structure):
    """``Patch`` of ``tick_cpu.cpp``, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("capacity", "tokens", "planes", "row_bytes")),
        *((name, ctypes.c_int64) for name in ("columns", "cursor_columns")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "new_keys", "new_values")),
        ("column", ctypes.POINTER(_Column)),
        ("cursor", ctypes.POINTER(_Column)),
        *((name, ctypes.c_void_p) for name in ("valid", "cull", "length", "not_finite")),
    )


@functools.cache
def steps(library: Path) -> Steps:
    """Binds the functions of a library.

    Args:
        library: ``tick_cpu.cpp`` as built for this processor.
    Raises:
        OSError: The library cannot be loaded, or takes other arguments than this module passes.
    """
    loaded = load(library, Arguments)
    number, whole, pointer = ctypes.c_float, ctypes.c_int64, ctypes.c_void_p
    loaded.brighten.argtypes = (whole, *[pointer] * 5, *[number] * 3, *[pointer] * 2)
    loaded.echo.argtypes = (whole, *[pointer] * 5, number, pointer)
    loaded.decide_cull.argtypes = (whole, *[pointer] * 5, *[whole] * 3, *[pointer] * 2)
    loaded.not_finite.restype = whole
    called = functools.partial
    scoring = Scoring(
        brighten=called(_brighten, loaded),
        echo=called(_echo, loaded),
        seed_brightness=_seed_brightness,
        decide_cull=called(_decide_cull, loaded),
        not_finite=called(_not_finite, loaded),
    )
    return Steps(scoring, called(_patch, loaded))


def _brighten(
    library: ctypes.CDLL, state: State, tick: Tensor, mass: Tensor, constants: Brightness
) -> tuple[Tensor, Tensor]:
    mass = mass.contiguous()
    brighter, lit = torch.empty_like(state.brightness), torch.empty_like(state.lit)
    library.brighten(
        state.capacity,
        *_pointers(state.valid, state.brightness, state.lit, tick, mass),
        *(constants.decay, constants.gain, constants.maximum),
        *_pointers(brighter, lit),
    )
    return brighter, lit


def _echo(
    library: ctypes.CDLL, state: State, at: Tensor, strength: Tensor, constants: Novelty
) -> Tensor:
    louder = torch.empty_like(state.novelty)
    library.echo(
        state.capacity,
        *_pointers(state.valid, state.position, state.novelty, at, strength),
        constants.log_decay,
        louder.data_ptr(),
    )
    return louder


@functools.cache
def _seeds(constants: Brightness) -> Tensor:
    """The brightness that each of 256 sources gives."""
    return seed_brightness(torch.arange(256, dtype=torch.uint8), constants)


def _seed_brightness(source: Tensor, constants: Brightness) -> Tensor:
    return _seeds(constants).index_select(0, source.int())


def _decide_cull(
    library: ctypes.CDLL, state: State, cursor: Cursor, keep_scores: Tensor, constants: Culling
) -> tuple[Tensor, Tensor]:
    if constants.at_once:  # rare, and sorts
        return decide_cull(state, cursor, keep_scores, constants)
    keep_scores = keep_scores.contiguous()
    cull = torch.empty_like(state.valid)
    culled = torch.empty(MOST_CULLED, dtype=torch.int64)
    library.decide_cull(
        state.capacity,
        *_pointers(state.valid, state.pinned, state.position, cursor.position, keep_scores),
        *(constants.target, constants.sinks, constants.recent),
        *_pointers(cull, culled),
    )
    return cull, culled


def _not_finite(library: ctypes.CDLL, *parts: Tensor) -> Tensor:
    held = [part.contiguous() for part in parts]
    numbers = (ctypes.c_void_p * len(held))(*_pointers(*held))
    counts = (ctypes.c_int64 * len(held))(*(part.numel() for part in held))
    widths = (ctypes.c_int64 * len(held))(*(part.itemsize for part in held))
    flags = library.not_finite(ctypes.c_int64(len(held)), numbers, counts, widths)
    return torch.tensor(flags)


def _patch(library: ctypes.CDLL, state: State, cursor: Cursor, plan: Plan) -> None:
    new = [plan.keys.contiguous(), plan.values.contiguous()]
    column = (_Column * len(ROW_COLUMNS))()
    for filled, name in zip(column, ROW_COLUMNS, strict=True):
        held, rows, updated = getattr(state, name), plan.rows[name], plan.updates.get(name)
        filled.held, filled.rows, filled.width = held.data_ptr(), rows.data_ptr(), held.itemsize
        filled.updated = None if updated is None else updated.data_ptr()
    moved = (_Column * len(cursor))()
    for filled, held, following in zip(moved, cursor, plan.cursor, strict=True):
        filled.held, filled.width = held.data_ptr(), held.itemsize
        filled.updated = following.data_ptr()
    layers, kv_heads, capacity, head_dim = state.keys.shape
    arguments = Arguments(
        *(capacity, plan.keys.shape[2], layers * kv_heads, head_dim * state.keys.itemsize),
        *(len(column), len(moved)),
        *_pointers(state.keys, state.values, *new),
        *(column, moved),
        *_pointers(state.valid, plan.cull, plan.length, plan.not_finite),
    )
    library.patch(ctypes.byref(arguments))


def _pointers(*tensors: Tensor) -> Sequence[int]:
    return [tensor.data_ptr() for tensor in tensors]
