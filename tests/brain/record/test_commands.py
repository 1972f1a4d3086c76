"""Commands to a running brain: applied wholly or refused wholly, and always answered."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brain import Append, Boost, Cull, Pin, Redact, Refused, Replace
from brain.actions import Action
from brain.record.commands import ANSWERS, INBOX, LONGEST_LINE, Inbox, parse_batch, send
from fixture_types import OpenTiny
from toys import digest

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = list(range(10, 30))


def letters(text: str, *_: object, **__: object) -> list[int]:
    return [ord(character) for character in text]


def test_every_action_can_be_asked_for() -> None:
    line = json.dumps(
        [
            {"do": "pin", "positions": [1]},
            {"do": "pin", "positions": [2], "pinned": False},
            {"do": "boost", "positions": [3], "amount": 5},
            {"do": "cull", "positions": [4, 5]},
            {"do": "redact", "positions": [6]},
            {"do": "replace", "positions": [7, 8], "text": "a"},
            {"do": "inject", "text": "bc", "source": "tool"},
            {"do": "inject", "ids": [1, 2]},
        ]
    )
    assert parse_batch(line, letters) == [
        Pin([1]),
        Pin([2], pinned=False),
        Boost([3], 5),
        Cull([4, 5]),
        Redact([6]),
        Replace([7, 8], [97]),
        Append([98, 99], "tool"),
        Append([1, 2]),
    ]
    assert parse_batch('{"do": "cull", "positions": [1]}', letters) == [Cull([1])]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("", "not JSON"),
        ("[", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "list of actions"),
        ("3", "list of actions"),
        ("[3]", "action 0"),
        ('[{"positions": [1]}]', "do"),
        ('[{"do": "explode"}]', "explode"),
        ('[{"do": "pin"}]', "positions is missing"),
        ('[{"do": "pin", "positions": 3}]', "positions is 3"),
        ('[{"do": "pin", "positions": [3], "pinned": 1}]', "pinned is 1"),
        ('[{"do": "pin", "positions": [3], "why": 1}]', "why"),
        ('[{"do": "boost", "positions": [3], "amount": "much"}]', "amount"),
        ('[{"do": "inject"}]', "either text or ids"),
        ('[{"do": "inject", "text": "a", "ids": [1]}]', "either text or ids"),
        ('[{"do": "cull", "positions": [1]}, {"do": "inject", "text": 3}]', "action 1"),
        (" " * (LONGEST_LINE + 1), "characters"),
    ],
)
def test_a_malformed_command_is_refused_in_one_line(line: str, told: str) -> None:
    with pytest.raises(Refused, match=told) as refused:
        parse_batch(line, letters)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.text() | JSON.map(json.dumps))
def test_whatever_comes_is_understood_or_refused(line: str) -> None:
    with contextlib.suppress(Refused):
        parse_batch(line, letters)


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ('{"do": "ijnect", "text": "a"}', "inject"),
        ('{"do": "inject", "text": "a", "sorce": "user"}', "source"),
    ],
    ids=["action", "field"],
)
def test_a_misspelt_word_of_a_command_gets_the_nearest(line: str, meant: str) -> None:
    with pytest.raises(Refused, match=rf"did you mean {meant}\?"):
        parse_batch(line, letters)


def test_a_command_says_whether_special_tokens_in_its_text_are_such(open_tiny: OpenTiny) -> None:
    b = open_tiny()
    as_text = b.tokenizer.encode("<|end|>", special=False)
    told = {
        '"source": "user"': [0],
        '"source": "tool"': as_text,
        '"source": "tool", "special": true': [0],
        '"source": "user", "special": false': as_text,
    }
    for fields, ids in told.items():
        (action,) = parse_batch(f'{{"do": "inject", "text": "<|end|>", {fields}}}', b.encode)
        assert isinstance(action, Append)
        assert action.ids == ids
    with pytest.raises(Refused, match="'special' is not a field"):
        parse_batch('{"do": "inject", "ids": [1], "special": true}', b.encode)


def test_an_inbox_applies_complete_lines_once_and_answers_each(
    open_tiny: OpenTiny, tmp_path: Path
) -> None:
    b = open_tiny()
    b.prime(IDS)
    inbox = Inbox(tmp_path, b)
    assert inbox.poll() == 0
    file = tmp_path / INBOX
    file.write_text('[{"do": "pin", "positions": [3]}]\n[{"do": "cull", "posi')
    assert inbox.poll() == 1
    assert inbox.poll() == 0
    assert b.mirror.pinned.sum() == 1
    with file.open("a") as more:
        more.write('tions": [5]}]\n\n')
    assert inbox.poll() == 1
    assert 5 not in b.mirror.position
    before = digest(*b.state, *b.cursor)
    with file.open("ab") as more:
        more.write(b'[{"do": "cull", "positions": [7]}, {"do": "pin", "positions": [99]}]\n\xff\n')
    assert inbox.poll() == 0
    assert digest(*b.state, *b.cursor) == before  # a batch is refused as a whole
    answers = [json.loads(line) for line in (tmp_path / ANSWERS).read_text().splitlines()]
    assert [set(answer) for answer in answers] == [{"tick", "applied", "rows"}] * 2 + [
        {"tick", "refused"}
    ] * 2
    assert "99" in answers[2]["refused"]
    assert "UTF-8" in answers[3]["refused"]


def test_a_run_does_not_hear_what_an_earlier_one_was_told(
    open_tiny: OpenTiny, tmp_path: Path
) -> None:
    b = open_tiny()
    b.prime(IDS)
    file = tmp_path / INBOX
    file.write_text('[{"do": "pin", "positions": [3]}]\n')
    inbox = Inbox(tmp_path, b)
    assert inbox.poll() == 0
    file.write_text('[{"do":"pin","positions":[4]}]\n')  # anew, and shorter
    assert inbox.poll() == 1
    assert b.mirror.position[b.mirror.pinned].tolist() == [4]


def test_a_number_too_large_is_refused(open_tiny: OpenTiny, tmp_path: Path) -> None:
    b = open_tiny()
    b.prime(IDS)
    inbox = Inbox(tmp_path, b)
    huge = "1" + "0" * 400
    (tmp_path / INBOX).write_text(f'[{{"do": "boost", "positions": [3], "amount": {huge}}}]\n')
    assert inbox.poll() == 0
    assert "too large" in (tmp_path / ANSWERS).read_text()


def test_injected_text_is_remembered_with_its_source(open_tiny: OpenTiny, tmp_path: Path) -> None:
    b = open_tiny(**{"cull": "none"})
    b.prime(IDS)
    b.tick()
    inbox = Inbox(tmp_path, b)
    (tmp_path / "transcript.txt").touch()
    send(tmp_path, '[{"do": "inject", "text": "hi", "source": "tool"}]')
    assert inbox.poll() == 1
    ids = b.encode("hi")
    assert b.mirror.token_id[-len(ids) :].tolist() == ids
    assert set(b.mirror.sources()[-len(ids) :]) == {"tool"}


def test_a_full_memory_makes_room_for_what_is_injected(open_tiny: OpenTiny) -> None:
    b = open_tiny(**{"capacity": 24, "cull.target": 24})
    b.prime(IDS)
    list(b.stream(10))
    assert len(b) == 24
    first = b.mirror.position[6]
    b.apply([Append(b.encode("hello"), "tool"), Pin([int(first)])])
    assert len(b) == 24
    ids = b.encode("hello")
    # The last of them is pending, as after any tick.
    assert b.mirror.token_id[-len(ids) + 1 :].tolist() == ids[:-1]
    assert b.mirror.sources()[-2:] == ["tool", "tool"]
    assert int(b.cursor.token) == ids[-1]
    assert b.mirror.pinned.sum() == 1
    impossible: list[list[Action]] = [
        [Append([999])],
        [Append([1], "nobody")],
        [Pin([int(first)], pinned=False), Append([1], "nobody")],
        [Append([1]), Pin([10**6])],
    ]
    for wrong in impossible:
        before = digest(*b.state, *b.cursor)
        with pytest.raises(Refused):
            b.apply(wrong)
        assert digest(*b.state, *b.cursor) == before


def test_a_batch_that_fails_amid_its_tokens_says_how_many_are_missing(
    open_tiny: OpenTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full memory has forgotten rows for those that were said: nothing brings them back."""
    b = open_tiny(**{"capacity": 24, "cull.target": 24})
    b.prime(IDS)
    patch, calls = b.graphs.patch, iter(range(10))

    def fail(*arguments: Any) -> None:
        if next(calls) == 2:
            raise MemoryError
        patch(*arguments)

    monkeypatch.setattr(b.graphs, "patch", fail)
    ticks = b.ticks
    with pytest.raises(MemoryError) as failed:
        b.apply([Pin([10]), Append([1, 2, 3, 4], "tool")])
    assert failed.value.__notes__ == ["the batch is done but for the last 2 tokens to append"]
    assert b.ticks == ticks + 2
    assert b.mirror.pinned.sum() == 1
    b.apply([Append([3, 4], "tool")])
    assert b.mirror.token_id[-3:].tolist() == [1, 2, 3]
    assert int(b.cursor.token) == 4


def test_sending_to_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="not the folder of a run"):
        send(tmp_path / "nowhere", "[]")
    with pytest.raises(Refused, match="not the folder of a run"):
        send(tmp_path, "[]")
    with pytest.raises(Refused, match="one line"):
        send(tmp_path, "[]\n[]")
