"""What the machine has left, and what is done to need less of it."""

import ctypes
import gc

import pytest
import torch

from brain.machine.memory import free_bytes, give_back_freed, without_collection


def test_nothing_is_collected_within_and_all_is_as_before_after() -> None:
    assert gc.isenabled()
    with without_collection():
        assert not gc.isenabled()
        with without_collection():
            pass
        assert not gc.isenabled()  # the outer one still holds
    assert gc.isenabled()
    with pytest.raises(KeyError), without_collection():
        raise KeyError
    assert gc.isenabled()


def test_free_memory_is_some_of_the_machine_s() -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is not None
    with open("/proc/meminfo", encoding="ascii") as meminfo:
        total = int(meminfo.readline().split()[1]) * 1024
    assert 0 < free < total


def test_a_library_that_cannot_give_back_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    give_back_freed()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    give_back_freed()
