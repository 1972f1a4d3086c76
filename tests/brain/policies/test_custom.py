"""Policies that somebody else wrote: named, or handed over, and held to their contract."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import brain
from brain import Refused
from brain.policies import CustomPolicy, custom_policy
from compiled.choose import Look
from compiled.state import State
from fixture_types import OpenTiny
from processes import call

IDS = [(41 * index + 3) % 300 for index in range(40)]
SMALL = {"capacity": 24, "cull.target": 24}


def oldest_first(state: State, look: Look) -> Tensor:
    return state.born.to(torch.float32)


def least_watched(state: State, look: Look) -> Tensor:
    return look.mass


def no_such_column(state: State, look: Look) -> Tensor:
    return state.glances  # type: ignore[attr-defined,no-any-return]


def wrong_shape(state: State, look: Look) -> Tensor:
    return state.brightness[:3]


def wrong_type(state: State, look: Look) -> Tensor:
    return state.born


def no_tensor(state: State, look: Look) -> Tensor:
    return 0.5  # type: ignore[return-value]


def writes(state: State, look: Look) -> Tensor:
    return state.brightness.mul_(0.5)


def asks_the_host(state: State, look: Look) -> Tensor:
    if float(state.brightness.sum()) > 1e30:
        return look.mass
    return state.brightness


class Halves:
    """Calls for something with numbers of its own."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, state: State, look: Look) -> Tensor:
        return state.brightness * self.share

    def __repr__(self) -> str:
        return f"Halves({self.share})"


@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_a_function_decides_what_is_forgotten(engine: str, open_tiny: OpenTiny) -> None:
    b = open_tiny(engine=engine, policy=oldest_first, **SMALL)
    same = open_tiny(engine=engine, cull="sink_recent", **SMALL)
    for each in (b, same):
        each.prime(IDS[:20])
    one, other = b.feed(IDS[20:36]), same.feed(IDS[20:36])
    assert torch.equal(one, other)
    assert b.mirror.position.tolist() == same.mirror.position.tolist()


def test_a_name_and_the_function_are_one_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_to_name.py").write_text(
        "def score(state, look):\n    return state.surprise\n"
    )
    monkeypatch.chdir(tmp_path)
    named = custom_policy("mine_to_name:score")
    assert named.name == "mine_to_name:score"
    assert custom_policy(named.function) == named
    assert re.fullmatch("[0-9a-f]{64}", named.sha256)
    assert custom_policy(oldest_first).sha256 != custom_policy(least_watched).sha256
    assert custom_policy(Halves(0.5)).sha256 != custom_policy(Halves(0.25)).sha256


class Nameless:
    """Calls whose repr shows an address, not what it does."""

    def __call__(self, state: State, look: Look) -> Tensor:
        return state.brightness


def closed_over(share: float) -> Any:
    def policy(state: State, look: Look) -> Tensor:
        return state.brightness * share

    return policy


@pytest.mark.parametrize(
    "policy",
    [Nameless(), closed_over(0.5), functools.partial(oldest_first)],
    ids=["instance", "closure", "partial"],
)
def test_what_its_source_does_not_tell_apart_is_refused(policy: Any) -> None:
    with pytest.raises(Refused, match="values that its source does not show"):
        custom_policy(policy)


@pytest.mark.parametrize(
    "name",
    ["no.such.module:score", "math:no_such_function", "math:pi", ":score", "torch.nn:functional"],
)
def test_what_cannot_be_named_is_refused(name: str) -> None:
    with pytest.raises(Refused, match=re.escape(name)):
        custom_policy(name)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (no_such_column, r"failed at .*test_custom\.py:\d+ \(AttributeError: .*glances"),
        (wrong_shape, r"returns float32 \[3\]: it must return a tensor float32 \[24\]"),
        (wrong_type, r"returns int64 \[24\]"),
        (no_tensor, "returns float"),
        (writes, "writes to brightness"),
    ],
)
def test_what_a_policy_gets_wrong_is_one_line_with_its_place(
    wrong: CustomPolicy, said: str, open_tiny: OpenTiny
) -> None:
    with pytest.raises(Refused, match=said) as refused:
        open_tiny(policy=wrong, **SMALL)
    assert "\n" not in str(refused.value)


def test_what_cannot_be_captured_is_refused_before_anything_is_said(open_tiny: OpenTiny) -> None:
    assert len(open_tiny(policy=asks_the_host, **SMALL)) == 0
    with pytest.raises(Refused, match="cannot be captured"):
        open_tiny(policy=asks_the_host, engine="compiled", **SMALL)


def test_a_save_is_loaded_with_the_policy_that_it_was_made_with(
    open_tiny: OpenTiny, tmp_path: Path
) -> None:
    b = open_tiny(policy=oldest_first, **SMALL)
    b.prime(IDS[:20])
    b.feed(IDS[20:])
    b.save(tmp_path / "save")
    after = [b.tick().token for _ in range(5)]
    with pytest.raises(Refused, match=r"test_custom:oldest_first.*give policy="):
        brain.load(tmp_path / "save")
    with pytest.raises(Refused, match="another source"):
        brain.load(tmp_path / "save", policy=least_watched)
    loaded = brain.load(tmp_path / "save", policy=oldest_first)
    assert [loaded.tick().token for _ in range(5)] == after


def test_a_run_goes_on_only_with_the_policy_that_it_began_with(
    tiny_folder: Path, tmp_path: Path
) -> None:
    module = tmp_path / "mine_to_run.py"
    module.write_text("def score(state, look):\n    return state.surprise\n")
    run = ["prompt=hello", "cull.policy=mine_to_run:score", "capacity=24", "hydra.run.dir=run"]
    call(tmp_path, tiny_folder, *run, "ticks=30")
    said = tmp_path / "run" / "failed.txt"
    said.write_text("an earlier end")
    call(tmp_path, tiny_folder, *run, "ticks=40")
    assert not said.exists()
    module.write_text("def score(state, look):\n    return state.surprise + 1\n")
    refused = call(tmp_path, tiny_folder, *run, "ticks=50", status=2)
    assert "mine_to_run:score had another source" in refused.stderr


def test_a_run_whose_policy_fails_says_so_in_its_folder(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine_to_fail.py").write_text(
        "def score(state, look):\n"
        "    if int(look.tick) > 20:\n"
        "        raise ZeroDivisionError('no more')\n"
        "    return state.surprise\n"
    )
    run = ["prompt=hello", "cull.policy=mine_to_fail:score", "capacity=24", "hydra.run.dir=run"]
    failed = call(tmp_path, tiny_folder, *run, "ticks=50", status=2)
    assert "mine_to_fail.py:3 (ZeroDivisionError: no more)" in failed.stderr
    said = (tmp_path / "run" / "failed.txt").read_text()
    assert "mine_to_fail.py:3" in said
    assert len(said.splitlines()) == 1
