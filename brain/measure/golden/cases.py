"""Which goldens there are: what each of them does, and why."""

from collections.abc import Sequence
from dataclasses import dataclass

from brain.measure.golden.files import MemoryShape
from brain.measure.golden.script import Cull, Feed, Prime, Read, Script

CONTEXT = 862
"""Tokens of the longest context: the length that this project's numerical contract names."""

TEXT = CONTEXT + 16
"""Tokens of the passage that are used."""

WIDE, NARROW = (1, 16, 128), (1, 7)
# A run, every third token of a stretch, single tokens at both ends, and the newest.
GONE = tuple(sorted({1, *range(20, 60), *range(90, 300, 3), 150, 151, 152, 297, 299}))
ROOMY = MemoryShape(capacity=1024, smallest_bucket=1024, widths=(WIDE,))


@dataclass(frozen=True)
class Case:
    """A golden to be made. ``seeded``: of a model that is made of a seed, not the configured one.
    ``full``: rows to keep whole.
    """

    name: str
    description: str
    script: Script
    memory: MemoryShape = ROOMY
    full: int = 1
    seeded: str | None = None


def cases(text: Sequence[int]) -> list[Case]:
    """All goldens. ``text`` are the first tokens of the passage, at least TEXT of them.

    Every one reads at least ``judge.FEW`` tokens, so that averages over them can be judged.
    """
    text = tuple(text)
    return [*_of_the_configured_model(text), *_of_seeded_models()]


def _of_the_configured_model(text: tuple[int, ...]) -> list[Case]:
    context, beyond = text[:CONTEXT], text[CONTEXT:TEXT]
    everything = Read(context, tuple(range(CONTEXT)))
    return [
        Case(
            "full_context",
            f"one read of {CONTEXT} tokens into an empty memory: logits at every position",
            (everything,),
            full=12,
        ),
        Case(
            "chunked_prefill",
            f"a prompt of {CONTEXT} tokens, read in chunks of several widths: the surprise of "
            "every token on arrival, the logits after the last, and after 16 new ones",
            (Prime(context), Read(), Read(beyond, tuple(range(CONTEXT, TEXT)))),
            MemoryShape(1024, 1024, ((1, 128), (1, 100), (1, 431))),
        ),
        Case(
            "token_by_token",
            "96 tokens, one tick each, the logits after every sixth",
            (
                Prime(text[:1]),
                *(
                    step
                    for start in range(1, 96, 6)
                    for step in (Feed(text[start : min(start + 6, 96)]), Read())
                ),
            ),
        ),
        Case(
            "culled_context",
            f"300 tokens, of which {len(GONE)} are then forgotten; each later token sees what is "
            "left, at its original positions; each earlier one had seen everything before it",
            _culled(text),
            full=2,
        ),
        Case(
            "old_position",
            "remembered tokens read again one at a time, at old positions: the logits are those "
            "of the full context there",
            (
                Prime(text[:300]),
                *(Read((text[p],), (p,)) for p in (0, 1, 2, 57, 127, 128, 150, 298, 299)),
                *(Read((text[p],), (p,)) for p in range(200, 208)),
            ),
        ),
        Case(
            "many_at_once",
            "several tokens in one read: new ones, old ones again, others at old positions, "
            "out of order; and the whole of a context again, 64 tokens at a time",
            _many_at_once(text),
        ),
        Case(
            "bucket_edges",
            "contexts that end just before, at and after the end of a bucket, and fill the memory; "
            "of each the logits after the last token, and after four new ones",
            tuple(
                step
                for length in (127, 128, 129, 255, 256)
                for step in (
                    Prime(text[300 : 300 + length]),
                    Read(),
                    Read(text[300 + length : 304 + length], tuple(range(length, length + 4))),
                )
            ),
            MemoryShape(capacity=256, smallest_bucket=128, widths=(WIDE,)),
        ),
    ]


def _culled(text: tuple[int, ...]) -> Script:
    # With the newest row gone, the one before it stands last, and position 299 is given again.
    return (
        Prime(text[:300]),
        Read(),
        Cull(GONE),
        Read(),
        Feed(text[300:320]),
        Read(),
        Read(text[320:328], tuple(range(319, 327))),  # 318 is pending, without a row
        Cull((305, 310, 311)),
        Read(),
        Feed(text[320:323]),
        Read(),
        Read((text[200],), (200,)),
        Read(text[100:102], (100, 101)),
    )


def _many_at_once(text: tuple[int, ...]) -> Script:
    primed = 256
    others = text[400:405]
    return (
        Prime(text[:primed]),
        Read(text[primed : primed + 3], tuple(range(primed, primed + 3))),
        Read(text[primed : primed + 17], tuple(range(primed, primed + 17))),
        Read(text[primed : primed + 2], (primed + 40, primed + 90)),  # a gap before them
        Read(text[100:105], tuple(range(100, 105))),
        Read((text[200], text[5], text[77]), (200, 5, 77)),
        Read(others, tuple(range(100, 105))),
        Read((others[0], text[primed], others[1]), (30, primed, 29)),
        *(
            Read(text[start : start + 64], tuple(range(start, start + 64)))
            for start in range(0, primed, 64)
        ),
    )


def _of_seeded_models() -> list[Case]:
    # Any ids will do for a random model; these are spread over its vocabulary, BOS first.
    ids = (1, *(index * 7919 % 32000 for index in range(1, 300)))
    return [
        Case(
            "tinyllama_dimensions",
            "the exact dimensions of TinyLlama 1.1B with seeded random weights: one read, a "
            "prompt in chunks, ticks and a read of several tokens",
            (
                Read(ids[:40], tuple(range(40))),
                Prime(ids[:40]),
                Read(),
                Feed(ids[40:44]),
                Read(),
                Read(ids[50:53], (44, 45, 46)),
                Read(ids[10:12], (10, 11)),
            ),
            MemoryShape(capacity=64, smallest_bucket=64, widths=((1, 16),)),
            full=4,
            seeded="seeded-tinyllama",
        ),
        Case(
            "toy_bucket_edges",
            "a toy with TinyLlama's heads and seeded random weights: contexts at the edges of "
            "buckets, and rows forgotten and taken again across them",
            (
                *(
                    step
                    for length in (15, 16, 17, 31, 32, 33, 63, 64)
                    for step in (Prime(ids[:length]), Read())
                ),
                Cull(tuple(range(3, 40))),
                Read(),
                Feed(ids[64:84]),
                Read(),
                Read(ids[90:96], tuple(range(84, 90))),
            ),
            MemoryShape(capacity=64, smallest_bucket=32, widths=(NARROW,)),
            seeded="seeded-toy",
        ),
    ]
