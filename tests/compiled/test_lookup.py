"""Looking up: against a search written a second time, over a dictionary."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiled.lookup import Lookup, propose
from toys import digest, toy_config, toy_cursor, toy_state

pytestmark = pytest.mark.usefixtures("one_thread")


def search(text: dict[int, int], end: int, lookup: Lookup) -> int | None:
    """Position of what followed the latest of the longest earlier matches of the text up to
    ``end``.
    """
    for length in range(lookup.longest, lookup.shortest - 1, -1):
        wanted = [text.get(end - back) for back in range(length)]
        for place in sorted(text, reverse=True):
            found = [text.get(place - back) for back in range(length)]
            if place < end and place + 1 in text and None not in wanted and found == wanted:
                return place + 1
    return None


def foretold(
    text: dict[int, int], cursor: int, lookup: Lookup, ends: tuple[int, ...] = ()
) -> list[int]:
    """What is to be proposed, token by token."""
    tried = right = 0
    window = [p for p in sorted(text) if p < cursor][-lookup.window :] if lookup.window else []
    for end in window:
        place = search(text, end, lookup)
        if place is not None and end + 1 in text:
            tried += 1
            right += text[place] == text[end + 1]
    first = search(text, cursor, lookup)
    if first is None or (right + 1) / (tried + 2) < lookup.trust:
        return []
    proposed: list[int] = []
    at = first
    while len(proposed) < lookup.width and at in text and text[at] not in ends:
        proposed.append(text[at])
        at = first if at == cursor else at + 1
    return proposed


@st.composite
def memories(draw: st.DrawFn) -> tuple[dict[int, int], int, list[int], bool]:
    """A text with gaps over few tokens, where its cursor is, slots in any order, and whether the
    cursor's token has a row.
    """
    size = draw(st.integers(0, 22))
    tokens = draw(st.lists(st.integers(1, 3), min_size=size + 1, max_size=size + 1))
    if draw(st.booleans()):  # text of some period, nearly
        period = draw(st.integers(1, 5))
        tokens = [
            tokens[i % period] if draw(st.integers(0, 9)) else t for i, t in enumerate(tokens)
        ]
    steps = draw(st.lists(st.sampled_from([1, 1, 1, 1, 1, 3]), min_size=size, max_size=size))
    positions = [sum(steps[:index]) for index in range(size + 1)]
    slots = draw(st.permutations(range(26)))
    return dict(zip(positions, tokens, strict=True)), positions[-1], slots, draw(st.booleans())


LOOKUPS = st.builds(
    Lookup,
    width=st.integers(1, 9),
    shortest=st.integers(1, 2),
    longest=st.integers(2, 4),
    window=st.integers(0, 12),
    trust=st.sampled_from([0.0, 0.3, 0.5, 0.7]),
)
ENDS = st.sampled_from([(), (), (2,), (1, 39)])


@given(memories(), LOOKUPS, ENDS)
def test_what_is_proposed_is_what_followed(
    memory: tuple[dict[int, int], int, list[int], bool], lookup: Lookup, ends: tuple[int, ...]
) -> None:
    text, at, slots, has_row = memory
    rows = [position for position in text if position != at or has_row]
    # Slots without a row hold any position and token, some of them those that are looked for.
    state = toy_state(toy_config(), 26, {slots[n]: p for n, p in enumerate(rows)})
    for n, position in enumerate(rows):
        state.token_id[slots[n]] = text[position]
    cursor = toy_cursor(at, token=text[at])
    cursor.uncommitted.fill_(int(not has_row))
    before = digest(*state, *cursor)
    proposal = propose(state, cursor, lookup, ends)
    assert digest(*state, *cursor) == before
    expected = foretold(text, at, lookup, ends)
    assert int(proposal.length) == len(expected)
    assert proposal.tokens.tolist() == expected + [0] * (lookup.width - len(expected))


def test_the_search_finds_something_to_compare() -> None:
    text = dict(enumerate([5, 6, 7, 8, 5, 6]))
    assert foretold(text, 5, Lookup(width=5, trust=0.5)) == [7, 8, 5, 6, 7]
    assert foretold(text, 5, Lookup(width=5, trust=0.6)) == []
    assert foretold(text, 5, Lookup(width=5, trust=0.5), (5,)) == [7, 8]


@pytest.mark.parametrize(
    "wrong", [{"width": 0}, {"shortest": 0}, {"shortest": 5, "longest": 4}, {"window": -1}]
)
def test_numbers_that_make_no_search_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Lookup(**wrong)
