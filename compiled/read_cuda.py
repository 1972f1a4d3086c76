"""The operator that takes a few tokens through all layers on a GPU: six Triton kernels a layer.

A tick of one sequence is bound by bytes, and by how many kernels it starts. Each kernel
(``read_kernels.py``) reads what it needs once, norms and rotations are computed in passing, and the
attention mass comes out of the same pass over the keys. To the compiler all of it is one opaque
call, as on a CPU (``read_cpu.py``): it means what its twin means, the layers of ``read.py``, and
writes nothing but its results and scratch of its own.

A layer is

    1. norm, packed projection, rotation: queries to scratch, new keys and values to the results
       (where queries and keys have norms of their own, these and the rotation are a seventh kernel)
    2. attention over splits of the slots: per split a maximum, a sum, a weighted sum of values, and
       for every slot its weight exp(score - maximum so far)
    3. the splits put together, with what the new tokens give each other
    4. output projection and residual; beside it, in the same launch, the weights of 2 become the
       layer's share of the attention mass
    5. norm, gate and up, SwiGLU
    6. down projection and residual

and after the last a norm and the head. Slots that no token sees are never loaded, and those behind
the last visible one not even looked at: how far a read goes is a number on the device.

Triton comes with PyTorch for CUDA. Nothing else of this package imports this module before it is
asked for.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from compiled import kernel_launch, read_kernels
from compiled.attention import Visibility
from compiled.int8 import Int8
from compiled.kernel_launch import INTERPRETED, Bindings, Launch, Launcher, power_of_two
from compiled.llama import LlamaConfig, Weights
from compiled.matrix import Matrix, part
from compiled.read_cpu import Decode, Decoded
from compiled.sample import surprises
from compiled.state import State

MOST_TOKENS = 8
"""Of a read that the operator is for: more are bound by arithmetic, not by bytes."""

_TILE = 8192
"""Numbers of a weight that a program multiplies at a time, times tokens: what registers hold."""
MOST_SPLITS = 128
"""Of the slots of one key head: with four of those, some four programs for each multiprocessor of
the largest GPUs. One program a head puts them together."""
_MASS_SLOTS = 256
"""Slots of the mass that a program adds up."""


# Launches ----------------------------------------------------------------------------------------


def block_of(dtype: torch.dtype) -> int:
    """Slots of a block: its keys and its values fit into registers."""
    return 128 // dtype.itemsize


def splits_of(dtype: torch.dtype, bucket: int) -> int:
    """Programs for the slots of a key head. Each takes as many blocks as the slots before the last
    visible one need: where sums are cut follows from that slot, whatever the bucket.
    """
    return max(1, min(MOST_SPLITS, -(-bucket // block_of(dtype))))


def _padded(config: LlamaConfig) -> int:
    return max(16, power_of_two(config.head_dim))


class Scratch(NamedTuple):
    """Room for what kernels hand on to each other, at fixed addresses, used again by every layer
    and every read. Nothing in it outlives a read.
    """

    hidden: Tensor  # [T, hidden] float32
    queries: Tensor  # [T, heads, head_dim] model dtype
    attended: Tensor  # [T, heads * head_dim] float32
    inner: Tensor  # [T, intermediate] float32
    weights: Tensor  # [T * heads * capacity] model dtype
    crests: Tensor  # [T * heads * blocks of the capacity] float32
    parts: Tensor  # [T * heads * splits * head_dim] float32
    tops: Tensor  # [T * heads * splits] float32
    totals: Tensor  # [T * heads * splits] float32
    summary: Tensor  # [2 * T * heads] float32
    own: Tensor  # [T * heads * T] float32


def allocate_scratch(
    config: LlamaConfig, capacity: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> Scratch:
    """Scratch for reads of at most ``tokens`` tokens in a memory of ``capacity`` slots."""
    rows = tokens * config.num_heads
    splits, blocks = splits_of(dtype, capacity), -(-capacity // block_of(dtype))

    def room(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=of, device=device)

    return Scratch(
        hidden=room(tokens, config.hidden_size),
        queries=room(tokens, config.num_heads, config.head_dim, of=dtype),
        attended=room(tokens, config.num_heads * config.head_dim),
        inner=room(tokens, config.intermediate_size),
        weights=room(rows * capacity, of=dtype),
        crests=room(rows * blocks),
        parts=room(rows * splits * config.head_dim),
        tops=room(rows * splits),
        totals=room(rows * splits),
        summary=room(2 * rows),
        own=room(rows * tokens),
    )


def launches(
    config: LlamaConfig,
    weights: Weights,
    cache: tuple[Tensor, Tensor],
    scratch: Scratch,
    given: "Given",
    results: Decoded,
    *,
    per_query: bool,
) -> list[Launch]:
    """All kernels of a read, in order.

    Args:
        config: Of the model.
        weights: Of the model.
        cache: Keys and values [layers, kv_heads, capacity, head_dim].
        scratch: For at least as many tokens and slots.
        given: What is read.
        results: Where it goes; ``mass`` [T or 1, bucket + T].
        per_query: Whether ``mass`` has a row for every token.
    """
    c, tokens, bucket = config, given.hidden.shape[0], given.seen.shape[1]
    heads, kv = c.num_heads, c.num_kv_heads
    splits = splits_of(weights.dtype, bucket)
    cut = {"BS": block_of(weights.dtype), "MOST": MOST_SPLITS, "SPLITS": splits}
    int8 = isinstance(weights.qkv, Int8)
    common = {"T": tokens, "TP": power_of_two(tokens)}
    attention = {"T": tokens, "HEADS": heads, "KV": kv, "D": c.head_dim}
    padded = _padded(c)
    scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
    out = []

    def columns(size: int, rows: int) -> int:
        """Numbers of a weight's row at a time."""
        return min(power_of_two(size), max(16, _TILE // (rows * power_of_two(tokens))))

    def of(matrix: Matrix, layer: int | None = None) -> tuple[Tensor, Tensor]:
        """A matrix and its scale; where it has none, something that is not looked at."""
        one = matrix if layer is None else part(matrix, layer)
        if isinstance(one, Int8):
            return one.values, one.scale
        assert isinstance(one, Tensor)  # a GPU is given no blocks
        return one, given.live

    for layer, kind in enumerate(c.layer_kinds):
        bias = None if weights.qkv_bias is None else weights.qkv_bias[layer]
        before = given.hidden if layer == 0 else scratch.hidden
        new_keys, new_values = results.new_keys[layer], results.new_values[layer]
        rows = 8
        pairs = -(-(c.head_dim // 2) // (rows // 2))
        out.append(
            Launch(
                read_kernels.project,
                ((heads + 2 * kv) * pairs,),
                (
                    *(before, weights.attention_norm[layer], *of(weights.qkv, layer)),
                    *(given.cos[kind], given.sin[kind], scratch.queries, new_keys, new_values),
                    given.live if bias is None else bias,
                ),
                {
                    **(common | attention),
                    **{"H": c.hidden_size, "EPS": c.stream_eps, "INT8": int8},
                    **{"BIAS": bias is not None, "TURNS": weights.qk_gain is None},
                    **{"BN": rows, "BK": columns(c.hidden_size, rows)},
                },
                4,
            )
        )
        if weights.qk_gain is not None:
            out.append(
                Launch(
                    read_kernels.turn,
                    (tokens * (heads + kv),),
                    (
                        *(given.cos[kind], given.sin[kind], weights.qk_gain[layer]),
                        *(scratch.queries, new_keys),
                    ),
                    {**attention, "DP": padded // 2, "EPS": c.rms_norm_eps},
                    1,
                )
            )
        out.append(
            Launch(
                read_kernels.attend,
                (kv, splits),
                (
                    *(scratch.queries, cache[0][layer], cache[1][layer], given.seen),
                    *(scratch.weights, scratch.crests, scratch.parts),
                    *(scratch.tops, scratch.totals, given.end, cache[0].shape[2], bucket),
                ),
                {
                    **(attention | cut),
                    "DP": padded,
                    "RP": max(16, power_of_two(tokens * heads // kv)),
                    **{"SCALE": scale, "WIDE": INTERPRETED},
                },
                8 if weights.dtype == torch.float32 else 4,
            )
        )
        out.append(
            Launch(
                read_kernels.combine,
                (tokens * heads,),
                (
                    *(scratch.queries, new_keys, new_values, given.seen_new),
                    *(scratch.parts, scratch.tops, scratch.totals),
                    *(scratch.attended, scratch.summary, scratch.own, given.end),
                ),
                {**(common | attention | cut), "DP": padded, "SCALE": scale},
                4,
            )
        )
        rows, inputs = 4, heads * c.head_dim
        products, shares = -(-c.hidden_size // rows), -(-bucket // _MASS_SLOTS)
        out.append(
            Launch(
                read_kernels.add_out,
                (products + shares + 1,),
                (
                    *(scratch.attended, *of(weights.attention_out, layer)),
                    *(before, scratch.hidden, scratch.weights, scratch.crests, scratch.summary),
                    *(scratch.own, given.live, results.mass, given.end),
                    *(bucket, products, shares),
                ),
                {
                    **common,
                    **{"H": c.hidden_size, "K": inputs, "HEADS": heads, "HP": power_of_two(heads)},
                    **{"BN": rows, "BK": columns(inputs, rows)},
                    **{"BM": _MASS_SLOTS, "BS": cut["BS"]},
                    **{"PER_QUERY": per_query, "FIRST": layer == 0, "INT8": int8},
                },
                4,
            )
        )
        rows = 16
        out.append(
            Launch(
                read_kernels.gate_up,
                (-(-c.intermediate_size // (rows // 2)),),
                (
                    *(scratch.hidden, weights.mlp_norm[layer]),
                    *(*of(weights.gate_up, layer), scratch.inner),
                ),
                {
                    **common,
                    **{"H": c.hidden_size, "INNER": c.intermediate_size, "EPS": c.stream_eps},
                    **{"BN": rows, "BK": columns(c.hidden_size, rows), "INT8": int8},
                },
                4,
            )
        )
        rows = 4
        out.append(
            Launch(
                read_kernels.add_down,
                (-(-c.hidden_size // rows),),
                (scratch.inner, *of(weights.down, layer), scratch.hidden),
                {
                    **common,
                    **{"H": c.hidden_size, "K": c.intermediate_size, "INT8": int8},
                    **{"BN": rows, "BK": columns(c.intermediate_size, rows)},
                },
                4,
            )
        )
    rows = 16
    out.append(
        Launch(
            read_kernels.head,
            (-(-c.vocab_size // rows),),
            (scratch.hidden, weights.final_norm, *of(weights.head), results.logits),
            {
                **common,
                **{"H": c.hidden_size, "V": c.vocab_size, "EPS": c.stream_eps, "INT8": int8},
                "DIVISOR": c.logit_divisor,
                **{"BN": rows, "BK": columns(c.hidden_size, rows)},
            },
            4,
        )
    )
    return out


# The operator ------------------------------------------------------------------------------------


class Given(NamedTuple):
    """What is read, each in one piece."""

    hidden: Tensor  # [T, hidden] float32, the embedded tokens
    cos: Tensor  # [kinds, T, head_dim / 2] float32
    sin: Tensor  # [kinds, T, head_dim / 2] float32
    seen: Tensor  # [T, bucket] bool
    seen_new: Tensor  # [T, T] bool
    live: Tensor  # [T] float32
    end: Tensor  # [1] int64, one past the last slot that any token sees


_bound: Bindings[Callable[[Sequence[Tensor], Decoded, bool], None]] = Bindings()
"""What runs the reads of each memory, and writes their results."""


def operator(config: LlamaConfig, weights: Weights, state: State, tokens: int) -> Decode:
    """Binds the operator to a memory, and allocates its scratch.

    Args:
        config: Of the model.
        weights: Of the model, on the device that reads.
        state: The memory.
        tokens: The most that will be read at a time, at most MOST_TOKENS.
    Returns:
        As ``read_cpu.operator``, for these weights and this memory alone.
    """
    device = state.keys.device
    scratch = allocate_scratch(config, state.capacity, tokens, weights.dtype, device)
    launcher = Launcher(device)

    def run(inputs: Sequence[Tensor], results: Decoded, per_query: bool) -> None:
        given = Given(*map(Tensor.contiguous, inputs))
        every = launches(
            config,
            weights,
            (state.keys, state.values),
            scratch,
            given,
            results,
            per_query=per_query,
        )
        launcher.start_all(every)

    number = _bound.bind(run)
    # Beside what is read it is given two tensors that say in which number format, and which memory
    # must not be moved.
    call = kernel_launch.operator(
        "read_cuda",
        "(Tensor[] inputs, Tensor[] like, int[] shape, int number, bool per_query) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        _run,
        _allocated,
    )

    def decode(
        of_config: LlamaConfig,
        of_weights: Weights,
        of_state: State,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        visible: Visibility,
        *,
        per_query: bool,
        targets: Tensor | None = None,
    ) -> Decoded:
        del of_config, of_weights, of_state  # those that it is bound to
        inputs = [hidden, cos, sin, *visible, _end(visible.cached)]
        like = [weights.final_norm, state.keys]
        decoded = Decoded(*call(inputs, like, _shape(config), number, per_query))
        if targets is None:
            return decoded
        return decoded._replace(logits=surprises(decoded.logits, targets))

    # Weights, memory and scratch go when nobody can read them any more.
    _bound.keep_for(decode, number)
    return decode


def _end(seen: Tensor) -> Tensor:
    """One past the last slot that any token sees: [T, bucket] bool → [1] int64."""
    slot = torch.arange(1, seen.shape[1] + 1, device=seen.device)
    return torch.where(seen.any(0), slot, 0).amax(0, keepdim=True)


def _shape(config: LlamaConfig) -> list[int]:
    """What the size of results follows from, beside what is read."""
    return [config.num_layers, config.num_kv_heads, config.head_dim, config.vocab_size]


def _allocated(
    inputs: Sequence[Tensor],
    like: Sequence[Tensor],
    shape: Sequence[int],
    number: int,
    per_query: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the results, of what the operator is given: every number of it is going to be
    written.
    """
    hidden, seen, dtype = inputs[0], inputs[3], like[0].dtype
    layers, kv_heads, head_dim, vocab = shape
    tokens, bucket = seen.shape
    rows = (layers, kv_heads, tokens, head_dim)
    width = bucket + tokens
    return (
        hidden.new_empty((tokens, vocab)),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty((tokens, width) if per_query else (width,)),
    )


def _run(
    inputs: Sequence[Tensor],
    like: Sequence[Tensor],
    shape: Sequence[int],
    number: int,
    per_query: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = _allocated(inputs, like, shape, number, per_query)
    _bound[number](inputs, Decoded(*results), per_query)
    return results
