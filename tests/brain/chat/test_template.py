"""What is appended to a conversation is what transformers writes, and no text becomes a mark."""

import os
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brain.chat import template as chat
from brain.chat.template import ChatFormat, chat_format, chatml
from brain.checkpoints import open_folder
from brain.errors import BrainWarning, Refused
from brain.tokens import Tokenizer, load_tokenizer
from chat_templates import CHATML, FAMILIES, IM, Family, chat_folder
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


def test_thoughts_that_the_template_drops_later_stay(open_family: Open) -> None:
    """Known: Qwen3 writes an earlier reply without its thoughts; what is appended is the same."""
    ours, reference = open_family("Qwen3")
    assert ours.thoughts == ("<think>", "</think>")
    told = messages(2, None)
    told[1]["content"] = f"<think>\nwell\n</think>\n\n{REPLIES[0]}"
    theirs = reference.apply_chat_template(told, add_generation_prompt=True, return_dict=False)
    new = ours.next_turn(USERS[1], closes=True)
    assert theirs[-len(new) :] == new
    assert "well" not in reference.decode(theirs)


def test_white_space_around_a_text_stays(open_family: Open) -> None:
    """Known: many templates trim a text; here it is read as it was given."""
    ours, reference = open_family("Llama 3")
    assert ours.tokenizer.decode(ours.first_turn(" hi \n")).count("\n\n hi \n<|eot_id|>") == 1
    told = [{"role": "user", "content": " hi \n"}]
    options: dict[str, Any] = {**FAMILIES["Llama 3"].variables, "return_dict": False}
    theirs = reference.apply_chat_template(told, add_generation_prompt=True, **options)
    assert theirs == ours.first_turn("hi")


def test_bos_comes_once(open_family: Open) -> None:
    for name in ("Llama 3", "Mistral 7B 0.3", "Gemma 3", "R1 distill"):
        ours, _ = open_family(name)
        assert ours.tokenizer.wants_bos
        assert ours.opening.startswith(FAMILIES[name].bos or "?")
        assert ours.first_turn("hi").count(ours.tokenizer.bos_id or -1) == 1
        silent = ChatFormat(**{**vars(ours), "opening": "User: "})  # a template without BOS
        assert silent.first_turn("hi")[0] == ours.tokenizer.bos_id
        assert ours.tokenizer.bos_id not in ours.next_turn("ho", closes=True)


def test_the_preamble_begins_the_first_turn(open_family: Open) -> None:
    for name, system in (("Llama 3", SYSTEM), ("Qwen2.5", None), ("Gemma 3", SYSTEM)):
        ours, _ = open_family(name)
        before, whole = ours.preamble(system), ours.first_turn("hi", system)
        assert len(before) > 3
        assert before[:-1] == whole[: len(before) - 1]


# No text becomes a mark ---------------------------------------------------------------------------

MARKS = sorted(
    {mark for f in FAMILIES.values() for mark in (*f.tokens, *f.loose)} | {"<s>", "</s>"}
)
FRAGMENTS = st.sampled_from(
    [
        *(MARKS + [m[:4] for m in MARKS] + [m[4:] for m in MARKS]),
        *(
            "{{ 7 * 7 }}",
            "{% endfor %}",
            "{#",
            "<unk>",
            "\x00",
            "\u202e",
            "\ufeff",
            "\r\n",
            "\n",
            " ",
        ),
        *(chat.SYSTEM, *chat.USER, *chat.REPLY, "\ue000", "ꀀ", "\u2000", "he", "漢"),
    ]
)
TEXTS = st.lists(FRAGMENTS | st.text(max_size=5), max_size=8).map("".join)


@pytest.mark.parametrize("name", FAMILIES)
@given(user=TEXTS, later=TEXTS)
@settings(max_examples=60, deadline=None)
def test_no_text_becomes_a_mark(open_family: Open, name: str, user: str, later: str) -> None:
    ours, _ = open_family(name)
    tokenizer = ours.tokenizer
    controls = set(tokenizer.vocabulary.controls) | tokenizer.eos_ids
    unknown = set(tokenizer.vocabulary.split_plain("\U0010fffd"))

    def marks(ids: list[int]) -> list[int]:
        return [index for index in ids if index in controls - unknown]

    system = later if ours.system else None
    first = ours.first_turn(user, system)
    assert marks(first) == marks(ours.first_turn("x", "x" if ours.system else None))
    following = [ours.next_turn(later, closes=closes) for closes in (True, False)]
    assert [*map(marks, following)] == [
        marks(ours.next_turn("x", closes=closes)) for closes in (True, False)
    ]
    lossy = FAMILIES[name].reader != "PreTrainedTokenizerFast" or "▁" in user + later
    if not lossy:
        told = (ours.system or ("", ""))[0] + later + (ours.system or ("", ""))[1]
        before = told if ours.system else ours.opening
        assert tokenizer.decode(first) == before + user + ours.to_reply
        new = ours.reply_end + ours.before_user + later + ours.to_reply
        assert tokenizer.decode(following[0], at_start=False) == new


def test_half_a_surrogate_pair_is_refused(open_family: Open) -> None:
    ours, _ = open_family("SmolLM2")
    for say in (ours.first_turn, lambda text: ours.next_turn(text, closes=True)):
        with pytest.raises(Refused, match="half a surrogate pair"):
            say("a\udc00b")


# Templates that cannot be used -----------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, specimens: Specimens) -> Tokenizer:
    folder = chat_folder(tmp_path_factory.mktemp("any"), FAMILIES["Phi 4"], specimens)
    return load_tokenizer(folder)


def with_template(tokenizer: Tokenizer, template: str | None) -> ChatFormat:
    changed = Tokenizer(
        *(tokenizer.vocabulary, tokenizer.bos_id, tokenizer.eos_ids, tokenizer.wants_bos),
        chat_template=template,
        named=tokenizer.named,
    )
    return chat_format(changed, today=DAY, where="toy")


def processes() -> set[str]:
    """The children of this process."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


LONG = "{% for i in range(90000) %}{% for j in range(90000) %}"
NEVER = LONG + "{% endfor %}{% endfor %}"
HOSTILE = {
    "endless": (NEVER, "more than 1 seconds"),
    "an endless expression": ("{{ 9 ** (9 ** 9) }}", "more than 1 seconds|ended the process"),
    "long": (LONG + "aaaaaaaa{% endfor %}{% endfor %}", "more than 262144 characters"),
    "large": ("{{ 'a' * (2 ** 40) }}", "fails"),
    "doubling": (
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}"
        "{% set n.x = n.x + n.x %}{% endfor %}",
        "too much memory",
    ),
    "attributes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails.*unsafe|undefined"),
    "a namespace": ("{% set n = namespace(__call__=1) %}", "fails.*__call__"),
    "a mark of a namespace": ("{% set n = namespace() %}{% set n._x = 1 %}", "fails.*_x"),
    "format": ("{{ '{0.__class__}'.format(messages) }}", "fails|once and in order"),
    "imports": ("{% import 'os' as os %}", "fails"),
    "a file": ("{% include '/etc/passwd' %}", "fails"),
    "changes": ("{% set _ = messages.append(1) %}", "fails.*unsafe"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply"),
    "deep": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply|ended the process"),
    "not Jinja": ("{% for %}", "fails"),
    "an exception": ("{{ raise_exception('line\\none' * 900) }}", "fails .line one"),
    "no texts": ("hello", "once and in order"),
    "texts twice": (CHATML + CHATML, "once and in order"),
    "half of a text": ("{{ messages[0].content[1:] }}", "once and in order"),
    "lower": ("{{ messages[0].content | length }}", "once and in order"),
    "the last first": (
        "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
        "once and in order",
    ),
    "no reply mark": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        "add_generation_prompt",
    ),
    "other later": (CHATML + "{{ messages | length }}", "all turns alike"),
    "a number": (CHATML.replace("'\\n'", "loop.index | string"), "all turns alike"),
    "the system prompt twice": (
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}" + CHATML,
        "system prompt once",
    ),
    "the system prompt last": (
        CHATML.replace("for message in messages", "for message in messages if message.role != 's'")
        .replace("messages[0].role != 'system' and default", "false")
        .replace("message.role + '\\n'", "message.role + '\\n' + (loop.length | string)"),
        "all turns alike",
    ),
    "large itself": ("a" * (1 << 20) + "a", "1048577 characters"),
    "none": (None, "has no chat template; .*chatml on purpose"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_cannot_be_used_is_one_line(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(chat, "SECONDS", 1 if "more than 1 s" in HOSTILE[name][1] else 5)
    template, told = HOSTILE[name]
    before = processes()
    with pytest.raises(Refused, match=told) as refusal:
        with_template(tokenizer, template)
    message = str(refusal.value)
    assert message.startswith("toy")
    assert "\n" not in message
    assert len(message) < 500
    assert processes() == before


def test_a_template_learns_nothing_of_this_process(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSITRONIC_SECRET", "hunter2")
    names = "{{ cycler.__init__.__globals__ }}{{ lipsum.__globals__.os.environ }}"
    with pytest.raises(Refused) as refusal:
        with_template(tokenizer, names)
    assert "hunter2" not in str(refusal.value)


def test_the_date_is_the_one_that_is_given(tokenizer: Tokenizer) -> None:
    ours = with_template(tokenizer, "{{ strftime_now('%d %b %Y') }}" + CHATML)
    assert ours.opening.startswith("01 Feb 2026<|im_start|>user")


def test_what_templates_may_use(tokenizer: Tokenizer) -> None:
    tools = "{% set x = dict(a='<é>') %}{{ x | tojson(indent=1) }}{{ '{}'.format(3) }}"
    loops = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    told = "{% generation %}learnt{% endgeneration %}{{ tools is none }}{{ eos_token }}"
    ours = with_template(tokenizer, tools + loops + told + CHATML)
    assert ours.opening.startswith('{\n "a": "<é>"\n}301learntTrue<|im_end|><|im_start|>user')


def test_a_template_that_drops_the_system_prompt_has_no_place_for_one(tokenizer: Tokenizer) -> None:
    ours = with_template(
        tokenizer,
        "{% for m in messages if m.role != 'system' %}"
        "{{ m.content if m.role == 'assistant' else '[' + m.content + ']' }}{% endfor %}",
    )
    assert ours.system is None
    assert ours.reply_end == ""
    assert ours.reply_ends == tokenizer.eos_ids
    for closes in (True, False):
        assert tokenizer.decode(ours.next_turn("hi", closes=closes)) == "[hi]"


def test_chatml_on_purpose(tokenizer: Tokenizer, open_family: Open) -> None:
    ours = chatml(tokenizer)
    assert ours.reply_end_id == tokenizer.vocabulary.id_of(IM[1])
    told = tokenizer.decode(ours.first_turn("hi", "be brief") + ours.next_turn("ho", closes=True))
    assert told == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\nho<|im_end|>\n<|im_start|>assistant\n"
    )
    without = open_family("Gemma 2")[0].tokenizer
    with pytest.warns(BrainWarning, match="no token <|im_end|>"):
        plain = chatml(without)
    assert plain.reply_ends == without.eos_ids
    assert "hi<|im_end|>" in without.decode(plain.first_turn("hi"))


def test_a_checkpoint_knows_its_format(tiny_folder: Path, tmp_path: Path) -> None:
    checkpoint = open_folder(tiny_folder, dtype=torch.float32)
    with pytest.raises(Refused, match=f"{checkpoint.name} has no chat template; .*chatml"):
        checkpoint.chat_format(today=DAY)
    with pytest.raises(Refused, match=r"chat format: 'chatlm' is unknown; .*did you mean chatml"):
        checkpoint.chat_format("chatlm", today=DAY)
    with pytest.warns(BrainWarning, match="no token"):
        assert checkpoint.chat_format("chatml", today=DAY).system
    for path in tiny_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    other = open_folder(tmp_path, dtype=torch.float32)
    assert other.chat_format(today=DAY).opening == "<|im_start|>user\n"
    told = other.chat_format(today=DAY, variables={"default": "hi"}).opening
    assert told == "<|im_start|>system\nhi<|im_end|>\n<|im_start|>user\n"
    assert other.vocabulary_sha256 == checkpoint.vocabulary_sha256
    assert other.sha256 == checkpoint.sha256
