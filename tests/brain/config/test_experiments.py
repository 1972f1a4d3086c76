"""The ready combinations of settings: what each sets, and what a key beside it does."""

from pathlib import Path

import pytest

import conf
from brain.auto import plainest
from brain.config.compose import compose_conf
from brain.config.settings import settings_of
from conf.schema import DType, Positions, WeightFormat

FOLDER = Path(conf.__file__).parent / "experiment"


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_every_combination_is_possible(name: str) -> None:
    settings_of(plainest(compose_conf([f"experiment={name}", "device=cpu"])))


def test_what_they_set() -> None:
    endless = compose_conf(["experiment=endless"])
    assert (endless.capacity, endless.positions) == (512, Positions.rebase)
    fast = compose_conf(["experiment=fast"])
    assert (fast.dtype, fast.weights) == (DType.bfloat16, WeightFormat.int8)
    assert compose_conf(["experiment=quotes"]).lookup.width > 0


def test_a_key_beside_one_wins_and_none_is_recorded() -> None:
    assert compose_conf(["experiment=endless", "capacity=300"]).capacity == 300
    assert not hasattr(compose_conf(["experiment=fast"]), "experiment")
