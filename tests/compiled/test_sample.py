"""The sampler: its filters against transformers', its draw against the reference distribution."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from compiled.sample import (
    HEAD_BLOCK,
    Sampling,
    SamplingMethod,
    candidates,
    head_surprises,
    penalize,
    penalize_some,
    sample,
    seen_tokens,
    surprises,
)
from toys import sampling_of

pytestmark = pytest.mark.usefixtures("one_thread")


def method_of(top_k: int = 0, top_p: float = 1.0) -> SamplingMethod:
    return SamplingMethod(top_k=top_k, nucleus=top_p < 1.0)


def reference(
    logits: Tensor,
    *,
    seen: list[int] | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Tensor:
    """What transformers' ``generate`` samples from, -inf where filtered: [vocab]."""
    processors = LogitsProcessorList()
    if repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if temperature != 1.0:
        processors.append(TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        processors.append(TopPLogitsWarper(top_p))
    if min_p:
        processors.append(MinPLogitsWarper(min_p))
    ids: Any = torch.tensor([seen or []], dtype=torch.int64)
    scores: Any = logits[None].clone()
    filtered: Tensor = processors(ids, scores)
    return filtered[0]


def ours(logits: Tensor, *, seen: list[int] | None = None, **options: Any) -> Tensor:
    """The same from our candidates: [vocab]."""
    top_k = options.pop("top_k", 0)
    sampling = sampling_of(**options)
    marked = torch.zeros(len(logits), dtype=torch.bool)
    marked[seen or []] = True
    penalised = penalize(logits, marked, sampling.repetition_penalty)
    scores, ids = candidates(penalised, method_of(top_k, options.get("top_p", 1.0)), sampling)
    return torch.full_like(logits, -math.inf).scatter(0, ids, scores)


def assert_same_candidates(logits: Tensor, **options: Any) -> None:
    # Both divide float32 by the same number: one rounding, 2^-24.
    torch.testing.assert_close(
        ours(logits, **options), reference(logits, **options), rtol=1e-6, atol=1e-6
    )


@st.composite
def distinct_logits(draw: st.DrawFn) -> Tensor:
    """Logits no two of which are equal, so that no filter has to break a tie."""
    steps = draw(st.lists(st.integers(-4000, 4000), min_size=2, max_size=40, unique=True))
    return torch.tensor(steps, dtype=torch.float32) / 250


def clear_of_top_p(logits: Tensor, top_p: float, top_k: int, temperature: float) -> bool:
    """Whether rounding cannot decide which side of top-p a token falls on."""
    scores = reference(logits, top_k=top_k, temperature=temperature).double()
    cumulative = scores.softmax(0).sort(descending=True).values.cumsum(0)
    return bool(((cumulative - top_p).abs() > 1e-5).all())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 49},
        {"top_k": 50},  # the whole vocabulary
        {"top_k": 500},
        {"top_p": 0.5},
        {"top_p": 0.999},
        {"top_p": 1e-6},  # the likeliest alone
        {"min_p": 0.1},
        {"min_p": 1.0},  # the likeliest alone
        {"repetition_penalty": 1.3, "seen": [0, 3, 3, 49]},
        {"repetition_penalty": 0.7, "seen": [0, 3, 3, 49]},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 2.0, "top_p": 0.7, "min_p": 0.3, "repetition_penalty": 1.1, "seen": [1]},
    ],
    ids=str,
)
def test_each_filter_keeps_what_transformers_keeps(options: dict[str, Any]) -> None:
    logits = 2 * torch.randn(50, generator=torch.Generator().manual_seed(3))
    assert_same_candidates(logits, **options)


@given(
    distinct_logits(),
    st.floats(0.05, 5.0),
    st.integers(0, 50),
    st.floats(0.01, 0.99),
    st.sampled_from([0.0, 0.03, 0.11, 0.53]),
    st.sampled_from([1.0, 0.6, 1.4]),
    st.data(),
)
def test_filters_combine_in_the_order_of_transformers(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    data: st.DataObject,
) -> None:
    seen = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=5))
    penalised = reference(logits, seen=seen, repetition_penalty=penalty)
    assume(len(set(penalised.tolist())) == len(penalised))
    assume(clear_of_top_p(penalised, top_p, top_k, temperature))
    probability = reference(penalised, temperature=temperature).double().softmax(0)
    assume(bool(((probability / probability.max() - min_p).abs() > 1e-5).all()))
    assert_same_candidates(
        logits,
        seen=seen,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
    )


def test_top_k_keeps_exactly_k_of_equal_logits() -> None:
    scores, ids = candidates(torch.zeros(9), method_of(4), sampling_of())
    assert len(set(ids.tolist())) == 4
    assert torch.isfinite(scores).all()


def test_top_p_0_would_still_leave_one_token() -> None:
    logits = torch.tensor([0.0, 1.0, 0.5])
    kept = ours(logits, top_p=1e-30)
    assert torch.isfinite(kept).tolist() == [False, True, False]


def test_penalising_by_id_is_penalising_what_was_seen() -> None:
    logits = torch.randn(40)
    ids = torch.tensor([3, 3, 17, 39, 0, 17])
    seen = torch.zeros(40, dtype=torch.bool).index_fill(0, ids, True)
    penalty = torch.tensor(1.3)
    assert torch.equal(penalize_some(logits, ids, penalty), penalize(logits, seen, penalty))


def test_seen_tokens_are_the_remembered_and_the_one_being_read() -> None:
    token_id = torch.tensor([4, 2, -1, 7, 2])
    valid = torch.tensor([True, True, False, False, False])
    seen = seen_tokens(9, token_id, valid, torch.tensor([8]))
    assert torch.nonzero(seen)[:, 0].tolist() == [2, 4, 8]
    nothing = seen_tokens(9, token_id, torch.zeros(5, dtype=torch.bool), torch.tensor([0]))
    assert torch.nonzero(nothing)[:, 0].tolist() == [0]


# The draw ------------------------------------------------------------------------------------


def draws(logits: Tensor, method: SamplingMethod, sampling: Sampling, ticks: Tensor) -> Tensor:
    """The token of every tick: [len(ticks)]."""
    seen = torch.zeros(len(logits), dtype=torch.bool)

    def one(tick: Tensor) -> Tensor:
        return sample(logits, seen, tick, method, sampling)[0]

    vectorised: Callable[[Tensor], Tensor] = torch.vmap(one)
    return vectorised(ticks)


def p_value(counts: Tensor, probabilities: Tensor) -> float:
    """Of Pearson's chi-square test. Every expected count must be large."""
    expected = probabilities.double() * counts.sum()
    assert float(expected.min()) > 10
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2.0), statistic / 2))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 10, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_draws_follow_the_reference_distribution(options: dict[str, Any]) -> None:
    """P > 1e-4 on a fixed seed: a right sampler would pass with 9,999 seeds of 10,000."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1))
    probabilities = reference(logits, **options).softmax(0)
    plain = dict(options)
    method = method_of(plain.pop("top_k", 0), plain.get("top_p", 1.0))
    drawn = draws(logits, method, sampling_of(**plain), torch.arange(50_000))
    counts = torch.bincount(drawn, minlength=12)
    possible = probabilities > 0
    assert (counts[~possible] == 0).all()
    assert p_value(counts[possible], probabilities[possible]) > 1e-4
    if possible.sum() > 2:  # the check can fail: a slightly flatter distribution is told apart
        flatter = (reference(logits, **options) * 0.8).softmax(0)
        assert p_value(counts[possible], flatter[possible]) < 1e-4


def test_draws_of_many_ticks_at_once_are_those_of_one_at_a_time() -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1))
    method, sampling = SamplingMethod(top_k=8), sampling_of(top_p=0.9, seed=5)
    seen = torch.zeros(12, dtype=torch.bool)
    alone = [int(sample(logits, seen, torch.tensor(t), method, sampling)) for t in range(200)]
    assert draws(logits, method, sampling, torch.arange(200)).tolist() == alone


def test_same_seed_and_tick_same_token() -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(2))
    method, ticks = SamplingMethod(), torch.arange(300)
    first, again, other, high = (
        draws(logits, method, sampling_of(seed=seed), ticks).tolist()
        for seed in (7, 7, 8, 7 + (1 << 32))
    )
    assert first == again
    assert first != other
    assert first != high
    assert len(set(first)) > 10  # and ticks differ


def test_noise_belongs_to_the_token_id_whatever_the_filters() -> None:
    """Filtering away other tokens never changes the winner, unless it was filtered itself."""
    logits = torch.randn(40, generator=torch.Generator().manual_seed(4))
    ticks = torch.arange(400)
    free = draws(logits, method_of(), sampling_of(), ticks)
    several: list[dict[str, Any]] = [{"top_k": 6}, {"top_p": 0.6}, {"min_p": 0.2}]
    for options in several:
        kept = torch.isfinite(reference(logits, **options))
        plain = dict(options)
        method = method_of(plain.pop("top_k", 0), plain.get("top_p", 1.0))
        filtered = draws(logits, method, sampling_of(**plain), ticks)
        agree = kept[free]
        assert agree.any()
        assert (~agree).any()
        assert torch.equal(filtered[agree], free[agree])


def test_greedy_takes_the_highest_penalised_logit() -> None:
    logits = torch.tensor([1.0, 3.0, 2.9, -5.0])
    seen = torch.tensor([False, True, False, False])
    method = SamplingMethod(greedy=True)
    tick = torch.tensor(0)
    assert sample(logits, seen, tick, method, sampling_of()).tolist() == [1]
    penalised = sampling_of(repetition_penalty=1.1)
    assert sample(logits, seen, tick, method, penalised).tolist() == [2]
    below = torch.tensor([-1.0, -1.05, -9.0, -9.0])  # negative logits are lowered by multiplying
    assert sample(below, torch.tensor([True] + [False] * 3), tick, method, penalised).item() == 1


def test_a_very_low_temperature_draws_the_likeliest() -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(5))
    drawn = draws(logits, method_of(), sampling_of(temperature=1e-4), torch.arange(200))
    assert (drawn == logits.argmax()).all()


@settings(max_examples=60)
@given(
    st.lists(
        st.sampled_from([0.0, 1.5, -2.0, math.inf, -math.inf, math.nan]), min_size=4, max_size=9
    ),
    st.sampled_from([0, 3, 50]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 9),
)
def test_a_broken_model_still_yields_a_token_of_the_vocabulary(
    values: list[float], top_k: int, nucleus: bool, greedy: bool, tick: int
) -> None:
    logits = torch.tensor(values)
    method = SamplingMethod(greedy=greedy, top_k=top_k, nucleus=nucleus)
    sampling = sampling_of(top_p=0.9 if nucleus else 1.0, min_p=0.1, repetition_penalty=1.1)
    seen = torch.zeros(len(values), dtype=torch.bool)
    token = int(sample(logits, seen, torch.tensor(tick), method, sampling))
    assert 0 <= token < len(values)
    sound = not any(math.isnan(value) or value == math.inf for value in values)
    if sound and max(values) > -math.inf:
        assert values[token] > -math.inf  # what is ruled out is never drawn


# Surprise ------------------------------------------------------------------------------------


def test_surprises_are_cross_entropies() -> None:
    generator = torch.Generator().manual_seed(6)
    logits = 10 * torch.randn(50, 300, generator=generator)
    targets = torch.randint(0, 300, (50,), generator=generator)
    expected = F.cross_entropy(logits.double(), targets, reduction="none")
    # float32 logits up to 40 are resolved to 40 * 2^-24 = 2.4e-6.
    torch.testing.assert_close(surprises(logits, targets).double(), expected, rtol=1e-6, atol=1e-5)


def test_surprises_of_certain_and_huge_logits() -> None:
    logits = torch.tensor([[1000.0, 0.0], [1000.0, 0.0], [-1e30, 1e30]])
    told = surprises(logits, torch.tensor([0, 1, 1]))
    assert told.tolist() == [0.0, 1000.0, 0.0]


@pytest.mark.parametrize("vocab", [1, HEAD_BLOCK - 1, HEAD_BLOCK, 2 * HEAD_BLOCK + 7])
def test_surprises_without_logits_are_the_same(vocab: int) -> None:
    """Targets in every block, at both of its edges; the last block is a part of one."""
    generator = torch.Generator().manual_seed(7)
    final = torch.randn(60, 16, generator=generator)
    head = 3 * torch.randn(vocab, 16, generator=generator)
    targets = torch.randint(0, vocab, (60,), generator=generator)
    targets[:4] = torch.tensor([0, HEAD_BLOCK - 1, HEAD_BLOCK, vocab - 1]).clamp(max=vocab - 1)
    expected = F.cross_entropy(final.double() @ head.double().T, targets, reduction="none")
    # Products of 16 terms: logits up to 60, each resolved to 60 * 2^-24 = 3.6e-6 after roundings.
    told = head_surprises(final, head, targets)
    torch.testing.assert_close(told.double(), expected, rtol=1e-5, atol=5e-5)


def test_draw_is_repeatable_across_calls_without_hidden_state() -> None:
    logits = torch.randn(20, generator=torch.Generator().manual_seed(8))
    run = functools.partial(
        sample,
        logits,
        torch.zeros(20, dtype=torch.bool),
        torch.tensor(3),
        SamplingMethod(),
        sampling_of(seed=1),
    )
    first = run()
    torch.manual_seed(0)
    torch.rand(100)  # the global generator plays no part
    assert torch.equal(run(), first)
