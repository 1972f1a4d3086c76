"""Folders that contradict themselves are read as transformers reads them, or a line names both."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from contradicting_folders import REFUSED, SAME, THEIRS_FAILS, folder_of, outcome

FOLDERS = 60


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products take longest where threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("seed", range(FOLDERS))
def test_the_reference_is_followed_or_both_places_are_named(seed: int, tmp_path: Path) -> None:
    folder = folder_of(seed)
    assert outcome(folder, tmp_path) in (SAME, REFUSED, THEIRS_FAILS), folder.told
