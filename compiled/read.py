"""The read: step 1, a forward pass of T new tokens against the memory, writing nothing.

    read(weights, state, tokens [T], positions [T], length) → Reading
    scored_prefill(weights, state, tokens [T], positions [T], length, targets [T]) → ScoredPrefill
    read_ahead(weights, state, cursor, proposed [T - 1], length) → AheadReading
    read_chunk(weights, state, tokens [T], positions [T], targets [T]) → ChunkReading

All take the tokens through the same layers and differ in what they return. ``read`` returns the
logits after every token and the attention mass. ``scored_prefill`` is for a text that is already
written: it returns the surprise of each next token, and no mass. ``read_ahead`` is for tokens that
may or may not be accepted: it returns the attention mass of each of them apart. ``read_chunk`` does
both, for a text that is told with forgetting.

Decode, prefill, re-reading a token that is already remembered and reading "as of" an old position
are all one function: the visibility rule of ``attention.py`` makes them so. Positions and length
are plain input tensors. T and the bucket are the only static numbers, and there is one captured
graph for each pair of them. Of not too many tokens the layers are one operator on a CPU
(``read_cpu.py``), and on request on a GPU (``read_cuda.py``); else the functions of ``llama.py``.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled.attention import (
    Attention,
    Visibility,
    attend,
    attend_causally,
    attend_per_query,
    visibility,
)
from compiled.blocks import Blocks
from compiled.linear import embed, linear
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


class ScoredPrefill(NamedTuple):
    """What a scored prefill returns: one number in place of each row of logits, and no mass."""

    surprises: Tensor  # [T] float32, nats: of ``targets[i]`` after token i
    new_keys: Tensor  # [layers, kv_heads, T, head_dim], RoPE applied
    new_values: Tensor  # [layers, kv_heads, T, head_dim]


class ChunkReading(NamedTuple):
    """What the read of a chunk returns: a number in place of each row of logits, and the attention
    masses of each new token.
    """

    surprises: Tensor  # [T] float32, nats, of the token after each
    new_keys: Tensor  # [layers, kv_heads, T, head_dim] model dtype
    new_values: Tensor  # [layers, kv_heads, T, head_dim] model dtype
    mass: Tensor  # [T, capacity] float32, that each token gave every slot
    own_mass: Tensor  # [T, T] float32: that token i gave token j


class AheadReading(NamedTuple):
    """What reading ahead returns: a reading whose attention masses are those of each new token."""

    logits: Tensor  # [T, vocab] float32
    new_keys: Tensor  # [layers, kv_heads, T, head_dim], RoPE applied
    new_values: Tensor  # [layers, kv_heads, T, head_dim]
    mass: Tensor  # [T, capacity] float32
    own_mass: Tensor  # [T, T] float32: of query i on new token j


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

    Args:
        config: Of the model.
        weights: Of the model.
        state: The memory.
        tokens: [T] int64.
        positions: [T] int64.
        length: [] int64, how many of the tokens are asked for. The rest is padding, whose outputs
            mean nothing.
        bucket: Slots that are read: past the highest occupied one, and at most the capacity.
        decode: The operator that stands for the layers, if any.
    """
    start = _start(config, weights, state, tokens, positions, length, bucket)
    if decode is None:
        nothing = torch.zeros((bucket + len(tokens),), dtype=torch.float32, device=tokens.device)
        layers = _through_layers(config, weights, state, start, _layer, nothing)
        decoded = layers.decoded(config, weights)
    else:
        decoded = decode(config, weights, state, *start, per_query=False)
    mass = decoded.mass / (config.num_layers * config.num_heads)
    return Reading(
        logits=decoded.logits,
        new_keys=decoded.new_keys,
        new_values=decoded.new_values,
        mass=F.pad(mass[:bucket], (0, state.capacity - bucket)),
        own_mass=mass[bucket:],
    )


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
    """Reads the cursor's token and behind it the proposed ones.

    Each of them is read against what it will be read against if the tokens before it are accepted,
    as long as nothing is forgotten between them.

    Args:
        config: This, ``weights``, ``state``, ``bucket`` and ``decode`` as for ``read``.
        weights: See ``read``.
        state: See ``read``.
        cursor: Holds the first of the T tokens, and its position.
        proposed: [T - 1] int64.
        length: [] int64, how many of the proposed tokens are asked for.
        bucket: See ``read``.
        decode: See ``read``.
    """
    tokens = torch.cat([cursor.token, proposed])
    num_tokens = len(tokens)
    positions = cursor.position + torch.arange(num_tokens, device=tokens.device)
    start = _start(config, weights, state, tokens, positions, length + 1, bucket)
    if decode is None:
        shape = (num_tokens, bucket + num_tokens)
        nothing = torch.zeros(shape, dtype=torch.float32, device=tokens.device)
        layers = _through_layers(config, weights, state, start, _layer_per_query, nothing)
        decoded = layers.decoded(config, weights)
    else:
        decoded = decode(config, weights, state, *start, per_query=True)
    mass = decoded.mass / (config.num_layers * config.num_heads)
    return AheadReading(
        logits=decoded.logits,
        new_keys=decoded.new_keys,
        new_values=decoded.new_values,
        mass=F.pad(mass[:, :bucket], (0, state.capacity - bucket)),
        own_mass=mass[:, bucket:] + 0,
    )


def scored_prefill(
    config: LlamaConfig,
    weights: Weights,
    state: State,
    tokens: Tensor,
    positions: Tensor,
    length: Tensor,
    targets: Tensor,
    *,
    bucket: int,
    decode: Decode | None = None,
) -> ScoredPrefill:
    """Reads T tokens of a text as ``read`` does, and scores the token after each.

    No row of logits ever exists as a whole: T may be as large as makes the products fast.

    Args:
        config: This and all but ``targets`` as for ``read``.
        weights: See ``read``.
        state: See ``read``.
        tokens: In text order.
        positions: Of which the first ``length`` ascend.
        length: See ``read``.
        targets: [T] int64, the token that follows each.
        bucket: See ``read``.
        decode: See ``read``.
    """
    start = _start(config, weights, state, tokens, positions, length, bucket)
    if decode is not None:
        decoded = decode(config, weights, state, *start, per_query=False, targets=targets)
        return ScoredPrefill(*decoded[:3])
    layers = _through_layers(config, weights, state, start, _causal_layer, None)
    surprises = head_surprises(layers.final, weights.head, targets, config.logit_divisor)
    return ScoredPrefill(surprises, layers.new_keys, layers.new_values)


def read_chunk(
    config: LlamaConfig,
    weights: Weights,
    state: State,
    tokens: Tensor,
    positions: Tensor,
    targets: Tensor,
    *,
    bucket: int,
    decode: Decode | None = None,
) -> ChunkReading:
    """Reads T tokens of a text as ``read_ahead`` does, and scores the token after each as
    ``scored_prefill`` does.

    Args:
        config: This, ``weights``, ``state`` and ``bucket`` as for ``read``.
        weights: See ``read``.
        state: See ``read``.
        tokens: [T] int64, in text order.
        positions: [T] int64, ascending, after every row.
        targets: [T] int64, the token that follows each.
        bucket: See ``read``.
        decode: See ``read``.
    """
    length = torch.full((), len(tokens), dtype=torch.int64, device=tokens.device)
    start = _start(config, weights, state, tokens, positions, length, bucket)
    if decode is None:
        shape = (len(tokens), bucket + len(tokens))
        nothing = torch.zeros(shape, dtype=torch.float32, device=tokens.device)
        layers = _through_layers(config, weights, state, start, _layer_per_query, nothing)
        nats = head_surprises(layers.final, weights.head, targets, config.logit_divisor)
        _, keys, values, mass = layers
    else:
        nats, keys, values, mass = decode(
            config, weights, state, *start, per_query=True, targets=targets
        )
    assert mass is not None
    mass = mass / (config.num_layers * config.num_heads)
    return ChunkReading(
        surprises=nats,
        new_keys=keys,
        new_values=values,
        mass=F.pad(mass[:, :bucket], (0, state.capacity - bucket)),
        own_mass=mass[:, bucket:],
    )


def trimmed(reading: Reading, length: int) -> Reading:
    """The reading without its padding: views of the first ``length`` tokens."""
    return reading._replace(
        logits=reading.logits[:length],
        new_keys=reading.new_keys[:, :, :length],
        new_values=reading.new_values[:, :, :length],
        own_mass=reading.own_mass[:length],
    )


class _Start(NamedTuple):
    """What goes into the first layer, and what every layer is given."""

    hidden: Tensor  # [T, hidden] float32
    cos: Tensor  # [kinds, T, head_dim / 2]
    sin: Tensor  # [kinds, T, head_dim / 2]
    visible: Visibility


def _start(
    config: LlamaConfig,
    weights: Weights,
    state: State,
    tokens: Tensor,
    positions: Tensor,
    length: Tensor,
    bucket: int,
) -> _Start:
    """Tokens embedded, positions as angles, and who sees whom."""
    cos, sin = rotation(positions, weights.inverse_frequencies)
    visible = visibility(state.valid[:bucket], state.position[:bucket], positions, length)
    hidden = embed(tokens, weights.embedding)
    if config.stream_scale != 1:
        hidden = hidden * config.stream_scale
    return _Start(hidden, cos, sin, visible)


class _Layers(NamedTuple):
    """What the layers make of T tokens."""

    final: Tensor  # [T, hidden] model dtype, normalised: what the head takes
    new_keys: Tensor  # [layers, kv_heads, T, head_dim]
    new_values: Tensor  # [layers, kv_heads, T, head_dim]
    mass: Tensor | None  # float32, summed over layers and heads

    def decoded(self, config: LlamaConfig, weights: Weights) -> Decoded:
        """With the logits: what the operator returns."""
        assert self.mass is not None
        logits = linear(self.final, weights.head).float()
        if config.logit_divisor != 1:
            logits = logits / config.logit_divisor
        return Decoded(logits, self.new_keys, self.new_values, self.mass)


def _through_layers(
    config: LlamaConfig,
    weights: Weights,
    state: State,
    start: _Start,
    layer_of: Callable[..., Any],
    mass: Tensor | None,
) -> _Layers:
    """Takes T tokens through all layers.

    Args:
        config: This, ``weights`` and ``state`` as for ``read``.
        weights: See ``read``.
        state: See ``read``.
        start: The first layer's input.
        layer_of: One of the regions below.
        mass: Zeros of the shape of a layer's attention mass; None where layers have none.
    """
    hidden, cos, sin, visible = start
    bucket = visible.cached.shape[1]
    keys, values = [], []
    for layer, kind in enumerate(config.layer_kinds):
        hidden, key, value, layer_mass = layer_of(
            config.stream_eps,
            config.rms_norm_eps,
            config.score_divisor,
            hidden,
            cos[kind],
            sin[kind],
            *visible,
            state.keys[layer, :, :bucket],  # [kv_heads, bucket, head_dim], a view
            state.values[layer, :, :bucket],
            weights=layer_weights(weights, layer),
        )
        keys.append(key)
        values.append(value)
        mass = None if mass is None else mass + layer_mass

    new_keys = torch.stack(keys)
    keys.clear()  # a long text's rows are held once, not twice
    new_values = torch.stack(values)
    values.clear()
    final = rms_norm(hidden, weights.final_norm, config.stream_eps)
    return _Layers(final, new_keys, new_values, mass)


def _region(attention: Attention) -> Any:
    """``decoder_layer`` with this attention as one region, compiled once and stamped out for every
    layer. The compiler recognises the repetition only where all that goes in and out is a plain
    tensor or number. Of weights in blocks no two layers are alike: they are not for compiling.
    """

    def layer(
        eps: float,
        head_eps: float,
        score_divisor: float,
        inputs: Sequence[Tensor],
        weights: LayerWeights,
    ) -> tuple[Tensor | None, ...]:
        hidden, cos, sin, cached, new, live, keys, values = inputs
        reading = decoder_layer(
            hidden,
            weights,
            keys,
            values,
            cos,
            sin,
            Visibility(cached, new, live),
            eps,
            attention,
            head_eps=head_eps,
            score_divisor=score_divisor,
        )
        return tuple(reading)

    @torch.compiler.nested_compile_region
    def region(
        qkv_bias: bool,
        qk_norm: bool,
        eps: float,
        head_eps: float,
        score_divisor: float,
        *tensors: Tensor,
    ) -> tuple[Tensor | None, ...]:
        weights = LayerWeights.from_tensors(tensors[8:], qkv_bias=qkv_bias, qk_norm=qk_norm)
        return layer(eps, head_eps, score_divisor, tensors[:8], weights)

    def either(
        eps: float, head_eps: float, score_divisor: float, *inputs: Tensor, weights: LayerWeights
    ) -> tuple[Tensor | None, ...]:
        if isinstance(weights.qkv, Blocks):
            return layer(eps, head_eps, score_divisor, inputs, weights)
        given = (weights.qkv_bias is not None, weights.qk_gain is not None)
        numbers = (eps, head_eps, score_divisor)
        return region(*given, *numbers, *inputs, *weights.tensors())  # type: ignore[no-any-return]

    return either


_layer, _layer_per_query, _causal_layer = map(_region, (attend, attend_per_query, attend_causally))
