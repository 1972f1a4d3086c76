"""Text reaches the configuration character for character."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brain.config.compose import compose_conf
from brain.config.overrides import literal_arguments, override
from brain.errors import Refused

AWKWARD = [
    "It's (odd), isn't it?",
    'say "hi"',
    'a\\"b',
    "a\\",
    '\\\\"',
    "${x} $y {z}",
    "\\${x}",
    "[1, 2]",
    "null",
    "123",
    "a=b,c: d",
    " around ",
    "日本 é\n\tx",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_a_prompt_is_taken_literally(text: str) -> None:
    assert compose_conf([override("prompt", text)]).prompt == text
    assert compose_conf(literal_arguments([f"prompt={text}"])).prompt == text


@settings(max_examples=25, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_any_keyword_text_is_taken_literally(text: str) -> None:
    assert compose_conf([override("prompt", text)]).prompt == text


def test_hydra_quoting_still_works() -> None:
    assert compose_conf(literal_arguments(["prompt='a, b'"])).prompt == "a, b"
    # A value that only looks quoted is no Hydra value, so it is text.
    assert compose_conf(literal_arguments(["prompt='a' and 'b'"])).prompt == "'a' and 'b'"


def test_a_multirun_may_sweep_over_prompts() -> None:
    assert literal_arguments(["prompt=a,b", "-m"]) == ["--multirun", "prompt=a,b"]
    assert literal_arguments(["prompt=a,b"]) == ['prompt="a,b"']


@pytest.mark.parametrize(
    ("key", "value", "seen"),
    [
        ("capacity", 77, lambda conf: conf.capacity == 77),
        ("stop_at_eos", True, lambda conf: conf.stop_at_eos is True),
        ("engine", "compiled", lambda conf: conf.engine.compiled),
        ("engine.widths", [1, 5], lambda conf: conf.engine.widths == [1, 5]),
        ("cull.target", None, lambda conf: conf.cull.target is None),
        ("sampler.temperature", 1e-3, lambda conf: conf.sampler.temperature == 1e-3),
    ],
)
def test_keywords_are_overrides(key: str, value: Any, seen: Any) -> None:
    assert seen(compose_conf([override(key, value)]))


@pytest.mark.parametrize(
    "wrong", ["capacitty=3", "capacity=many", "engine=fast", "sampler.top_k=1.5", "capacity"]
)
def test_wrong_overrides_are_refused_in_one_line(wrong: str) -> None:
    with pytest.raises(Refused) as refusal:
        compose_conf([wrong])
    assert "\n" not in str(refusal.value)
    assert wrong.split("=")[0].split(".")[-1] in str(refusal.value)
