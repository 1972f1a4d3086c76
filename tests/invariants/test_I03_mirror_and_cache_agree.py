"""I3: mirror and cache agree after any sequence of actions, captured or eager."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from brain import Append, Boost, Brain, Cull, Pin, Redact, Refused, Replace
from brain.mirror import SOURCES
from brain.tick import Step
from fixture_types import OpenTiny
from histories import IDS, VOCABULARY, everything

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::brain.BrainWarning"),  # nothing here is worth one
]
SMALL = {
    "capacity": 12,
    "cull.target": 10,
    "cull.sinks": 1,
    "cull.recent": 2,
    "engine.widths": [1, 4],
}
MOST_PINNED = 10 - 1 - 2 - 2  # what leaves two rows to cull beside sinks and recent rows
TOKEN = st.integers(0, VOCABULARY - 1)
SOURCE = st.sampled_from(SOURCES)


class BrainMachine(RuleBasedStateMachine):
    """Everything a caller can do, in any order, beside a dictionary of what should be there."""

    b: Brain  # one for all examples; priming makes it new

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, Any]] = {}  # by position
        self.pending: dict[str, Any] | None = None
        self.at = -1  # position of the token that the next tick reads
        self.ticks = 0
        self.most = 0  # rows ever held

    def expected_at(self) -> int:
        return max(self.rows, default=-1)

    @initialize(ids=st.lists(TOKEN, min_size=1, max_size=12), source=SOURCE)
    def start(self, ids: list[int], source: str) -> None:
        self.prime(ids, source)

    @rule(ids=st.lists(TOKEN, min_size=1, max_size=12), source=SOURCE)
    def prime(self, ids: list[int], source: str) -> None:
        self.b.prime(ids, source)
        self.rows = {
            position: {"token": token, "source": source, "born": 0}
            for position, token in enumerate(ids)
        }
        self.pending, self.at, self.ticks = None, len(ids) - 1, 0
        self.most = len(ids)

    @rule(
        data=st.data(),
        ids=st.lists(TOKEN, max_size=5),
        source=SOURCE,
    )
    def patch(self, data: st.DataObject, ids: list[int], source: str) -> None:
        """A batch of any actions on different rows."""
        positions = sorted(self.rows)
        uses = st.sampled_from(["keep"] * 4 + ["cull", "redact", "pin", "release", "boost"])
        use = {position: data.draw(uses) for position in positions}
        actions: list[Any] = []
        after = {position: dict(row) for position, row in self.rows.items()}
        replacing: bool = data.draw(st.booleans(), "replace")
        if positions and replacing:
            first = data.draw(st.integers(0, len(positions) - 1))
            run = positions[first : first + data.draw(st.integers(1, 3))]
            put: list[int] = data.draw(st.lists(TOKEN, min_size=1, max_size=len(run)), "put")
            actions.append(Replace(run, put))
            for position in run:
                del use[position], after[position]
            for position, token in zip(run, put, strict=False):
                after[position] = {"token": token, "source": "repair", "born": self.ticks}
        for kind, make in (
            ("cull", Cull),
            ("redact", Redact),
            ("pin", Pin),
            ("release", lambda where: Pin(where, pinned=False)),
            ("boost", lambda where: Boost(where, 3.0)),
        ):
            chosen = data.draw(st.permutations([p for p, u in use.items() if u == kind]))
            if chosen:
                actions.append(make(chosen))
            for position in chosen:
                if kind in ("cull", "redact"):
                    del after[position]
                elif kind in ("pin", "release"):
                    after[position]["pinned"] = kind == "pin"
        pinned = sum(row.get("pinned", False) for row in after.values())
        if ids:
            actions.append(Append(ids, source))
            if self.pending is not None:
                after[self.at] = self.pending
            for offset, token in enumerate(ids):
                after[self.at + 1 + offset] = {
                    "token": token, "source": source, "born": self.ticks,
                }  # fmt: skip
        actions = data.draw(st.permutations(actions), "order")
        if len(after) > 12 or self.too_much(actions) or self.too_pinned(pinned, actions):
            self.refused(lambda: self.b.patch(actions))
            return
        self.b.patch(actions)
        self.rows = after
        if ids:
            self.at, self.pending = self.at + len(ids), None
        elif self.pending is None:
            self.at = self.expected_at()
        self.most = max(self.most, len(after))

    def too_much(self, actions: list[Any]) -> bool:
        """Whether one patch of this brain, four rows wide, cannot do it all at once."""
        new = sum(len(a.ids) for a in actions if isinstance(a, Append | Replace))
        if self.pending is not None and any(isinstance(a, Append) for a in actions):
            new += 1
        redacted = sum(len(a.positions) for a in actions if isinstance(a, Redact))
        removes = any(isinstance(a, Cull | Redact | Replace) for a in actions)
        return redacted > 4 or (removes and new > 4)

    def too_pinned(self, pinned: int, actions: list[Any]) -> bool:
        return pinned > MOST_PINNED and any(isinstance(a, Pin) and a.pinned for a in actions)

    def refused(self, call: Callable[[], object]) -> None:
        before, count = everything(self.b), len(self.b)
        with pytest.raises(Refused):
            call()
        assert (everything(self.b), len(self.b)) == (before, count)

    @rule(token=st.none() | TOKEN, source=SOURCE)
    @precondition(lambda self: self.at >= 0)
    def tick(self, token: int | None, source: str) -> None:
        """Sampled, or fed."""
        steps: list[Step] = []
        self.b.observer = steps.append
        if token is None:
            self.b.tick()
        else:
            self.b.feed([token], source)
        self.b.observer = None
        tick = steps[0].tick
        count = len(self.rows)
        assert len(tick.culled) == (0 if count < 10 else 1 if count == 10 else 2)
        for position in tick.culled:
            row = self.rows.pop(position)
            assert not row.get("pinned", False)
            assert 1 <= position <= self.at - 2
        if self.pending is not None:
            self.rows[self.at] = self.pending | {"born": self.ticks + 1}
        self.at += 1
        self.ticks += 1
        self.pending = {
            "token": tick.token,
            "source": "model" if token is None else source,
            "surprise": tick.surprise,
            "born": self.ticks,
        }
        assert token is None or tick.token == token
        assert (tick.number, tick.position, tick.count) == (self.ticks, self.at, len(self.rows))
        self.most = max(self.most, len(self.rows))

    @rule()
    @precondition(lambda self: self.at < 0)
    def tick_of_nothing(self) -> None:
        self.refused(self.b.tick)
        self.refused(self.b.read)

    @rule(at=st.integers(0, 30))
    def read(self, at: int) -> None:
        before = everything(self.b)
        self.b.read([1, 2], [at, at + 1])
        assert everything(self.b) == before

    @rule()
    def look_up_rows(self) -> None:
        """Now and then: ticks are followed some later, and together."""
        assert_index_agrees(self.b)

    @invariant()
    def mirror_cache_and_model_agree(self) -> None:
        state, mirror = self.b.state, self.b.mirror
        assert len(self.b) == len(mirror) == int(state.valid.sum()) == len(self.rows)
        assert mirror.position.tolist() == sorted(self.rows)  # unique, and in text order
        rows = [self.rows[position] for position in sorted(self.rows)]
        assert mirror.token_id.tolist() == [row["token"] for row in rows]
        assert mirror.sources() == [row["source"] for row in rows]
        assert mirror.pinned.tolist() == [row.get("pinned", False) for row in rows]
        assert mirror.born.tolist() == [row["born"] for row in rows]
        for row, surprise in zip(rows, mirror.surprise.tolist(), strict=True):
            assert surprise == row.get("surprise", surprise)
        # What the host thinks it need not ask the device for:
        assert int(self.b.cursor.position) == self.at
        assert int(self.b.cursor.uncommitted) == (self.pending is not None)
        assert int(self.b.cursor.tick) == self.b.ticks == self.ticks
        if self.pending is not None:
            assert int(self.b.cursor.token) == self.pending["token"]
        elif self.at >= 0:
            assert int(self.b.cursor.token) == self.rows[self.at]["token"]
        occupied = torch.nonzero(state.valid)[:, 0].tolist()
        assert max(occupied, default=-1) < self.most  # the high-water mark


def assert_index_agrees(b: Brain) -> None:
    """The host's index of rows is that of the mirror."""
    b.loop.settle()
    index, mirror = b.loop.index, b.mirror
    index.update()
    positions = mirror.position.tolist()
    assert index.positions == positions
    assert [index.slot_of(position) for position in positions] == mirror.slot.tolist()
    assert index.pinned == set(mirror.position[mirror.pinned].tolist())
    assert index.last() == max(positions, default=None)
    free = torch.nonzero(~b.state.valid)[:, 0].tolist()
    assert index.lowest_free(len(free)) == free


def test_I3_mirror_and_cache_agree_after_anything(open_tiny: OpenTiny) -> None:
    BrainMachine.b = open_tiny(**SMALL)
    run_state_machine_as_test(
        BrainMachine, settings=settings(max_examples=120, stateful_step_count=15)
    )


def test_I3_captured_and_eager_brains_hold_the_same(eager_brain: Brain, warm_brain: Brain) -> None:
    """The same calls, the same slots, ids and positions; floats but for rounding."""
    for calls in (1, 2):
        for b in (eager_brain, warm_brain):
            b.prime(IDS[:20], source="system")
            b.patch([Cull([3, 4, 9]), Replace([11, 12], [77]), Pin([6]), Boost([7], 20.0)])
            b.patch([Boost(list(range(13, 19)), 1.0)])  # a wider graph
            b.feed(IDS[30:34])
            b.patch([Append(IDS[40:43], source="tool"), Redact([15, 16])])
            b.feed(IDS[100 : 100 + 20 * calls], source="model")
        eager, captured = eager_brain.state, warm_brain.state
        assert eager.valid.equal(captured.valid)
        held = torch.nonzero(eager.valid)[:, 0]  # what lies in free slots is nobody's
        for name in ("token_id", "position", "source", "born", "pinned"):
            assert getattr(eager, name)[held].equal(getattr(captured, name)[held]), name
        for name in ("keys", "values", "brightness", "surprise"):
            ours, theirs = getattr(captured, name), getattr(eager, name)
            axis = 2 if ours.dim() == 4 else 0
            # Two layers of float32: see test_captured_and_eager_reads_agree.
            torch.testing.assert_close(
                ours.index_select(axis, held), theirs.index_select(axis, held),
                rtol=1e-4, atol=1e-4, msg=name,
            )  # fmt: skip
