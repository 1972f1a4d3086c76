"""Several ticks in one pass, against the same ticks one by one."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from compiled.choose import UNFORCED, Eviction, Forced, Look, choose
from compiled.lookup import Proposal
from compiled.patch import patch
from compiled.philox import key_of
from compiled.read import AheadReading, read, read_ahead
from compiled.sample import Sampling, SamplingMethod, candidates, penalize, seen_tokens
from compiled.score import Brightness, Culling, Novelty
from compiled.speculate import Accepted, choose_ahead
from compiled.state import Cursor, State
from toys import digest, toy_config, toy_cursor, toy_state, toy_weights

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = toy_config()
WEIGHTS = toy_weights(CONFIG)
WIDTH = 5
CAPACITY = 20
METHODS = {
    "greedy": SamplingMethod(greedy=True),
    "sampled": SamplingMethod(top_k=9),
    "whole": SamplingMethod(top_k=0, nucleus=False),
}


def sampling(seed: int = 3, penalty: float = 1.3) -> Sampling:
    t, p, m, r = (torch.tensor(n) for n in (0.9, 0.95, 0.0, penalty))
    return Sampling(t, p, m, r, key_of(seed))


def keep_score(state: State, look: Look) -> Tensor:
    return state.brightness


CONDUCT = Eviction(
    Brightness(decay=0.9, seeds=(9.0, 8.0, 7.0, 6.0, 5.0)),
    Novelty(decay=0.75),
    Culling(target=CAPACITY, sinks=1, recent=2),
    keep_score,
)


def situation() -> tuple[State, Cursor]:
    """Nine rows with a hole among slots and positions; the cursor's token has none yet."""
    rows = {0: 4, 1: 0, 3: 2, 4: 1, 5: 9, 6: 7, 7: 8, 8: 5, 11: 3}
    state = toy_state(CONFIG, CAPACITY, rows)
    cursor = toy_cursor(10, token=17)
    cursor.uncommitted.fill_(1)
    cursor.tick.fill_(41)
    cursor.source.fill_(3)
    cursor.surprise.fill_(1.25)
    cursor.novelty.fill_(2.5)
    return state, cursor


def copied(state: State, cursor: Cursor) -> tuple[State, Cursor]:
    return State(*(t.clone() for t in state)), Cursor(*(t.clone() for t in cursor))


def forced(tokens: list[int]) -> Forced:
    return Forced(torch.tensor(tokens), torch.full((len(tokens),), 2, dtype=torch.uint8))


def one_by_one(
    state: State, cursor: Cursor, ticks: int, **how: Any
) -> tuple[list[int], list[float]]:
    """Plain ticks, in place; their tokens and surprises."""
    tokens, nats = [], []
    one = torch.tensor(1)
    for _ in range(ticks):
        reading = read(CONFIG, WEIGHTS, state, cursor.token, cursor.position, one, bucket=CAPACITY)
        choice = choose(state, cursor, reading, sampling(), forced([UNFORCED]), **how)
        patch(state, cursor, choice.plan(reading))
        tokens.append(int(choice.token))
        nats.append(float(choice.surprise))
    return tokens, nats


def ahead(
    state: State,
    cursor: Cursor,
    proposed: list[int],
    *,
    told: list[int] | None = None,
    bucket: int = CAPACITY,
    **how: Any,
) -> tuple[Accepted, AheadReading]:
    padding = [0] * (WIDTH - 1 - len(proposed))
    proposal = Proposal(torch.tensor([*proposed, *padding]), torch.tensor(len(proposed)))
    reading = read_ahead(CONFIG, WEIGHTS, state, cursor, *proposal, bucket=bucket)
    told = told or []
    taken = forced([*told, *[UNFORCED] * (WIDTH - len(told))])
    return choose_ahead(state, cursor, proposal, reading, sampling(), taken, **how), reading


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrong", range(WIDTH))
@pytest.mark.parametrize("short", [False, True])
def test_as_many_ticks_come_true_as_were_foretold(method: str, wrong: int, short: bool) -> None:
    """Token ``wrong`` of the proposal is another one, or is missing: it is still said."""
    how: dict[str, Any] = {"method": METHODS[method], "eviction": CONDUCT}
    state, cursor = situation()
    plain = copied(state, cursor)
    tokens, nats = one_by_one(*plain, wrong + 1, **how)
    proposed = tokens[:wrong]
    if not short:
        beside = one_by_one(*copied(*plain), WIDTH, **how)[0]
        last = 39 - int(tokens[-1] == 39)  # never what will be said
        proposed = [*proposed, last, *beside][: WIDTH - 1]
    before = digest(*state, *cursor)
    said, reading = ahead(state, cursor, proposed, **how)
    assert digest(*state, *cursor) == before
    assert int(said.number) == wrong + 1
    assert said.tokens[: wrong + 1].tolist() == tokens
    # The same sums in float32, of other shapes: some dozen roundings of numbers below 10.
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(said.surprise[: wrong + 1], torch.tensor(nats), **close)
    patch(state, cursor, said.plan(reading))
    for name, mine, other in zip(State._fields, state, plain[0], strict=True):
        if mine.is_floating_point():
            torch.testing.assert_close(mine, other, **close, msg=name)
        else:
            assert torch.equal(mine, other), name
    for name, mine, other in zip(Cursor._fields, cursor, plain[1], strict=True):
        if mine.is_floating_point():
            torch.testing.assert_close(mine, other, **close, msg=name)
        else:
            assert torch.equal(mine, other), name


def test_a_passage_that_is_told_again_is_the_same_to_the_bit() -> None:
    """Whatever else had been proposed when it was said."""
    how: dict[str, Any] = {"method": METHODS["sampled"], "eviction": CONDUCT}
    state, cursor = situation()
    tokens = one_by_one(*copied(state, cursor), WIDTH, **how)[0]
    said, reading = ahead(state, cursor, [*tokens[:2], 39, 38], **how)
    number = int(said.number)
    spoken = said.tokens[:number].tolist()
    assert number == 3
    again, reading_again = ahead(state, cursor, spoken[:-1], told=spoken, **how)
    first, second = copied(state, cursor), copied(state, cursor)
    patch(*first, said.plan(reading))
    patch(*second, again.plan(reading_again))
    assert digest(*first[0], *first[1]) == digest(*second[0], *second[1])
    # What is told need not be what would be drawn.
    other = [(token + 1) % 40 for token in spoken]
    changed, _ = ahead(state, cursor, other[:-1], told=other, **how)
    assert int(changed.number) == 3
    assert changed.tokens[:3].tolist() == other


@pytest.mark.parametrize("row", range(WIDTH))
def test_a_pass_ends_before_what_is_not_finite(row: int) -> None:
    how: dict[str, Any] = {"method": METHODS["sampled"], "eviction": CONDUCT}
    state, cursor = situation()
    tokens = one_by_one(*copied(state, cursor), WIDTH, **how)[0]
    proposal = Proposal(torch.tensor(tokens[:-1]), torch.tensor(WIDTH - 1))
    sound = read_ahead(CONFIG, WEIGHTS, state, cursor, *proposal, bucket=CAPACITY)
    for name in ("new_keys", "new_values", "logits"):
        damaged = getattr(sound, name).clone()
        (damaged if name == "logits" else damaged.movedim(2, 0))[row] = float("nan")
        reading = sound._replace(**{name: damaged})
        unforced = forced([UNFORCED] * WIDTH)
        said = choose_ahead(state, cursor, proposal, reading, sampling(), unforced, **how)
        assert (int(said.not_finite) != 0) == (row == 0)
        assert said.tokens[:row].tolist() == tokens[:row]
        mine, plain = copied(state, cursor), copied(state, cursor)
        patch(*mine, said.plan(reading))
        if row == 0:
            assert digest(*mine[0], *mine[1]) == digest(*state, *cursor)
        else:
            assert int(said.number) == row
            one_by_one(*plain, row, **how)
            assert torch.equal(mine[0].valid, plain[0].valid)
            assert mine[0].keys.isfinite().all()
            assert mine[0].values.isfinite().all()


@pytest.mark.parametrize("bucket", [12, CAPACITY])
@pytest.mark.parametrize("length", range(WIDTH))
def test_I8_reading_ahead_is_reading_with_the_attention_of_each_token(
    length: int, bucket: int
) -> None:
    state, cursor = situation()
    proposed = torch.tensor([3, 30, 3, 21])
    before = digest(*state, *cursor)
    apart = read_ahead(
        CONFIG, WEIGHTS, state, cursor, proposed, torch.tensor(length), bucket=bucket
    )
    tokens, positions = torch.cat([cursor.token, proposed]), 10 + torch.arange(WIDTH)
    together = read(
        CONFIG, WEIGHTS, state, tokens, positions, torch.tensor(length + 1), bucket=bucket
    )
    assert digest(*state, *cursor) == before
    live = slice(0, length + 1)
    close: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(apart.logits[live], together.logits[live], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(apart.new_keys[:, :, live], together.new_keys[:, :, live], **close)
    torch.testing.assert_close(apart.mass[live].sum(0), together.mass, **close)
    torch.testing.assert_close(apart.own_mass[live].sum(0), together.own_mass, **close)
    whole = apart.mass[live].sum(1) + apart.own_mass[live].sum(1)
    torch.testing.assert_close(whole, torch.ones(length + 1), **close)
    assert not apart.own_mass[live].triu(1).any()
    assert not apart.mass[:, ~state.valid].any()


def test_what_is_said_is_distributed_as_what_is_sampled() -> None:
    """Of the second token, whether or not the first was the one proposed: chi-square against the
    probabilities that plain sampling has there.
    """
    method = SamplingMethod(top_k=6, nucleus=False)
    state, cursor = situation()
    draws = sampling(penalty=1.1)._replace(temperature=torch.tensor(1.5))
    logits = read(
        CONFIG, WEIGHTS, state, cursor.token, cursor.position, torch.tensor(1), bucket=CAPACITY
    ).logits[0]
    seen = seen_tokens(40, state.token_id, state.valid, cursor.token)
    scores, ids = candidates(penalize(logits, seen, draws.repetition_penalty), method, draws)
    first = int(ids[0])
    proposal = Proposal(torch.tensor([first]), torch.tensor(1))
    reading = read_ahead(CONFIG, WEIGHTS, state, cursor, *proposal, bucket=CAPACITY)
    seen_after = seen | (torch.arange(40) == first)
    penalised = penalize(reading.logits[1], seen_after, draws.repetition_penalty)
    later_scores, later_ids = candidates(penalised, method, draws)

    unbiased = dataclasses.replace(CONDUCT, culling=Culling(target=0))
    firsts, seconds = torch.zeros(40), torch.zeros(40)
    for tick in range(0, 2000, 2):  # no draw is made twice
        cursor.tick.fill_(tick)
        unforced = forced([UNFORCED] * 2)
        said = choose_ahead(
            state, cursor, proposal, reading, draws, unforced, method=method, eviction=unbiased
        )
        firsts[said.tokens[0]] += 1
        if said.number == 2:
            seconds[said.tokens[1]] += 1
    assert seconds.sum() == firsts[first]
    for counts, told, which in ((firsts, scores, ids), (seconds, later_scores, later_ids)):
        expected = torch.zeros(40).index_copy(0, which, torch.softmax(told, 0)) * counts.sum()
        assert not counts[expected == 0].any()
        possible = expected > 0
        assert float(expected[possible].min()) > 5
        chi_square = ((counts - expected)[possible].square() / expected[possible]).sum()
        # Five degrees of freedom: above 25 once in ten thousand.
        assert float(chi_square) < 25, (counts, expected)
