"""A journal tells what was written, whatever a crash left at its end."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from brain.errors import Refused
from brain.record.journal import Journal, read_journal

RECORDS: list[Any] = [{"said": 7}, {"heard": "ä\udcff\n", "inbox": 3}, [], None, "x" * 5000]


def written(path: Path, records: list[Any] = RECORDS) -> bytes:
    journal = Journal(path)
    for record in records:
        journal.add(record)
    journal.close()
    return path.read_bytes()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    content = written(tmp_path / "j", RECORDS[:3])
    assert read_journal(tmp_path / "j") == (RECORDS[:3], len(content))
    assert content.count(b"\n") == 3


def test_a_torn_last_line_was_never_begun(tmp_path: Path) -> None:
    content = written(tmp_path / "j", RECORDS[:3])
    ends = [n + 1 for n, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(len(content) + 1):
        (tmp_path / "torn").write_bytes(content[:cut])
        whole = sum(end <= cut for end in ends)
        size = ends[whole - 1] if whole else 0
        assert read_journal(tmp_path / "torn") == (RECORDS[:whole], size)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_before_the_end_is_refused(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.unlink(missing_ok=True)
    content = bytearray(written(path, RECORDS[:3]))
    first = content.index(b"\n")
    place = data.draw(st.integers(0, first - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[place]))
    content[place] = other
    path.write_bytes(content)
    with pytest.raises(Refused, match="damaged at line 1"):
        read_journal(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(content)
    try:
        records, size = read_journal(path)
    except Refused:
        return
    assert size <= len(content)
    assert not records  # no bytes at random carry their own checksum


def test_a_missing_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="cannot be read"):
        read_journal(tmp_path / "nothing")
