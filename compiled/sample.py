"""The next token, as a tensor function: no host sync, no generator state.

The filters follow Hugging Face transformers' logits processors, in its order: repetition penalty
(Keskar et al. 2019), temperature, top-k (Fan et al. 2018), top-p (Holtzman et al. 2020), min-p
(Nguyen et al. 2024). The draw is Gumbel-max: the largest of log-probability plus Gumbel noise,
the noise of a token being a function of (seed, tick, token id) alone.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from compiled.linear import linear
from compiled.matrix import Matrix, num_rows, part
from compiled.philox import uniform

HEAD_BLOCK = 512
"""Rows of the head that are multiplied at a time where no logits are kept: the block of logits
stays small enough for the cache, the product large enough to run at full speed.
"""


@dataclass(frozen=True)
class SamplingMethod:
    """What shapes the sampling graph. Everything else about sampling is a plain input.

    ``top_k`` 0 means the whole vocabulary; ``nucleus`` says whether ``top_p`` is applied.
    """

    greedy: bool = False
    top_k: int = 50
    nucleus: bool = True


class Sampling(NamedTuple):
    """Settings of the draw. Neutral values: 1, 1, 0, 1."""

    temperature: Tensor  # [] float32, above 0
    top_p: Tensor  # [] float32, in (0, 1]
    min_p: Tensor  # [] float32, in [0, 1]
    repetition_penalty: Tensor  # [] float32, above 0
    key: Tensor  # [2] int64, see philox.key_of


def seen_tokens(vocab_size: int, token_id: Tensor, valid: Tensor, pending: Tensor) -> Tensor:
    """Which tokens are remembered or being read: [vocab] bool.

    ``token_id`` [capacity] int64, ``valid`` [capacity] bool, ``pending`` [T] int64.
    """
    spare = vocab_size  # forgotten rows vote for a token that does not exist
    ids = torch.cat([torch.where(valid, token_id, spare), pending])
    votes = torch.zeros(vocab_size + 1, dtype=torch.bool, device=ids.device)
    return votes.scatter(0, ids, torch.ones_like(ids, dtype=torch.bool))[:vocab_size]


def penalize(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Divides positive and multiplies negative logits of seen tokens by the penalty."""
    return torch.where(seen, _lowered(logits, penalty), logits)


def penalize_some(logits: Tensor, ids: Tensor, penalty: Tensor) -> Tensor:
    """The same of tokens named by their ids [N] int64, which may repeat: of one row of logits."""
    return logits.scatter(-1, ids, _lowered(logits[ids], penalty))


def _lowered(logits: Tensor, penalty: Tensor) -> Tensor:
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def candidates(logits: Tensor, method: SamplingMethod, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens that may be drawn, and their log-probabilities up to a constant.

    Args:
        logits: [..., vocab] float32, penalised.
        method: Which filters there are.
        sampling: Their settings.
    Returns:
        Scores [..., K] float32, -inf where filtered, and ids [..., K] int64. K is ``top_k``, or the
        vocabulary.
    """
    scores = logits / sampling.temperature
    vocab_size = scores.shape[-1]
    if 0 < method.top_k < vocab_size:
        scores, ids = torch.topk(scores, method.top_k)
    elif method.nucleus:
        scores, ids = torch.sort(scores, descending=True, stable=True)
    else:
        ids = torch.arange(vocab_size, device=scores.device).expand_as(scores)
    probabilities = torch.softmax(scores, -1)
    kept = torch.ones_like(scores, dtype=torch.bool)
    if method.nucleus:
        # The smallest set that reaches top_p: a token stays while those before it fall short.
        before = torch.cumsum(probabilities, -1) - probabilities
        kept = before < sampling.top_p
        # min-p is relative to what top-p left, as in the reference; the maximum is the same.
    kept = kept & (probabilities >= sampling.min_p * probabilities.amax(-1, keepdim=True))
    return torch.where(kept, scores, -math.inf), ids


def sample(
    logits: Tensor, seen: Tensor, tick: Tensor, method: SamplingMethod, sampling: Sampling
) -> Tensor:
    """Draws one token; greedy takes the highest penalised logit.

    Args:
        logits: [..., vocab] float32.
        seen: [..., vocab] bool, tokens that the penalty is for.
        tick: [] or [..., 1] int64; with the seed it decides the draw.
        method: Which filters there are.
        sampling: Their settings.
    Returns:
        [..., 1] int64.
    """
    return draw(penalize(logits, seen, sampling.repetition_penalty), tick, method, sampling)


def draw(penalised: Tensor, tick: Tensor, method: SamplingMethod, sampling: Sampling) -> Tensor:
    """The same of penalised logits."""
    if method.greedy:
        return penalised.argmax(-1, keepdim=True)
    scores, ids = candidates(penalised, method, sampling)
    noise = -torch.log(-torch.log(uniform(sampling.key, tick, ids)))
    return ids.gather(-1, (scores.double() + noise).argmax(-1, keepdim=True))


def surprises(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats of one target per row of raw logits.

    ``logits`` [T, vocab] float32, ``targets`` [T] int64 → [T] float32.
    """
    return -torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]


def head_surprises(final: Tensor, head: Matrix, targets: Tensor, divisor: float = 1.0) -> Tensor:
    """The same without logits: they are made block by block and dropped. The normaliser is the
    log-sum-exp of the blocks' log-sum-exps.

    Args:
        final: [T, hidden], what the head takes.
        head: [vocab, hidden].
        targets: [T] int64.
        divisor: What logits are divided by.
    Returns:
        [T] float32, nats.
    """
    normalisers, chosen = [], []
    for first in range(0, num_rows(head), HEAD_BLOCK):
        logits = linear(final, part(head, slice(first, first + HEAD_BLOCK)))  # [T, block]
        if divisor != 1:
            logits = logits.float() / divisor
        # One fused pass; a logit less its log-probability is the log-sum-exp of its row, and most
        # exactly so where both are largest.
        scores = torch.log_softmax(logits, -1, dtype=torch.float32)
        normalisers.append(logits.amax(-1).float() - scores.amax(-1))
        within = targets - first
        inside = (within >= 0) & (within < logits.shape[1])
        at = within.clamp(0, logits.shape[1] - 1)[:, None]
        chosen.append(torch.where(inside, logits.gather(-1, at)[:, 0].float(), 0.0))
    return torch.logsumexp(torch.stack(normalisers), 0) - torch.stack(chosen).sum(0)
