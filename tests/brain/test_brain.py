"""The public face of a brain: what it takes, what it refuses, and what its loop does."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import brain
from brain import Append, Boost, Brain, Cull, Pin, Refused, Replace, Rewind
from brain.brain import MOST_POSITIONS
from brain.tick import Step
from compiled.choose import Look
from compiled.score import Culling, cull_count
from fixture_types import OpenTiny
from toys import digest

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = [(37 * index + 11) % 300 for index in range(200)]


def everything(b: Brain) -> tuple[str, int, int]:
    return digest(*b.state, *b.cursor), len(b), b.ticks


def refusal(b: Brain, call: Callable[[], object]) -> str:
    """The one line that a call is refused with, nothing having changed."""
    before = everything(b)
    with pytest.raises(Refused) as refused:
        call()
    assert everything(b) == before
    message = str(refused.value)
    assert message
    assert "\n" not in message
    return message


# Bad input ---------------------------------------------------------------------------------------


BAD_IDS: dict[str, tuple[Any, str]] = {
    "none": ([], "empty"),
    "past the vocabulary": ([1, 300], "300 at index 1"),
    "negative": ([-1], "-1 at index 0"),
    "huge": ([1 << 80], "outside the vocabulary"),
    "bool": ([1, True], "True"),
    "float": ([1.0], "1.0"),
    "numpy float": (np.array([1.0]), "1.0"),
    "text": (["a"], "'a'"),
    "nothing": ([None], "None"),
    "a tensor of no integer": (torch.tensor([2.5]), "2.5"),
    "no list": (5, "must be a list, not 5"),
}


@pytest.mark.parametrize("case", BAD_IDS)
def test_ids_that_are_none_are_refused(case: str, either_brain: Brain) -> None:
    b = either_brain
    b.prime(IDS[:20])
    b.feed(IDS[:3])
    ids, told = BAD_IDS[case]
    assert told in refusal(b, lambda: b.prime(ids))
    assert told in refusal(b, lambda: b.feed(ids))
    assert told in refusal(b, lambda: b.read(ids))
    assert told in refusal(b, lambda: b.patch([Append(ids)]))


def test_an_empty_prompt_is_refused(either_brain: Brain) -> None:
    b = either_brain
    b.prime(IDS[:5])
    assert "empty" in refusal(b, lambda: b.prime(""))


def test_a_prompt_of_all_slots_is_remembered_whole(either_brain: Brain) -> None:
    either_brain.prime(IDS[:48])
    assert len(either_brain) == 48
    assert either_brain.ticks == 0


def test_unknown_sources_are_refused(either_brain: Brain) -> None:
    b = either_brain
    b.prime(IDS[:5])
    for call in (
        lambda: b.prime([1], source="nobody"),
        lambda: b.feed([1], source="nobody"),
        lambda: b.patch([Append([1], source="nobody")]),
    ):
        assert "'nobody'" in refusal(b, call)


def test_actions_that_are_no_lists_are_refused(either_brain: Brain) -> None:
    b = either_brain
    b.prime(IDS[:9])
    wrong: list[tuple[Any, str]] = [
        (Cull([3]), "actions must be a list"),
        ([Cull(3)], "Cull: positions must be a list, not 3"),  # type: ignore[arg-type]
        ([Replace(3, [7])], "Replace: positions must be a list"),  # type: ignore[arg-type]
        ([Replace([3], 7)], "Replace: ids must be a list, not 7"),  # type: ignore[arg-type]
        ([Pin(None)], "Pin: positions must be a list, not None"),  # type: ignore[arg-type]
    ]
    for actions, told in wrong:
        assert told in refusal(b, functools.partial(b.patch, actions))
        assert told in refusal(b, functools.partial(b.apply, actions))
    assert "read: positions must be a list" in refusal(b, lambda: b.read([1], 4))  # type: ignore[arg-type]


@pytest.mark.parametrize("ticks", [0, -1, 1.5, True, "3", torch.tensor(2.5)])
def test_fewer_than_one_tick_is_refused(ticks: Any, either_brain: Brain) -> None:
    b = either_brain
    b.prime(IDS[:5])
    assert str(ticks) in refusal(b, lambda: list(b.stream(ticks=ticks)))


def test_reads_that_make_no_sense_are_refused(either_brain: Brain) -> None:
    b = either_brain
    b.prime(IDS[:5])
    cases: list[tuple[Any, str]] = [
        ([1], "2 tokens at 1 positions"),
        ([1, 2, 3], "2 tokens at 3 positions"),
        ([4, 4], "two tokens at one position"),
        ([-1, 0], "-1"),
        ([0, MOST_POSITIONS], str(MOST_POSITIONS)),
        ([0, 1 << 80], str(1 << 80)),
        ([0, True], "True"),
        ([0, 1.0], "1.0"),
    ]
    for positions, told in cases:
        assert told in refusal(b, functools.partial(b.read, [1, 2], positions))
    assert "without tokens" in refusal(b, lambda: b.read(positions=[1]))


def test_an_unprimed_brain_refuses_to_think(open_tiny: OpenTiny) -> None:
    b = open_tiny()
    for call in (b.tick, b.read, lambda: b.feed([1]), lambda: list(b.stream(ticks=1))):
        assert "prime" in refusal(b, call)
    assert b.read([1, 2]).logits.shape == (2, 300)  # but any tokens can be read
    b.patch([Append([1, 2, 3])])
    assert len(b) == 3
    b.tick()


def test_a_full_memory_that_forgets_nothing_refuses_in_one_line(open_tiny: OpenTiny) -> None:
    b = open_tiny(cull="none", capacity=10, **{"cull.target": None})
    b.prime(IDS[:8])
    first = b.tick()  # re-reads the last token: commits nothing
    assert first.count == 8
    b.tick()
    assert b.tick().count == 10
    assert "memory is full" in refusal(b, b.tick)
    assert "memory is full" in refusal(b, lambda: b.patch([Append([1])]))
    b.patch([Cull([3])])
    assert b.tick().count == 10


def test_a_feed_that_would_not_fit_is_refused_before_it_begins(open_tiny: OpenTiny) -> None:
    b = open_tiny(cull="none", capacity=10, **{"cull.target": None})
    b.prime(IDS[:8])
    assert "memory is full" in refusal(b, lambda: b.feed(IDS[:4]))
    b.feed(IDS[:3])
    assert len(b) == 10
    assert "memory is full" in refusal(b, lambda: b.feed([1]))


def test_ids_may_be_any_integers(open_tiny: OpenTiny) -> None:
    b = open_tiny()
    b.prime(np.array([5, 6, 7], dtype=np.uint16))  # type: ignore[arg-type]
    b.patch([Append(torch.tensor([8, 9]))])  # type: ignore[arg-type]
    b.patch([Cull(b.mirror.position[1:2]), Pin([np.int32(0)])])  # type: ignore[arg-type, list-item]
    assert b.mirror.token_id.tolist() == [5, 7, 8, 9]
    b.prime(range(3))
    assert b.mirror.token_id.tolist() == [0, 1, 2]


# Opening -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "a folder",
        "it's",
        'say "hi"',
        "back\\slash",
        "ends with backslash\\",
        "größe – 模型 🦙",
        "a,b=c[d]{e}:f;g#h",
        "$HOME ${x} %s",
        "null",
        "true",
        "1e3",
        "007",
        "  spaces  ",
        "new\nline",
    ],
)
def test_any_path_can_be_opened(
    name: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_folder, tmp_path / name)
    absolute = brain.open("folder", capacity=16, **{"model.path": str(tmp_path / name)})
    assert absolute.checkpoint.name == name
    monkeypatch.chdir(tmp_path)
    relative = brain.open("folder", capacity=16, **{"model.path": name})
    assert relative.checkpoint.sha256 == absolute.checkpoint.sha256


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"capacity": 0}, "capacity"),
        ({"capacity": "many"}, "capacity"),
        ({"capacity": 1 << 60}, "GB"),
        ({"capasity": 4}, "capasity"),
        ({"dtype": "float8"}, "dtype"),
        ({"device": "toaster"}, "toaster"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"seed": 1 << 64}, "seed"),
        ({"seed": -(1 << 63) - 1}, "seed"),
        ({"engine": "steam"}, "engine"),
        ({"engine.widths": [2, 4]}, "widths"),
        ({"engine.widths": [1]}, "widths"),
        ({"engine.smallest_bucket": 0}, "smallest_bucket"),
        ({"engine.chunk": 0}, "engine.chunk"),
        ({"sampler.temperature": 0.0}, "temperature"),
        ({"sampler.temperature": float("nan")}, "temperature"),
        ({"sampler.top_k": -1}, "top_k"),
        ({"sampler.top_p": 0.0}, "top_p"),
        ({"sampler.top_p": 1.5}, "top_p"),
        ({"sampler.min_p": 1.5}, "min_p"),
        ({"sampler.repetition_penalty": 0.0}, "repetition_penalty"),
        ({"cull": "everything"}, "cull"),
        ({"cull.policy": "whim"}, "whim"),
        ({"cull.target": 49}, "cull.target"),
        ({"cull.target": 7}, "cull.target"),
        ({"cull.sinks": -1}, "sinks"),
        ({"cull.recent": 0}, "recent"),
        ({"threads": 0}, "threads"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(
    overrides: dict[str, Any], told: str, open_tiny: OpenTiny
) -> None:
    with pytest.raises(Refused) as refused:
        open_tiny(**overrides)
    message = str(refused.value)
    assert told in message
    assert "\n" not in message


@pytest.mark.parametrize("seed", [0, 1, -(1 << 63), (1 << 64) - 1])
def test_every_seed_of_64_bits_is_taken(seed: int, open_tiny: OpenTiny) -> None:
    b = open_tiny(seed=seed)
    b.prime(IDS[:5])
    b.tick()


@pytest.mark.parametrize("capacity", [1, 2, 8])
def test_the_smallest_memories_work(capacity: int, open_tiny: OpenTiny) -> None:
    """With one slot a brain remembers one token, and can still say what comes next."""
    cull = "none" if capacity < 8 else "brightness"
    b = open_tiny(capacity=capacity, cull=cull, **{"cull.target": None})
    b.prime(IDS[:capacity])
    assert len(b) == capacity
    b.tick()
    if cull == "none":
        assert "memory is full" in refusal(b, b.tick)
    else:
        assert all(tick.count == capacity for tick in b.stream(ticks=20))


# The loop ----------------------------------------------------------------------------------------


def test_prime_replaces_everything(either_brain: Brain) -> None:
    b = either_brain
    b.prime(IDS[:40])
    b.feed(IDS[:5])
    b.prime([9, 8, 7], source="tool")
    mirror = b.mirror
    assert len(b) == 3
    assert mirror.token_id.tolist() == [9, 8, 7]
    assert mirror.position.tolist() == [0, 1, 2]
    assert mirror.sources() == ["tool"] * 3
    assert mirror.born.tolist() == [0] * 3
    assert not mirror.pinned.any()
    assert b.ticks == 0
    assert b.tick().number == 1


def test_862_tokens_read_are_still_862(open_tiny: OpenTiny) -> None:
    b = open_tiny(capacity=1000, **{"cull.target": None})
    b.prime([token % 300 for token in range(862)])
    assert len(b) == int(b.state.valid.sum()) == 862
    rows = b.state.keys[:, :, b.state.valid]
    assert bool((rows != 0).any(-1).all())  # every row is filled
    b.read()
    b.read(IDS[:9])
    assert len(b) == int(b.state.valid.sum()) == 862
    assert b.tick().count == 862  # the first tick re-reads the last token
    assert b.tick().count == 863


def test_a_tick_speaks_now_and_remembers_next(either_brain: Brain) -> None:
    b = either_brain
    b.prime(IDS[:10])
    first = b.tick()
    assert (first.number, first.position, first.count, first.culled) == (1, 10, 10, ())
    assert b.mirror.token_id.tolist() == IDS[:10]
    second = b.tick()
    assert (second.number, second.position, second.count) == (2, 11, 11)
    mirror = b.mirror
    assert mirror.token_id.tolist() == [*IDS[:10], first.token]
    assert mirror.position.tolist() == list(range(11))
    assert mirror.sources() == ["user"] * 10 + ["model"]
    assert mirror.born.tolist() == [0] * 10 + [2]
    assert float(mirror.surprise[-1]) == first.surprise
    assert float(mirror.brightness[-1]) == 25.0  # the seed of what the model says


def test_a_tick_says_what_a_read_would_say(either_brain: Brain) -> None:
    """Its surprise is that of its token under the logits that a plain read shows."""
    b = either_brain
    b.prime(IDS[:10])
    for _ in range(20):
        logits = b.read().logits[0].clone()
        tick = b.tick()
        told = -float(logits.log_softmax(-1)[tick.token])
        assert tick.surprise == pytest.approx(told, abs=1e-5)  # logits of order 5, in float32


def test_greedy_says_the_likeliest(open_tiny: OpenTiny) -> None:
    b = open_tiny(sampler="greedy")
    b.prime(IDS[:10])
    for _ in range(20):
        likeliest = int(b.read().logits[0].argmax())
        assert b.tick().token == likeliest


def test_text_is_spoken_in_order_however_late_it_is_asked_for(open_tiny: OpenTiny) -> None:
    prompt, late = open_tiny(), open_tiny()
    for b in (prompt, late):
        b.prime(IDS[:10])
    spoken = [tick.text for tick in prompt.stream(ticks=30)] + [prompt.finish_text()]
    ticks = list(late.stream(ticks=30))
    asked = {tick.number: tick.text for tick in reversed(ticks)}
    assert "".join(asked[n] for n in range(1, 31)) + late.finish_text() == "".join(spoken)
    whole = prompt.decode([tick.token for tick in ticks])
    assert "".join(spoken).replace("�", "") == whole.replace("�", "")


def test_the_stream_stops_at_the_end_of_the_text_if_asked(open_tiny: OpenTiny) -> None:
    # So hot that all 300 tokens are equally likely.
    uniform = {"sampler.temperature": 1e6, "sampler.top_k": 0, "sampler.top_p": 1.0}
    b = open_tiny(**uniform)
    b.prime(IDS[:10])
    tokens = [tick.token for tick in b.stream(ticks=5000, stop_at_eos=True)]
    assert len(tokens) < 5000
    assert tokens[-1] in b.tokenizer.eos_ids
    assert not b.tokenizer.eos_ids & set(tokens[:-1])
    assert len(list(b.stream(ticks=3))) == 3


@pytest.mark.parametrize("policy", ["brightness", "sink_recent"])
def test_the_target_is_reached_and_kept(policy: str, open_tiny: OpenTiny) -> None:
    """From above and from below, by the rule of none, one or two a tick; protected rows stay."""
    for prompt in (10, 24, 25, 48):
        b = open_tiny(cull=policy)
        b.prime(IDS[:prompt])
        b.patch([Pin([5])])
        counts: list[int] = []
        for tick in b.stream(ticks=60):
            pending = int(tick.number > 1)
            before = counts[-1] if counts else prompt
            assert len(tick.culled) == cull_count(before, Culling(24))
            assert tick.count == len(b) == before - len(tick.culled) + pending
            assert len(b) == int(b.state.valid.sum())
            mirror = b.mirror
            assert {0, 1, 2, 3, 5} <= set(mirror.position.tolist())
            newest = tick.position - 1
            assert set(range(max(0, newest - 3), newest + 1)) <= set(mirror.position.tolist())
            counts.append(tick.count)
        assert counts[-20:] == [24] * 20


def test_what_is_culled_is_what_scored_lowest(either_brain: Brain) -> None:
    b = either_brain
    b.prime(IDS[:30])
    steps: list[tuple[dict[int, float], tuple[int, ...], int]] = []

    def note(step: Step) -> None:
        valid, choice = b.state.valid, step.choice
        one = torch.ones((), dtype=torch.int64)
        look = Look(step.reading.mass, step.cursor.position[0], one, step.cursor.tick + 1)
        now = b.state._replace(**choice.updates)
        told = b.settings.graphs.eviction.keep_score(now, look)[valid].tolist()
        scores = dict(zip(b.state.position[valid].tolist(), told, strict=True))
        steps.append((scores, step.tick.culled, int(step.cursor.position)))

    b.observer = note
    for _ in range(20):
        b.tick()
    b.observer = None
    for scores, culled, at in steps:
        free = [(light, p) for p, light in scores.items() if 4 <= p <= at - 4]
        assert culled == tuple(p for _, p in sorted(free)[: len(culled)])


def test_brightness_is_scored_seeded_and_boosted(either_brain: Brain) -> None:
    b = either_brain
    b.prime(IDS[:4], source="system")
    b.patch([Append(IDS[4:8], source="user"), Append(IDS[8:10], source="tool")])
    assert b.mirror.brightness.tolist() == [100.0] * 4 + [50.0] * 6
    b.patch([Boost([1, 5], 5.0), Boost([5], 2.0), Boost([2], -1000.0), Boost([3], 1e30)])
    assert b.mirror.brightness.tolist() == [100, 105, 0, 255, 50, 57, 50, 50, 50, 50]
    before = torch.from_numpy(b.mirror.brightness.copy())
    mass = b.read().mass[torch.from_numpy(b.mirror.slot)]
    b.tick()
    expected = (0.98 * before + mass * 10).clamp(max=255.0)
    torch.testing.assert_close(torch.from_numpy(b.mirror.brightness), expected, rtol=1e-5, atol=0)


def test_a_pinned_row_outlives_everything_and_a_released_one_does_not(open_tiny: OpenTiny) -> None:
    b = open_tiny(cull="sink_recent")
    b.prime(IDS[:24])
    b.patch([Pin([8, 9])])
    list(b.stream(ticks=60))
    assert [p for p in b.mirror.position.tolist() if 4 <= p < 40] == [8, 9]
    b.patch([Pin([8], pinned=False)])
    list(b.stream(ticks=2))
    assert [p for p in b.mirror.position.tolist() if 4 <= p < 40] == [9]


# Editing -----------------------------------------------------------------------------------------


def test_a_row_that_is_put_somewhere_is_born_and_bright_there_and_then(
    open_tiny: OpenTiny,
) -> None:
    b = open_tiny()
    b.prime(IDS[:12])
    list(b.stream(5))
    b.patch([Replace((6, 7), [77]), Append([1, 2])])
    mirror = b.mirror
    put = [mirror.position.tolist().index(6), len(mirror) - 2, len(mirror) - 1]
    assert mirror.token_id[put].tolist() == [77, 1, 2]
    assert mirror.born[put].tolist() == mirror.lit[put].tolist() == [b.ticks] * 3


def test_a_replaced_pair_is_read_as_of_its_place(either_brain: Brain) -> None:
    """The new row is the one that reading those tokens there would have given from the start."""
    b = either_brain
    b.prime([*IDS[:6], 77])
    wanted = int(b.mirror.slot[6])
    row = b.state.keys[:, :, wanted].clone(), b.state.values[:, :, wanted].clone()
    surprise = float(b.mirror.surprise[6])
    b.prime(IDS[:12])
    b.patch([Replace((6, 7), [77])])
    mirror = b.mirror
    assert mirror.token_id.tolist() == [*IDS[:6], 77, *IDS[8:12]]
    assert mirror.position.tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    assert mirror.sources()[6] == "repair"
    slot = int(mirror.slot[6])
    # The same sums over other slots: some dozen roundings of 2^-24, through two layers.
    torch.testing.assert_close(b.state.keys[:, :, slot], row[0], rtol=5e-5, atol=5e-5)
    torch.testing.assert_close(b.state.values[:, :, slot], row[1], rtol=5e-5, atol=5e-5)
    assert float(mirror.surprise[6]) == pytest.approx(surprise, abs=1e-4)


def test_the_pending_token_keeps_its_surprise_when_an_append_commits_it(
    either_brain: Brain,
) -> None:
    b = either_brain
    b.prime(IDS[:8])
    fed = float(b.feed([123])[0])
    b.patch([Replace([7], [250]), Append([5, 6])])
    mirror = b.mirror
    assert mirror.token_id.tolist() == [*IDS[:7], 250, 123, 5, 6]
    assert float(mirror.surprise[8]) == fed
    assert mirror.sources()[8] == "user"


def test_actions_of_a_batch_mean_positions_before_it(either_brain: Brain) -> None:
    results = []
    batch: list[Any] = [Cull([11]), Append([7, 8]), Replace([3, 4], [9]), Pin([0]), Boost([5], 1.0)]
    for actions in (batch, batch[::-1]):
        b = either_brain
        b.prime(IDS[:12])
        b.patch(actions)
        results.append(digest(*b.state, *b.cursor))
        assert b.mirror.position.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 12, 13]
        assert b.mirror.token_id.tolist()[-2:] == [7, 8]
    assert results[0] == results[1]


def test_culling_the_row_being_read_moves_the_cursor_back(either_brain: Brain) -> None:
    b = either_brain
    b.prime(IDS[:8])
    b.patch([Cull([7, 6])])
    assert int(b.cursor.position) == 5
    assert int(b.cursor.token) == IDS[5]
    assert b.tick().position == 6
    b.patch([Cull(b.mirror.position.tolist())])  # all but the pending token
    assert len(b) == 0
    tick = b.tick()  # which is read, and remembered, on its own
    assert (tick.position, tick.count) == (7, 1)
    assert b.mirror.position.tolist() == [6]


def test_culling_everything_leaves_a_brain_to_be_primed(either_brain: Brain) -> None:
    b = either_brain
    b.prime(IDS[:8])
    b.patch([Cull(list(range(8)))])
    assert len(b) == 0
    assert "prime" in refusal(b, b.tick)
    b.patch([Append([4, 5])])
    assert b.mirror.position.tolist() == [0, 1]
    b.tick()


def test_an_empty_patch_changes_nothing(either_brain: Brain) -> None:
    b = either_brain
    b.prime(IDS[:20])
    b.feed(IDS[:3])
    before = everything(b)
    b.patch([])
    b.patch([Cull([]), Pin([]), Boost([], 1.0)])
    assert everything(b) == before


def test_a_feed_tells_every_surprise(either_brain: Brain) -> None:
    b = either_brain
    b.prime(IDS[:6])
    nats = b.feed(IDS[6:16], source="tool")
    assert nats.dtype == torch.float32
    assert nats.shape == (10,)
    mirror = b.mirror
    assert mirror.sources()[6:] == ["tool"] * 9
    assert mirror.surprise[6:].tolist() == nats[:9].tolist()
    assert float(b.cursor.surprise[0]) == float(nats[9])
    assert mirror.surprise[0] == 0.0  # nothing came before it


def test_an_observer_sees_every_step_before_its_patch(either_brain: Brain) -> None:
    b = either_brain
    b.prime(IDS[:10])
    seen: list[tuple[int, int, int]] = []

    def watch(step: Step) -> None:
        assert len(b) == int(b.state.valid.sum())
        assert step.plan.keys.shape[2] == 1
        seen.append((step.tick.number, int(step.cursor.position), int(step.choice.token)))

    b.observer = watch
    ticks = list(b.stream(ticks=4))
    b.observer = None
    b.tick()
    assert seen == [(tick.number, tick.position - 1, tick.token) for tick in ticks]


def test_positions_past_the_trained_range_are_worth_one_warning(
    tiny_folder: Path, tmp_path: Path, edit_json: Callable[[Path, dict[str, Any]], None]
) -> None:
    folder = tmp_path / "short"
    shutil.copytree(tiny_folder, folder)
    edit_json(folder / "config.json", {"max_position_embeddings": 12})
    b = brain.open("folder", capacity=32, **{"model.path": str(folder)})
    b.prime(IDS[:11])
    with pytest.warns(brain.BrainWarning, match="12") as warned:
        list(b.stream(ticks=9))
    assert len([w for w in warned if w.category is brain.BrainWarning]) == 1


# Novelty -----------------------------------------------------------------------------------------


def plain_novelty(surprises: list[float], positions: list[int], decay: float) -> list[float]:
    """The mean of surprise around every token, before and after it, by its definition."""
    told = []
    for here in positions:
        near = zip(surprises, positions, strict=True)
        told.append(sum((1 - decay) * nats * decay ** abs(here - there) for nats, there in near))
    return told


@pytest.mark.parametrize("way", ["at once", "in chunks", "tick by tick", "every way"])
def test_novelty_is_the_mean_surprise_around_a_row_however_it_came(
    way: str, open_tiny: OpenTiny
) -> None:
    b = open_tiny(cull="none", **{"engine.widths": [1, 4] if way == "in chunks" else [1, 48]})
    if way in ("at once", "in chunks"):
        b.prime(IDS[:40])
    elif way == "tick by tick":
        b.prime(IDS[:2])
        b.feed(IDS[2:40])
    else:
        b.prime(IDS[:9])
        b.feed(IDS[9:15])
        b.patch([Append(IDS[15:22])])
        b.feed(IDS[22:30])
        b.patch([Append(IDS[30:31]), Pin([3])])
        b.feed(IDS[31:40])
    mirror = b.mirror
    expected = plain_novelty(mirror.surprise.tolist(), mirror.position.tolist(), decay=0.9)
    assert mirror.novelty.tolist() == pytest.approx(expected, rel=1e-5)


def test_what_is_forgotten_was_heard(open_tiny: OpenTiny) -> None:
    """Novelty is what it was when the passage was whole, whatever is left of it."""
    b = open_tiny(cull="none")
    b.prime(IDS[:30])
    before = dict(zip(b.mirror.position.tolist(), b.mirror.novelty.tolist(), strict=True))
    b.patch([Cull([3, 4, 10, 11, 12])])
    after = zip(b.mirror.position.tolist(), b.mirror.novelty.tolist(), strict=True)
    assert all(before[position] == novelty for position, novelty in after)


def test_an_edit_wider_than_every_graph_is_called_directly(open_tiny: OpenTiny) -> None:
    """As shipped, a chunk is wider than the widths: such edits are neither captured nor refused."""
    options = {"engine.widths": [1, 4], "engine.chunk": 16, "cull": "none"}
    captured, plain = (open_tiny(engine=engine, **options) for engine in ("compiled", "eager"))
    for b in (captured, plain):
        b.prime(IDS[:6])
        b.tick()
        b.patch([Append(IDS[6:16])])
        b.patch([Replace((2, 3), IDS[16:18]), Append(IDS[18:27])])
    names = list(captured.graphs.captured)
    assert not [name for name in names if name.startswith("patch tick") and name[-3:] != "W=1"]
    for name, column in plain.mirror.columns.items():
        if column.dtype.kind == "f":
            np.testing.assert_allclose(captured.mirror.columns[name], column, rtol=1e-4, atol=1e-4)
        else:
            np.testing.assert_array_equal(captured.mirror.columns[name], column, name)
    assert [captured.tick().token for _ in range(4)] == [plain.tick().token for _ in range(4)]


# What it is given ---------------------------------------------------------------------------------

END = "<|end|>"  # id 0


def test_special_tokens_in_a_text_are_control_tokens_unless_a_tool_says_them(
    open_tiny: OpenTiny,
) -> None:
    b = open_tiny()
    as_text = b.tokenizer.encode(END, special=False)
    assert (b.encode(END), b.encode(END, "tool")) == ([0], as_text)
    assert (b.encode(END, special=False), b.encode(END, "tool", special=True)) == (as_text, [0])
    for source, ids in (("user", [0]), ("tool", as_text)):
        b.prime(f"a{END}", source)
        assert b.mirror.token_id.tolist() == [*b.encode("a"), *ids]
        b.feed(END, source)
        assert (b.ticks, b.cursor.token.tolist()) == (len(ids), ids[-1:])
    for rule, ids in ((True, [0]), (False, as_text)):
        ruled = open_tiny(special=rule)
        assert ruled.encode(END, "tool") == ruled.encode(END, "user") == ids


def test_a_fed_text_is_what_encode_makes_of_it(eager_brain: Brain) -> None:
    told = []
    for given in ("hello all", eager_brain.encode("hello all")):
        eager_brain.prime(IDS[:5])
        told.append((eager_brain.feed(given).tolist(), everything(eager_brain)))
    assert told[0] == told[1]


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple], ids=["numpy", "torch", "tuple"])
def test_ids_and_positions_may_be_arrays(kind: Any, eager_brain: Brain) -> None:
    eager_brain.prime(kind(IDS[:6]))
    assert eager_brain.mirror.token_id.tolist() == IDS[:6]
    amount: Any = np.float32(0.5)
    eager_brain.patch([Pin(kind([1, 2])), Append(kind(IDS[6:8])), Boost([0], amount)])
    eager_brain.feed(kind(IDS[8:10]))
    assert eager_brain.mirror.pinned.tolist()[:3] == [False, True, True]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (b"abc", "decode them first"),
        (bytearray(b"abc"), "decode them first"),
        (memoryview(b"abc"), "decode them first"),
        (np.array([1.0, 2.0]), "not an integer token id"),
        (torch.tensor([True]), "not an integer token id"),
        (np.array([[1, 2]]), "not an integer token id"),
        (torch.tensor(3), "must be a list"),
        ({1, 2}, "have no order; give a list"),
        ({1: 2}, "have no order; give a list"),
    ],
    ids=["bytes", "bytearray", "memoryview", "floats", "flags", "2D", "number", "set", "dict"],
)
def test_what_may_not_be_ids_is_refused_in_one_line(
    given: Any, told: str, eager_brain: Brain
) -> None:
    eager_brain.prime(IDS[:5])
    before = everything(eager_brain)
    for call in (eager_brain.prime, eager_brain.feed, lambda ids: eager_brain.patch([Append(ids)])):
        with pytest.raises(Refused, match=told):
            call(given)
    with pytest.raises(Refused, match="encode it first"):
        eager_brain.patch([Append("text")])  # type: ignore[arg-type]
    with pytest.raises(Refused, match="did you mean user"):
        eager_brain.prime(IDS[:5], "usr")
    assert everything(eager_brain) == before


def test_a_rewound_brain_stands_where_it_stood(either_brain: Brain) -> None:
    """On the row that was last then: the same logits, the same next tick as far as the tick's
    number lets it; what came after is forgotten, the pending token too.
    """
    b = either_brain
    b.prime(IDS[:20])
    before, expected = b.mirror, b.read().logits
    for _ in range(3):
        b.tick()
    b.patch([Pin(b.mirror.position[-1:].tolist())])
    last = int(before.position[-1])
    b.patch([Rewind(last)])
    assert b.mirror.position.tolist() == before.position.tolist()
    assert b.mirror.token_id.tolist() == before.token_id.tolist()
    assert not b.memory.account.uncommitted
    assert int(b.cursor.position[0]) == last
    assert int(b.cursor.token[0]) == before.token_id[-1]
    torch.testing.assert_close(b.read().logits, expected, rtol=1e-4, atol=1e-4)
    b.feed(IDS[20:24])
    assert b.mirror.token_id[:23].tolist() == IDS[:23]
    b.patch([Rewind(4)])
    assert b.mirror.position.tolist() == list(range(5))
    b.tick()


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([Rewind(99)], "99"),
        ([Rewind("last")], "not an integer"),  # type: ignore[arg-type]
        ([Rewind(3), Rewind(4)], "a batch can hold one"),
        ([Rewind(3), Append([5])], "cannot put tokens there too"),
        ([Rewind(3), Cull([5])], "removed twice"),
        ([Rewind(3), Boost([5], 1.0)], "both removed and changed"),
    ],
)
def test_a_rewind_that_cannot_be_is_refused(
    eager_brain: Brain, actions: list[Any], message: str
) -> None:
    b = eager_brain
    b.prime(IDS[:10])
    b.tick()
    before = (b.mirror.position.tolist(), b.memory.account)
    with pytest.raises(Refused, match=message):
        b.patch(actions)
    assert (b.mirror.position.tolist(), b.memory.account) == before
