"""The operator that draws on a CPU, beside its twin in PyTorch."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from brain.machine.cpu_operator import native_libraries
from compiled.draw_cpu import Draw, Drawn, operator
from compiled.philox import uniform
from compiled.read_cpu import Formats
from compiled.sample import (
    Sampling,
    SamplingMethod,
    candidates,
    penalize,
    sample,
    seen_tokens,
    surprises,
)
from compiled.state import State
from toys import sampling_of, toy_config, toy_state

CAPACITY = 12


@pytest.fixture(scope="module")
def drawing() -> Draw:
    return operator(native_libraries(Formats("float", "float")).draw)


def remembering(vocab: int, seed: int) -> State:
    """A memory in which every other slot has a row."""
    state = toy_state(toy_config(), CAPACITY, {slot: slot for slot in range(0, CAPACITY, 2)})
    ids = torch.randint(0, vocab, (CAPACITY,), generator=torch.Generator().manual_seed(seed))
    return state._replace(token_id=ids)


def seen_by(state: State, tokens: Tensor, vocab: int) -> Tensor:
    """[T, vocab]: what is remembered, or stands before each row."""
    rows = [seen_tokens(vocab, state.token_id, state.valid, tokens[:1])]
    for token in tokens[1:]:
        rows.append(rows[-1] | (torch.arange(vocab) == token))
    return torch.stack(rows)


def unforced(rows: int) -> Tensor:
    return torch.full((rows,), -1)


def is_close_call(
    logits: Tensor, seen: Tensor, tick: Tensor, method: SamplingMethod, sampling: Sampling
) -> bool:
    """Whether rounding decides: two candidates within a few units in the last place, or one at the
    edge of a filter.
    """
    penalised = penalize(logits, seen, sampling.repetition_penalty)
    if method.greedy:
        best = penalised.topk(2).values
        return bool(best[0] - best[1] < 1e-5)
    scores, ids = candidates(penalised, method, sampling)
    noise = -torch.log(-torch.log(uniform(sampling.key, tick, ids)))
    best = (scores.double() + noise).topk(min(2, len(ids))).values
    probabilities = (penalised / sampling.temperature).softmax(-1).sort(descending=True).values
    before = probabilities.cumsum(-1) - probabilities
    edges = (before - sampling.top_p, probabilities / probabilities[0] - sampling.min_p)
    at_an_edge = any(bool((edge.abs() < 1e-5).any()) for edge in edges)
    return at_an_edge or (len(best) > 1 and bool(best[0] - best[1] < 1e-5))


@settings(max_examples=200)
@given(
    vocab=st.sampled_from([1, 7, 64, 65, 700]),
    rows=st.integers(1, 3),
    greedy=st.booleans(),
    top_k=st.sampled_from([0, 1, 5, 64, 1000]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_p=st.sampled_from([0.2, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    penalty=st.sampled_from([0.5, 1.0, 1.3]),
    tick=st.integers(0, 1 << 40),
    seed=st.integers(0, 1 << 64),
)
def test_it_draws_what_its_twin_draws(
    drawing: Draw,
    vocab: int,
    rows: int,
    greedy: bool,
    top_k: int,
    temperature: float,
    top_p: float,
    min_p: float,
    penalty: float,
    tick: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed % (1 << 63))
    logits = 3 * torch.randn(rows, vocab, generator=generator)
    tokens = torch.randint(0, vocab, (rows,), generator=generator)
    state, at = remembering(vocab, seed % 1000), torch.tensor(tick)
    method = SamplingMethod(greedy, top_k, nucleus=top_p < 1)
    sampling = sampling_of(temperature, top_p, min_p, penalty, seed)
    seen = seen_by(state, tokens, vocab)
    ticks = at + torch.arange(rows)[:, None]
    expected = sample(logits, seen, ticks, method, sampling)[:, 0]
    for i in range(rows):
        assume(vocab == 1 or not is_close_call(logits[i], seen[i], ticks[i], method, sampling))
    told = drawing(logits, state, tokens, at, unforced(rows), method, sampling)
    assert told.token.tolist() == expected.tolist()
    assert_measured(told, logits)


def assert_measured(told: Drawn, logits: Tensor) -> None:
    """The surprise of what was drawn, and the extremes. Of vocabularies of hundreds float32 sums
    differ in their last bits.
    """
    torch.testing.assert_close(
        told.surprise, surprises(logits, told.token), rtol=1e-5, atol=2e-6, equal_nan=True
    )
    extremes = torch.stack([logits.amin(-1), logits.amax(-1)], -1)
    assert torch.equal(told.extremes, extremes)


def test_what_is_forced_is_taken_and_measured(drawing: Draw) -> None:
    logits = torch.randn(3, 50)
    state, zeros = remembering(50, 0), torch.zeros(3, dtype=torch.int64)
    method, sampling = SamplingMethod(greedy=True), sampling_of()
    told = drawing(
        logits, state, zeros, torch.tensor(5), torch.tensor([7, -1, 0]), method, sampling
    )
    seen = seen_by(state, zeros, 50)
    likeliest = penalize(logits, seen, sampling.repetition_penalty).argmax(-1)
    assert told.token.tolist() == [7, int(likeliest[1]), 0]
    assert_measured(told, logits)


def drawn(drawing: Draw, logits: Tensor, method: SamplingMethod) -> Drawn:
    """What the operator makes of some rows behind a memory of 50 tokens."""
    rows = len(logits)
    return drawing(
        logits,
        remembering(50, 0),
        torch.zeros(rows, dtype=torch.int64),
        torch.tensor(5),
        unforced(rows),
        method,
        sampling_of(top_p=0.9),
    )


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("greedy", [True, False])
def test_what_is_not_finite_is_told(drawing: Draw, wrong: float, top_k: int, greedy: bool) -> None:
    logits = torch.randn(2, 50)
    logits[1, 17] = wrong
    told = drawn(drawing, logits, SamplingMethod(greedy, top_k, nucleus=True))
    assert told.extremes.isfinite().all(1).tolist() == [True, False]
    assert ((told.token >= 0) & (told.token < 50)).all()


@pytest.mark.parametrize("top_k", [0, 5])
def test_a_row_of_nothing_but_nan_draws_a_token(drawing: Draw, top_k: int) -> None:
    told = drawn(drawing, torch.full((1, 50), math.nan), SamplingMethod(top_k=top_k))
    assert told.token.tolist() == [0]
    assert told.surprise.isnan().all()


def test_an_operator_that_pytorch_may_compile(drawing: Draw) -> None:
    """Schema, fake results and aliasing are what they are declared to be."""
    state = remembering(50, 0)
    library = native_libraries(Formats("float", "float")).draw
    qualified = getattr(torch.ops.positronic_brain, library.stem.replace("-", "_")).default
    read = [state.token_id, state.valid, torch.tensor([3]), torch.tensor(2)]
    called = (torch.randn(1, 50), read, list(sampling_of()), unforced(1), False, 5, True)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(qualified, called, test_utils=tests)
