"""Many memories in step are the same memories one by one."""

import operator

import pytest
import torch

from compiled import torch_private
from compiled.batched import (
    Memories,
    advance,
    allocate_memories,
    last_logits,
    weights_for_many,
)
from compiled.choose import Eviction, Spoken, follow
from compiled.llama import Weights
from compiled.patch import patch
from compiled.read import read
from compiled.sample import surprises
from compiled.score import Brightness, Culling, Novelty
from compiled.state import Cursor, State
from toys import CPU, digest, toy_config, toy_cursor, toy_state, toy_weights

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]

CONFIG = toy_config()
WEIGHTS = toy_weights(CONFIG)
CONDUCT = Eviction(
    Brightness(seeds=(1.0, 2.0)),
    Novelty(),
    Culling(target=6, sinks=1, recent=2),
    lambda state, reading: state.brightness,
)
STREAMS, CAPACITY, TICKS = 3, 6, 15
ONE = torch.tensor(1)


def test_every_stream_is_what_it_would_be_alone() -> None:
    texts = torch.randint(0, 40, (STREAMS, TICKS), generator=torch.Generator().manual_seed(0))
    many = allocate_memories(STREAMS, CONFIG, CAPACITY, torch.float32, CPU)
    many.cursor.token.copy_(texts[:, :1])
    many.cursor.position.zero_()
    many.cursor.uncommitted.fill_(1)
    nats = [
        advance(CONFIG, WEIGHTS, many, texts[:, tick], CONDUCT, 1, bucket=CAPACITY)
        for tick in range(1, TICKS)
    ]
    for stream in range(STREAMS):
        state, cursor = toy_state(CONFIG, CAPACITY, {}), toy_cursor(0, int(texts[stream, 0]))
        cursor.uncommitted.fill_(1)
        told = []
        for tick in range(1, TICKS):
            reading = read(
                CONFIG, WEIGHTS, state, cursor.token, cursor.position, ONE, bucket=CAPACITY
            )
            token = texts[stream, tick : tick + 1]
            spoken = Spoken(
                token,
                torch.ones(1, dtype=torch.uint8),
                surprises(reading.logits, token),
                reading.logits,
            )
            choice = follow(state, cursor, reading, spoken, CONDUCT)
            patch(state, cursor, choice.plan(reading))
            told.append(float(choice.surprise))
        # The same sums in another order: see test_read.
        torch.testing.assert_close(
            torch.stack(nats)[:, stream], torch.tensor(told), rtol=1e-4, atol=5e-5
        )
        for name in ("valid", "token_id", "position", "source", "born"):
            mine, alone = getattr(many.state, name)[stream], getattr(state, name)
            assert torch.equal(mine[state.valid], alone[state.valid]), name
        for name in ("keys", "values"):
            mine, alone = getattr(many.state, name)[stream], getattr(state, name)
            torch.testing.assert_close(
                mine[:, :, state.valid], alone[:, :, state.valid], rtol=1e-4, atol=5e-5
            )


def test_asking_is_a_read_of_every_stream_and_writes_nothing() -> None:
    states = [toy_state(CONFIG, CAPACITY, {0: 0, 2: 5, 3: 1}, seed=seed) for seed in range(STREAMS)]
    stacked = State(*(torch.stack(columns) for columns in zip(*states, strict=True)))
    many = Memories(stacked, Cursor(*(t.expand(STREAMS, *t.shape) for t in toy_cursor())))
    before = digest(*many.state)
    tokens = torch.tensor([[3, 4, 5], [6, 7, 0], [8, 0, 0]])
    positions = torch.arange(6, 9).expand(STREAMS, -1)
    lengths = torch.tensor([3, 2, 1])
    told = last_logits(CONFIG, WEIGHTS, many.state, tokens, positions, lengths, bucket=CAPACITY)
    for stream, state in enumerate(states):
        alone = read(
            CONFIG,
            WEIGHTS,
            state,
            tokens[stream],
            positions[stream],
            lengths[stream],
            bucket=CAPACITY,
        )
        expected = alone.logits[lengths[stream] - 1]
        torch.testing.assert_close(told[stream], expected, rtol=1e-4, atol=5e-5)
    assert digest(*many.state) == before


def test_a_layer_of_all_streams_lies_in_one_piece() -> None:
    """Or every read would copy it to multiply it."""
    many = allocate_memories(STREAMS, CONFIG, CAPACITY, torch.float32, CPU)
    for cache in (many.state.keys, many.state.values):
        assert cache.shape[:2] == (STREAMS, CONFIG.num_layers)
        assert cache[:, 0].is_contiguous()


def test_weights_are_widened_once_where_products_go_by_way_of_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    narrow = {name: field.bfloat16() for name, field in WEIGHTS._asdict().items()}
    weights = Weights(**narrow | {"inverse_frequencies": WEIGHTS.inverse_frequencies})
    monkeypatch.setattr(torch_private, "multiplies_in", lambda dtype: True)
    assert all(map(operator.is_, weights_for_many(weights), weights))
    monkeypatch.setattr(torch_private, "multiplies_in", lambda dtype: False)
    many = weights_for_many(weights)
    assert many.dtype == torch.bfloat16
    for name in ("qkv", "attention_out", "gate_up", "down", "head"):
        assert torch.equal(getattr(many, name), getattr(weights, name).float())
    state = toy_state(CONFIG, CAPACITY, {0: 0, 2: 5})
    state = state._replace(keys=state.keys.bfloat16(), values=state.values.bfloat16())
    tokens, positions, length = torch.tensor([3, 4]), torch.tensor([6, 7]), torch.tensor(2)
    (told,) = last_logits(
        CONFIG,
        many,
        State(*(column[None] for column in state)),
        tokens[None],
        positions[None],
        length[None],
        bucket=CAPACITY,
    )
    alone = read(CONFIG, weights, state, tokens, positions, length, bucket=CAPACITY).logits[1]
    # Sums of bfloat16 numbers are rounded to 2^-9 of logits of order 1, a few times in a row.
    torch.testing.assert_close(told, alone, rtol=2**-5, atol=2**-5)
