"""The read: step 1, a forward pass of T new tokens against the memory, writing nothing.

    read(weights, state, tokens [T], positions [T], length) → Reading
    study(weights, state, tokens [T], positions [T], length, targets [T]) → Study
    read_ahead(weights, state, cursor, proposed [T - 1], length) → AheadReading

All are one pass through the layers; they differ in what they ask of it. A read returns every logit;
a study, for a text that is already written, how surprising each next token of it is; reading ahead,
for tokens that may or may not be said, the attention of each of them apart.

Decode, prefill, re-reading a token that is already remembered and reading "as of" an old
position are all this one function: the visibility rule of ``attention.py`` makes them so.
Positions and length are plain input tensors; T and the bucket are the only static numbers, and
there is one captured graph for each pair of them. In a captured graph on a CPU the layers are one
operator (``native.py``), elsewhere the functions of ``llama.py``.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled.attention import Visibility, visibility
from compiled.linear import linear, look_up
from compiled.llama import (
    LayerWeights,
    LlamaConfig,
    Weights,
    decoder_layer,
    layer_weights,
    rms_norm,
)
from compiled.read_cpu import Decode, Decoded
from compiled.rope import rotation
from compiled.sample import head_surprises
from compiled.state import Cursor, State


class Reading(NamedTuple):
    """What a read returns. Nothing in it shares memory with the state.

    ``mass`` and ``own_mass`` are mean attention probabilities over layers and heads, summed over
    the live new tokens: together they sum to ``length``.
    """

    logits: Tensor  # [T, vocab] float32
    new_keys: Tensor  # [layers, kv_heads, T, head_dim], RoPE applied
    new_values: Tensor  # [layers, kv_heads, T, head_dim]
    mass: Tensor  # [capacity] float32
    own_mass: Tensor  # [T] float32


class Study(NamedTuple):
    """What a study returns: one number in place of each row of logits, and no mass: a text that is
    already written is not thought about, only remembered.
    """

    surprises: Tensor  # [T] float32, nats: of ``targets[i]`` after token i
    new_keys: Tensor  # [layers, kv_heads, T, head_dim], RoPE applied
    new_values: Tensor  # [layers, kv_heads, T, head_dim]


class AheadReading(NamedTuple):
    """What reading ahead returns: a reading whose attention masses are those of each new token."""

    logits: Tensor  # [T, vocab] float32
    new_keys: Tensor  # [layers, kv_heads, T, head_dim], RoPE applied
    new_values: Tensor  # [layers, kv_heads, T, head_dim]
    mass: Tensor  # [T, capacity] float32
    own_mass: Tensor  # [T, T] float32: of query i on new token j


class _Pass(NamedTuple):
    """What the layers make of T tokens; of a text, no mass, and of each token apart where that is
    wanted: [T, bucket + T].
    """

    final: Tensor  # [T, hidden] model dtype, normalised: what the head takes
    new_keys: Tensor  # [layers, kv_heads, T, head_dim]
    new_values: Tensor  # [layers, kv_heads, T, head_dim]
    mass: Tensor | None  # [bucket + T] float32, summed over layers, heads and live new tokens


@torch.compiler.nested_compile_region
def _layer(eps: float, text: bool, each: bool, *tensors: Tensor) -> tuple[Tensor | None, ...]:
    # One region, compiled once and stamped out for every layer. The compiler recognises the
    # repetition only where everything that goes in and out is a plain tensor or number.
    hidden, cos, sin, cached, new, live, keys, values, *weights = tensors
    visible = Visibility(cached, new, live)
    layer = LayerWeights.from_tensors(weights)
    reading = decoder_layer(hidden, layer, keys, values, cos, sin, visible, eps, text, each)
    return tuple(reading)


class _Start(NamedTuple):
    """What goes into the first layer, and what every layer is told."""

    hidden: Tensor  # [T, hidden] float32
    cos: Tensor  # [T, head_dim / 2]
    sin: Tensor  # [T, head_dim / 2]
    visible: Visibility


def _start(
    weights: Weights, state: State, tokens: Tensor, positions: Tensor, length: Tensor, bucket: int
) -> _Start:
    """Tokens embedded, positions as angles, and who sees whom."""
    cos, sin = rotation(positions, weights.inverse_frequencies)
    visible = visibility(state.valid[:bucket], state.position[:bucket], positions, length)
    return _Start(look_up(tokens, weights.embedding), cos, sin, visible)


def _pass(
    config: LlamaConfig,
    weights: Weights,
    state: State,
    tokens: Tensor,
    positions: Tensor,
    length: Tensor,
    bucket: int,
    *,
    text: bool = False,
    each: bool = False,
) -> _Pass:
    """From token ids to what the head takes."""
    hidden, cos, sin, visible = _start(weights, state, tokens, positions, length, bucket)
    keys, values = [], []
    mass = None
    if not text:
        shape = (len(tokens),) * each + (bucket + len(tokens),)
        mass = torch.zeros(shape, dtype=torch.float32, device=tokens.device)
    for layer in range(config.num_layers):
        hidden, key, value, layer_mass = _layer(
            config.rms_norm_eps,
            text,
            each,
            hidden,
            cos,
            sin,
            *visible,
            state.keys[layer, :, :bucket],  # [kv_heads, bucket, head_dim], a view
            state.values[layer, :, :bucket],
            *layer_weights(weights, layer).tensors(),
        )
        keys.append(key)
        values.append(value)
        mass = None if mass is None else mass + layer_mass

    new_keys = torch.stack(keys)
    keys.clear()  # a long text's rows are held once, not twice
    new_values = torch.stack(values)
    values.clear()
    final = rms_norm(hidden, weights.final_norm, config.rms_norm_eps)
    return _Pass(final, new_keys, new_values, mass)


def _decoded(
    config: LlamaConfig,
    weights: Weights,
    state: State,
    tokens: Tensor,
    positions: Tensor,
    length: Tensor,
    bucket: int,
    decode: Decode | None,
    *,
    each: bool = False,
) -> Decoded:
    """From token ids to logits, by the layers or by the operator that does the same; the mass is a
    mean over layers and heads.
    """
    inputs = (state, tokens, positions, length)
    if decode is None:
        final, new_keys, new_values, mass = _pass(config, weights, *inputs, bucket, each=each)
        assert mass is not None
        decoded = Decoded(linear(final, weights.head).float(), new_keys, new_values, mass)
    else:
        decoded = decode(config, weights, state, *_start(weights, *inputs, bucket), each)
    return decoded._replace(mass=decoded.mass / (config.num_layers * config.num_heads))


def read(
    config: LlamaConfig,
    weights: Weights,
    state: State,
    tokens: Tensor,
    positions: Tensor,
    length: Tensor,
    *,
    bucket: int,
    decode: Decode | None = None,
) -> Reading:
    """Reads T tokens at T positions against the first ``bucket`` slots.

    ``tokens``, ``positions`` [T] int64; ``length`` [] int64, how many of them are asked for (the
    rest is padding, whose outputs mean nothing). ``bucket`` must reach past the highest occupied
    slot and is at most the capacity. ``decode`` is the operator that stands for the layers, if any.
    """
    inputs = (state, tokens, positions, length)
    logits, new_keys, new_values, mass = _decoded(config, weights, *inputs, bucket, decode)
    return Reading(
        logits=logits,
        new_keys=new_keys,
        new_values=new_values,
        mass=F.pad(mass[:bucket], (0, state.capacity - bucket)),
        own_mass=mass[bucket:],
    )


def study(
    config: LlamaConfig,
    weights: Weights,
    state: State,
    tokens: Tensor,
    positions: Tensor,
    length: Tensor,
    targets: Tensor,
    *,
    bucket: int,
) -> Study:
    """Reads T tokens that are followed by ``targets`` [T] int64, as ``read`` does but for the mass.

    They come in text order: the positions of the first ``length`` ascend. No row of logits ever
    exists as a whole: T may be as large as makes the products fast.
    """
    inputs = (state, tokens, positions, length)
    final, new_keys, new_values, _ = _pass(config, weights, *inputs, bucket, text=True)
    return Study(head_surprises(final, weights.head, targets), new_keys, new_values)


def read_ahead(
    config: LlamaConfig,
    weights: Weights,
    state: State,
    cursor: Cursor,
    proposed: Tensor,
    length: Tensor,
    *,
    bucket: int,
    decode: Decode | None = None,
) -> AheadReading:
    """Reads the cursor's token and behind it ``proposed`` [T - 1] int64, of which ``length`` []
    int64 are asked for: what each of them is read against is what it will be read against if the
    tokens before it are said, as long as nothing is forgotten between them.
    """
    tokens = torch.cat([cursor.token, proposed])
    positions = cursor.position + torch.arange(len(tokens), device=tokens.device)
    inputs = (state, tokens, positions, length + 1)
    decoded = _decoded(config, weights, *inputs, bucket, decode, each=True)
    logits, new_keys, new_values, mass = decoded
    return AheadReading(
        logits=logits,
        new_keys=new_keys,
        new_values=new_values,
        mass=F.pad(mass[:, :bucket], (0, state.capacity - bucket)),
        own_mass=mass[:, bucket:] + 0,
    )


def trimmed(reading: Reading, length: int) -> Reading:
    """The reading without its padding: views of the first ``length`` tokens."""
    return reading._replace(
        logits=reading.logits[:length],
        new_keys=reading.new_keys[:, :, :length],
        new_values=reading.new_values[:, :, :length],
        own_mass=reading.own_mass[:length],
    )
