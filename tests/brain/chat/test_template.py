"""What is appended to a conversation is what transformers writes, and no text becomes a mark."""

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from brain.chat.template import ChatFormat, chat_format
from brain.errors import Refused
from brain.tokens import load_tokenizer
from chat_templates import FAMILIES, Family, chat_folder
from tokenizer_folders import Specimens

DAY = date(2026, 2, 1)
SYSTEM = "You are a man of few words."
USERS = ("Hello, world!", "two  spaces\n\nand\ttabs, 123", "naïve “café” 漢字 🤖 e\u0301")
REPLIES = ("It is a truth", "universally acknowledged\nthat", "a single man")
SMOLLM2: dict[str, object] = {}
Open = Callable[[str], tuple[ChatFormat, Any]]


@pytest.fixture(scope="session")
def specimens() -> Specimens:
    return Specimens()


@pytest.fixture(scope="session")
def open_family(tmp_path_factory: pytest.TempPathFactory, specimens: Specimens) -> Open:
    """A family's format, and its tokenizer of transformers; each made once."""
    made: dict[str, tuple[ChatFormat, Any]] = {}

    def opened(name: str) -> tuple[ChatFormat, Any]:
        from transformers import AutoTokenizer

        if name not in made:
            family = FAMILIES[name]
            folder = chat_folder(tmp_path_factory.mktemp("chat"), family, specimens)
            ours = chat_format(load_tokenizer(folder), today=DAY, variables=family.variables)
            made[name] = ours, AutoTokenizer.from_pretrained(folder)
        return made[name]

    return opened


def messages(turns: int, system: str | None) -> list[dict[str, str]]:
    told = [{"role": "system", "content": system}] if system else []
    for user, reply in zip(USERS[:turns], REPLIES, strict=False):
        told += [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    return told[:-1]


def written(reference: Any, turns: int, system: str | None, variables: dict[str, object]) -> Any:
    return reference.apply_chat_template(
        messages(turns, system), add_generation_prompt=True, return_dict=False, **variables
    )


def appended_as_the_reference_writes_it(
    ours: ChatFormat, reference: Any, system: str | None, family: Family
) -> None:
    before = written(reference, 1, system, family.variables)
    assert ours.first_turn(USERS[0], system) == before
    assert ours.reply_end_id in ours.reply_ends
    moves = family.template == FAMILIES["Mistral Nemo"].template and system
    for turns in (2, 3):
        theirs = written(reference, turns, None if moves else system, family.variables)
        new = ours.next_turn(USERS[turns - 1], closes=True)
        assert new[0] == ours.reply_end_id
        assert theirs[-len(new) :] == new
        said = ours.next_turn(USERS[turns - 1], closes=False)
        assert [ours.reply_end_id, *said] == new
        if not family.rewrites:
            assert theirs[: len(before)] == before
            reply = ours.tokenizer.decode(theirs[len(before) : -len(new)], at_start=False)
            assert reply.strip() == REPLIES[turns - 2]
        before = theirs


@pytest.mark.parametrize("system", [None, SYSTEM])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_appended_is_what_transformers_writes(
    open_family: Open, name: str, system: str | None
) -> None:
    ours, reference = open_family(name)
    if system and not FAMILIES[name].takes_system:
        with pytest.raises(Refused, match="no place for a system prompt"):
            ours.first_turn(USERS[0], system)
        return
    appended_as_the_reference_writes_it(ours, reference, system, FAMILIES[name])


@pytest.mark.parametrize("system", [None, SYSTEM])
def test_the_default_model(smollm2_folder: Path, system: str | None) -> None:
    from transformers import AutoTokenizer

    ours = chat_format(load_tokenizer(smollm2_folder), today=DAY)
    reference = AutoTokenizer.from_pretrained(smollm2_folder)
    appended_as_the_reference_writes_it(ours, reference, system, Family("", ()))
    assert ours.reply_ends == {2}
