"""Memories with a history: what is read, fed, culled and edited before a test begins."""

from brain import Append, Boost, Brain, Cull, Pin, Redact, Replace
from toys import digest

VOCABULARY = 300


IDS = [(37 * index + 11) % VOCABULARY for index in range(200)]


def everything(b: Brain) -> str:
    """A hash of every byte that a patch may write."""
    return digest(*b.state, *b.cursor)


def mixed_up(b: Brain) -> Brain:
    """A memory with a history: holes, a pinned row, a replaced pair, a pending token."""
    b.prime(IDS[:20], source="system")
    b.patch([Cull([3, 4, 9]), Replace([11, 12], [77]), Pin([6])])
    b.feed(IDS[30:34])
    b.patch([Append(IDS[40:43], source="tool"), Cull([15])])
    b.tick()
    b.tick()
    return b


def said(b: Brain, ticks: int) -> list[tuple[int, float, tuple[int, ...]]]:
    return [(t.token, t.surprise, t.culled) for t in b.stream(ticks)]


def anything(b: Brain) -> None:
    """A day in the life: every kind of call, at every width and bucket, in no special order."""
    b.prime(IDS[:3])
    b.read()
    b.prime(IDS[:30], source="system")
    b.feed(IDS[:4])
    b.patch([Cull(b.mirror.position[[5, 9]].tolist()), Append(IDS[60:63])])
    for count in (1, 2, 4, 5, 15, 16, 40):
        b.read(IDS[:count])
        b.read(IDS[:count], list(range(7, 7 + count)))
    where = b.mirror.position.tolist()
    b.patch([Replace(where[6:9], [4, 5]), Pin(where[9:10]), Redact(where[10:12])])
    b.patch([Boost(where[12:14], 3.0), Pin(where[9:10], pinned=False)])
    b.patch([Append(IDS[90:95])])
    for _ in range(12):
        b.tick()
    b.prime(IDS[:48])
    b.patch([])
    for _ in range(30):
        b.tick()
    b.patch([Cull(b.mirror.position[3:-1].tolist())])
    b.patch([Append(IDS[:20], source="tool")])
    b.feed(IDS[:10], source="user")
