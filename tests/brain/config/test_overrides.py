"""Text reaches the configuration character for character."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from brain.config.compose import compose_conf
from brain.config.overrides import literal_arguments, override
from brain.errors import Refused
from conf.schema import DType

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
    '"Where are you going?"',
    "'Twas brillig'",
    "???",
    "\\???",
    '""',
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


@pytest.mark.parametrize("name", ["a,b", " a", "a ", "[a]", "{a}", "(a", "null", "1,2/x", "a\\"])
def test_the_name_of_a_run_folder_is_taken_literally(name: str) -> None:
    (argument,) = literal_arguments([f"hydra.run.dir={name}"])
    assert OverridesParser.create().parse_override(argument).value() == name
    assert literal_arguments(["hydra.run.dir='a b'"]) == ["hydra.run.dir='a b'"]
    assert literal_arguments(["hydra.run.dir=${now:%Y}"]) == ['hydra.run.dir="${now:%Y}"']


def test_a_folder_that_has_been_removed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    with pytest.raises(Refused, match="the current folder has been removed: change to one"):
        literal_arguments(["ticks=3"])


def test_a_multirun_may_sweep_over_prompts() -> None:
    assert literal_arguments(["prompt=a,b", "-m"]) == ["--multirun", "prompt=a,b"]
    assert literal_arguments(["prompt=a,b"]) == ['prompt="a,b"']


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ("???", ["???"]),
        ("'???',a", ["???", "a"]),
        ("null,true,1e5,0x1F", ["null", "true", "1e5", "0x1F"]),
        ("${x}, b c ", ["${x}", "b c"]),
        ("'a, b',\"'c'\"", ["a, b", "'c'"]),
        ("Well, it's (odd)", ["Well, it's (odd)"]),
    ],
)
def test_texts_of_a_multirun_are_taken_literally(given: str, texts: list[str]) -> None:
    _, argument = literal_arguments(["-m", f"prompt={given}"])
    override = OverridesParser.create().parse_override(argument)
    if override.is_sweep_override():
        values = list(override.sweep_string_iterator())
    else:
        values = [override.get_value_element_as_str()]
    assert [compose_conf([f"prompt={value}"]).prompt for value in values] == texts


def test_a_sweep_of_hydra_s_over_texts_stays() -> None:
    assert literal_arguments(["-m", "prompt=choice(a,b)"])[1] == "prompt=choice(a,b)"


@pytest.mark.parametrize(
    ("key", "value", "seen"),
    [
        ("capacity", 77, lambda conf: conf.capacity == 77),
        ("stop_at_eos", True, lambda conf: conf.stop_at_eos is True),
        ("engine", "compiled", lambda conf: conf.engine.captured),
        ("engine.widths", [1, 5], lambda conf: conf.engine.widths == [1, 5]),
        ("cull.target", None, lambda conf: conf.cull.target is None),
        ("sampler.temperature", 1e-3, lambda conf: conf.sampler.temperature == 1e-3),
        ("cache_dir", Path("/a b"), lambda conf: conf.cache_dir == "/a b"),
        ("dtype", torch.bfloat16, lambda conf: conf.dtype is DType.bfloat16),
        ("dtype", DType.float16, lambda conf: conf.dtype is DType.float16),
        ("device", torch.device("cpu"), lambda conf: conf.device == "cpu"),
        ("capacity", np.int64(77), lambda conf: conf.capacity == 77),
        ("engine.widths", np.array([1, 5]), lambda conf: conf.engine.widths == [1, 5]),
        ("seed", torch.tensor(7), lambda conf: conf.seed == 7),
        (
            "cull.brightness.seeds",
            {"user": 2},
            lambda conf: conf.cull.brightness.seeds["user"] == 2,
        ),
    ],
    ids=[*"abcdefghijklmn"],
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


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("capacty=3", "capacity"),
        ("sampler.temprature=1", "sampler.temperature"),
        ("temperature=1", "sampler.temperature"),
        ("+sampler.topk=1", "sampler.top_k"),
        ("engine=complied", "compiled"),
        ("dtype=BF16loat", "bfloat16"),
        ("stop_at_eos=ture", "true"),
        ("hydra.run.dri=x", "hydra.run.dir"),
    ],
)
def test_what_is_misspelt_gets_the_nearest_right_one(wrong: str, meant: str) -> None:
    with pytest.raises(Refused, match=rf"; did you mean {re.escape(meant)}\?"):
        compose_conf([wrong])


@pytest.mark.parametrize("value", [b"abc", {1}, object()], ids=["bytes", "set", "object"])
def test_a_value_of_no_key_is_refused(value: Any) -> None:
    with pytest.raises(Refused, match="seed cannot be"):
        override("seed", value)
