"""I1: a read leaves every byte of the state as it is, and every address where it was."""

import itertools
from collections.abc import Callable

import pytest

from brain import Brain
from compiled.read import Reading
from fixture_types import OpenTiny
from histories import IDS, everything, mixed_up
from toy_models import PARROT_TEXT
from toys import digest, raw_bytes

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::brain.BrainWarning"),  # nothing here is worth one
]
READS: dict[str, Callable[[Brain], Reading]] = {
    "the pending token": lambda b: b.read(),
    "one token": lambda b: b.read([5]),
    "as of the past": lambda b: b.read([5], [7]),
    "a cached row": lambda b: b.read([int(b.mirror.token_id[2])], [int(b.mirror.position[2])]),
    "two tokens": lambda b: b.read([5, 6]),
    "a chunk": lambda b: b.read(IDS[:16]),
    "wider than the chunk": lambda b: b.read(IDS[:40]),
    "out of order": lambda b: b.read([5, 6, 7], [50, 2, 13]),
}


@pytest.mark.parametrize("case", READS)
def test_I1_a_read_leaves_every_byte_and_address(case: str, either_brain: Brain) -> None:
    b = mixed_up(either_brain)
    held = (*b.state, *b.cursor, *b.checkpoint.weights.tensors(), *b.graphs.sampling)
    before = digest(*held)
    versions = [tensor._version for tensor in held]
    where = [tensor.data_ptr() for tensor in held]
    count = len(b)
    reading = READS[case](b)
    assert digest(*held) == before
    assert [tensor._version for tensor in held] == versions
    assert [tensor.data_ptr() for tensor in (*b.state, *b.cursor)] == where[
        : len(b.state) + len(b.cursor)
    ]
    assert len(b) == count == int(b.state.valid.sum())
    storages = {tensor.untyped_storage().data_ptr() for tensor in held}
    assert not any(tensor.untyped_storage().data_ptr() in storages for tensor in reading)


def test_I1_reading_again_reads_the_same(either_brain: Brain) -> None:
    b = mixed_up(either_brain)
    for read in READS.values():
        first, again = read(b), read(b)
        assert [raw_bytes(tensor) for tensor in first] == [raw_bytes(tensor) for tensor in again]


def test_I1_no_read_changes_what_the_loop_says(open_tiny: OpenTiny) -> None:
    plain, curious = mixed_up(open_tiny()), mixed_up(open_tiny())
    for read in itertools.islice(itertools.cycle(READS.values()), 20):
        read(curious)
        assert curious.tick().token == plain.tick().token
    assert everything(curious) == everything(plain)


def test_I1_looking_up_and_reading_ahead_write_no_byte(warm_parrot: Brain) -> None:
    b = warm_parrot
    b.prime(PARROT_TEXT)
    list(b.stream(30))
    held = (*b.state, *b.cursor, *b.checkpoint.weights.tensors(), *b.graphs.sampling)
    before, where = digest(*held), [tensor.data_ptr() for tensor in held]
    proposal = b.graphs.propose()
    assert int(proposal.length) > 0
    told = digest(*proposal)
    b.graphs.step_ahead(proposal, b._unforced_ahead, high_water=b.memory.account.high_water)
    b.graphs.propose()
    assert digest(*held) == before
    assert [tensor.data_ptr() for tensor in held] == where
    assert digest(*proposal) == told
