"""I13: a redacted row leaves nothing behind, in the state or in later saves."""

from pathlib import Path

import pytest

from brain import Brain, Redact
from histories import IDS, said
from toys import raw_bytes

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::brain.BrainWarning"),  # nothing here is worth one
]


def holds(folder: Path, needle: bytes) -> bool:
    return any(needle in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_I13_a_redacted_row_leaves_nothing_behind(either_brain: Brain, tmp_path: Path) -> None:
    b = either_brain
    secret = 251
    b.prime([*IDS[:8], secret, *IDS[9:20]])
    b.feed(IDS[30:33])
    slot = int(b.mirror.slot[8])
    traces = [
        raw_bytes(rows[layer, head, slot])
        for rows in (b.state.keys, b.state.values)
        for layer in range(rows.shape[0])
        for head in range(rows.shape[1])
    ]
    traces.append(raw_bytes(b.state.surprise[slot]))
    b.save(tmp_path / "before")
    assert all(holds(tmp_path / "before", trace) for trace in traces)

    b.patch([Redact([8])])
    assert not b.state.valid[slot]
    for name, tensor in b.state._asdict().items():
        row = tensor[:, :, slot] if tensor.dim() == 4 else tensor[slot]
        assert (row == (-1 if name in ("token_id", "position") else 0)).all(), name
        whole = raw_bytes(tensor)
        assert not any(trace in whole for trace in traces[:-1]), name
    assert secret not in b.state.token_id
    b.save(tmp_path / "after")
    assert not any(holds(tmp_path / "after", trace) for trace in traces)
    said(b, 3)  # and the brain thinks on


def test_I13_redacting_the_row_being_read_moves_the_cursor(either_brain: Brain) -> None:
    b = either_brain
    secret = 251
    b.prime([*IDS[:8], secret])
    b.patch([Redact([8])])
    assert secret not in b.cursor.token.tolist()
    assert int(b.cursor.position) == 7
    assert len(b) == 8
    assert b.tick().position == 8
