"""I10: every token in the mirror was put there by a call; tokenizing adds nothing."""

import pytest

from brain import Append, Brain

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::brain.BrainWarning"),  # nothing here is worth one
]


def test_I10_every_token_was_put_there_by_a_call(either_brain: Brain) -> None:
    b = either_brain
    given = [0, 1, 299, 0, 0, 17, 3]  # repeated and special ids, taken literally
    b.prime(given)
    assert b.mirror.token_id.tolist() == given
    b.patch([Append([5, 0, 5], source="tool")])
    assert b.mirror.token_id.tolist() == [*given, 5, 0, 5]
    b.feed([9, 0, 2])
    assert b.mirror.token_id.tolist() == [*given, 5, 0, 5, 9, 0]
    b.patch([Append([4])])  # commits the pending token, which was given too
    assert b.mirror.token_id.tolist() == [*given, 5, 0, 5, 9, 0, 2, 4]
    spoken = [b.tick().token for _ in range(5)]
    assert b.mirror.token_id.tolist() == [*given, 5, 0, 5, 9, 0, 2, 4, *spoken[:-1]]


def test_I10_text_becomes_exactly_its_tokens(either_brain: Brain) -> None:
    b = either_brain
    text = "hello hé a \n\u0000€ <|end|>"
    b.prime(text)
    assert b.mirror.token_id.tolist() == b.encode(text)
    assert b.decode(b.mirror.token_id.tolist()) == text
    assert b.mirror.text() == text
