"""Several tokens in one pass say what the same tokens one by one say, whatever happens."""

import contextlib
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

import brain
from brain import Append, Brain, Cull, Pin, Refused
from brain.record.commands import send
from brain.record.run_record import RunRecord
from brain.tick import Step, Tick
from compiled.lookup import Proposal
from compiled.state import ROW_COLUMNS
from fixture_types import OpenTiny
from killed_runs import ORDERS, RECORD, Killed, power_cut_at, was_sent
from processes import call
from toys import digest

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = [(37 * index + 11) % 300 for index in range(200)]
PERIOD = [7, 70, 170, 34, 9]
TEXT = [12, 13, 14, 10, 11, *PERIOD, 12, 13, 14]
ROOMY = {"capacity": 160, "cull.target": None, "cull": "none"}
LOOKUP = {"lookup": "ngram", "lookup.width": 3, "lookup.window": 8}


def pair(open_parrot: OpenTiny, **options: Any) -> tuple[Brain, Brain]:
    """One brain that looks up, and one that does not."""
    return open_parrot(**{**options, **LOOKUP}), open_parrot(**options)


def assert_alike(mine: Brain, other: Brain) -> None:
    """The same rows and cursor, but for rounding: other shapes sum float32 in another order."""
    a, b = mine.mirror, other.mirror
    for name in ("slot", *ROW_COLUMNS):
        one, two = getattr(a, name), getattr(b, name)
        if one.dtype.kind == "f":
            assert one.tolist() == pytest.approx(two.tolist(), rel=1e-4, abs=1e-4), name
        else:
            assert one.tolist() == two.tolist(), name
    assert (len(mine), mine.ticks) == (len(other), other.ticks)
    assert mine.memory.account.position == other.memory.account.position
    assert int(mine.cursor.token) == int(other.cursor.token)
    assert int(mine.cursor.tick) == int(other.cursor.tick) == mine.ticks


@pytest.mark.parametrize("options", [{"sampler": "greedy"}, {}, {"seed": 5}], ids=str)
def test_the_same_tokens_with_and_without(options: dict[str, Any], open_parrot: OpenTiny) -> None:
    quick, plain = pair(open_parrot, **ROOMY, **options)
    for b in (quick, plain):
        b.prime(TEXT)
    said, alone = list(quick.stream(100)), list(plain.stream(100))
    assert [tick.token for tick in said] == [tick.token for tick in alone]
    for mine, other in zip(said, alone, strict=True):
        assert (mine.number, mine.position, mine.count) == (
            other.number,
            other.position,
            other.count,
        )
        assert mine.surprise == pytest.approx(other.surprise, abs=1e-4)
        assert mine.culled == other.culled == ()
        assert mine.text == other.text
    assert_alike(quick, plain)
    account = quick.lookahead.counts
    assert account.tokens == 100
    assert account.passes + account.accepted == 100
    assert account.accepted > 20
    assert plain.lookahead.counts.proposed == 0


def test_a_memory_that_forgets_is_read_token_by_token(open_parrot: OpenTiny) -> None:
    quick, plain = pair(open_parrot, sampler="greedy", repair="pairs", **{"repair.every": 5})
    for b in (quick, plain):
        b.prime(TEXT)
    said, alone = list(quick.stream(60)), list(plain.stream(60))
    assert [tick.token for tick in said] == [tick.token for tick in alone]
    assert [tick.culled for tick in said] == [tick.culled for tick in alone]
    assert [tick.repaired for tick in said] == [tick.repaired for tick in alone]
    assert any(tick.culled for tick in said)
    assert any(tick.width == 4 for tick in said)
    full = next(index for index, tick in enumerate(said) if tick.culled)
    assert all(tick.width == 1 for tick in said[full:])
    assert_alike(quick, plain)


def test_renumbered_positions_change_nothing(
    open_parrot: OpenTiny, save_parrot: Any, tmp_path: Path
) -> None:
    save_parrot(tmp_path / "short", max_position_embeddings=64)
    options = {"model.path": str(tmp_path / "short"), "capacity": 48, "cull.target": 44}
    options |= {"positions": "rebase", "sampler": "greedy"}
    quick, plain = pair(open_parrot, **options)
    told: dict[Brain, list[tuple[int, int, bool]]] = {quick: [], plain: []}
    for b, log in told.items():
        b.prime(TEXT)
        for ticks in (27, 30, 30):
            log += [(tick.token, tick.position, tick.rebased) for tick in b.stream(ticks)]
            b.patch([Cull(b.mirror.position[5:-9].tolist())])  # room to look up again
    assert told[quick] == told[plain]
    assert any(rebased for _, _, rebased in told[quick])
    assert_alike(quick, plain)
    assert quick.lookahead.counts.accepted > 9


def test_everything_else_may_happen_in_between(open_parrot: OpenTiny) -> None:
    quick, plain = pair(open_parrot, **ROOMY)
    draw = random.Random(1)
    told: dict[Brain, list[Any]] = {quick: [], plain: []}
    for b, log in told.items():
        draw.seed(1)
        b.prime(TEXT)
        for _ in range(10):
            log += [tick.token for tick in b.stream(draw.randrange(1, 7))]
            match draw.randrange(5):
                case 0:
                    log.append(b.tick().token)
                case 1:
                    b.patch([Append(PERIOD[:3]), Pin([2])])
                case 2:
                    b.patch([Cull(b.mirror.position[7:9].tolist())])
                case 3:
                    log += [round(float(n), 3) for n in b.feed(PERIOD)]
                case 4:
                    b.read(IDS[:3])
    assert told[quick] == pytest.approx(told[plain], abs=2e-3)
    assert_alike(quick, plain)
    assert quick.lookahead.counts.accepted > 3


def test_a_memory_that_forgets_nothing_is_filled_to_the_last_slot(open_parrot: OpenTiny) -> None:
    quick, plain = pair(open_parrot, **{**ROOMY, "capacity": 40}, sampler="greedy")
    said = []
    for b in (quick, plain):
        b.prime(TEXT)
        tokens: list[int] = []
        stream = b.stream()
        with pytest.raises(Refused, match="memory is full"):
            tokens.extend(tick.token for tick in stream)
        said.append(tokens)
        assert len(b) == 40
    assert said[0] == said[1]
    assert len(said[0]) == 40 - len(TEXT) + 1
    assert quick.lookahead.counts.accepted > 3


def lived(b: Brain, seed: int) -> list[list[int]]:
    """What a brain says, pass by pass, while this and that happens to it."""
    dice = random.Random(seed)
    b.prime(TEXT)
    told = []
    while len(b) < 130:
        deed = dice.random()
        if deed < 0.92:
            told.append([tick.token for tick in b.speak(dice.choice([None, None, 2, 1]))])
        elif deed < 0.95:
            b.feed(dice.choice([PERIOD, PERIOD[:2], dice.choices(range(300), k=3)]))
        elif deed < 0.98:
            b.patch([Cull(dice.sample(b.mirror.position.tolist()[:-1], 2))])
        else:
            b.patch([Append(dice.choices(range(300), k=2))])
    return told


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_missed_where_no_search_is_made(
    seed: int, open_parrot: OpenTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host leaves out searches that would find nothing: the same passes, to the bit."""
    sure, thrifty = (open_parrot(**ROOMY, **LOOKUP, sampler="greedy") for _ in range(2))
    monkeypatch.setattr(sure.lookahead, "_may_find", lambda ticks: True)
    searches: list[Brain] = []

    def counted(b: Brain) -> None:
        search = b.graphs.propose

        def propose() -> Proposal:
            searches.append(b)
            return search()

        monkeypatch.setattr(b.graphs, "propose", propose)

    for b in (sure, thrifty):
        counted(b)
    passes = lived(sure, seed)
    assert lived(thrifty, seed) == passes
    assert digest(*sure.state, *sure.cursor) == digest(*thrifty.state, *thrifty.cursor)
    assert any(len(said) > 1 for said in passes)
    assert searches.count(thrifty) < searches.count(sure)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_more_is_said_than_was_asked_for(most: int, open_parrot: OpenTiny) -> None:
    quick, plain = pair(open_parrot, **ROOMY, sampler="greedy")
    for b in (quick, plain):
        b.prime(TEXT)
    passes = [quick.speak(most) for _ in range(20)]
    assert all(1 <= len(ticks) <= most for ticks in passes)
    assert max(map(len, passes)) == most
    tokens = [tick.token for ticks in passes for tick in ticks]
    assert tokens == [tick.token for tick in plain.stream(len(tokens))]
    assert_alike(quick, plain)
    with pytest.raises(Refused, match="at least 1"):
        quick.speak(0)


def test_what_an_observer_sees_is_no_gap_in_what_is_known(open_parrot: OpenTiny) -> None:
    """It may leave amid a tick."""
    b = open_parrot(**ROOMY, **LOOKUP, sampler="greedy")
    for number in range(1, 5):
        b.prime(TEXT)
        b.speak()
        seen: list[Step] = []

        def watch(step: Step, seen: list[Step] = seen, number: int = number) -> None:
            seen.append(step)
            if len(seen) == number:
                b.observer = None

        b.observer = watch
        while len(b) < 120:
            b.speak()
            known = b.lookahead._known
            if known and known.account is b.memory.account and not known.neighbours.repeat:
                assert int(b.graphs.propose().length) == 0
        assert len(seen) == number


def test_nothing_is_said_after_the_end_of_the_text(open_parrot: OpenTiny) -> None:
    probe = open_parrot(**ROOMY, sampler="greedy")
    probe.prime(TEXT)
    cycle = [tick.token for tick in probe.stream(80)]
    end = cycle[-1]
    for stop in (True, False):
        made = []
        for lookup in (LOOKUP, {}):
            template = open_parrot(**{**ROOMY, **lookup}, sampler="greedy")
            tokenizer = dataclasses.replace(template.tokenizer, eos_ids=frozenset({end}))
            checkpoint = dataclasses.replace(template.checkpoint, tokenizer=tokenizer)
            b = Brain(checkpoint, template.settings)
            b.prime(TEXT)
            made.append((b, [tick.token for tick in b.stream(80, stop_at_eos=stop)]))
        (quick, said), (plain, alone) = made
        assert said == alone == (cycle[: cycle.index(end) + 1] if stop else cycle)
        assert_alike(quick, plain)
        assert quick.lookahead.counts.accepted > 0
        assert quick.lookahead.counts.tokens == len(said)  # none was said and kept back


def test_an_observer_sees_every_tick(open_parrot: OpenTiny) -> None:
    quick, plain = pair(open_parrot, **ROOMY, sampler="greedy")
    for b in (quick, plain):
        b.prime(TEXT)
    steps: list[int] = []

    def note(step: Step) -> None:
        assert step.reading.logits.shape[0] == 1
        steps.append(step.tick.number)

    quick.observer = note
    tokens = [tick.token for tick in quick.stream(20)]
    assert steps == list(range(1, 21))
    quick.observer = None
    tokens += [tick.token for tick in quick.stream(20)]
    assert tokens == [tick.token for tick in plain.stream(40)]
    assert len(steps) == 20
    assert quick.lookahead.counts.accepted > 3


# Nothing lost ------------------------------------------------------------------------------------


def test_I11_a_saved_brain_goes_on_to_the_bit(open_parrot: OpenTiny, tmp_path: Path) -> None:
    b, _ = pair(open_parrot, **ROOMY)
    b.prime(TEXT)
    for _ in range(9):
        b.speak()
    b.save(tmp_path / "save")
    loaded = brain.load(tmp_path / "save")
    for _ in range(15):
        mine, other = b.speak(), loaded.speak()
        assert [t.token for t in mine] == [t.token for t in other]
        assert [t.surprise for t in mine] == [t.surprise for t in other]
        assert [t.width for t in mine] == [t.width for t in other]
    rows = b.state.valid
    assert digest(rows, b.state.keys[:, :, rows], *b.cursor) == digest(
        rows, loaded.state.keys[:, :, rows], *loaded.cursor
    )


def go(b: Brain, folder: Path, ticks: int, orders: dict[int, str]) -> RunRecord:
    """Runs up to so many ticks; ``orders`` are commands, sent once so many tokens are spoken."""
    folder.mkdir(exist_ok=True)
    run_record = RunRecord(folder, b, b.settings.conf)
    run_record.begin(lambda: b.prime(TEXT))

    def hear() -> None:
        for after, order in orders.items():
            if after <= run_record.spoken and not was_sent(folder, order):
                send(folder, order)
        run_record.inbox.poll()

    hear()  # what came when it was killed
    while run_record.spoken < ticks:
        run_record.record_ticks(*b.speak(ticks - run_record.spoken))
        hear()
        run_record.save_if_due()
    return run_record


def test_I11_a_run_killed_anywhere_goes_on_to_the_bit(
    open_parrot: OpenTiny, tmp_path: Path
) -> None:
    def fresh() -> Brain:
        return open_parrot(save_every=11, sampler="greedy", **ROOMY, **LOOKUP)

    whole = go(fresh(), tmp_path / "whole", 60, ORDERS)
    journals = "".join(p.read_text() for p in (tmp_path / "whole" / "saves").glob("*.journal"))
    assert '"said":[' in journals
    assert '"said":[' in journals.replace('"said":[', "", 1)
    draw, folder = random.Random(2), tmp_path / "killed"
    kills, run_record = 0, None
    while run_record is None:
        last, opened = kills >= 8, fresh()
        with contextlib.suppress(Killed), power_cut_at(0 if last else draw.randrange(1, 60)):
            run_record = go(opened, folder, 60, ORDERS)
        kills += 1
    assert kills > 4
    for name in RECORD:
        mine, other = folder / name, tmp_path / "whole" / name
        assert mine.exists() == other.exists()
        assert not mine.exists() or mine.read_bytes() == other.read_bytes(), name
    a, b = run_record._brain, whole._brain
    rows = a.state.valid
    assert digest(rows, *a.cursor) == digest(b.state.valid, *b.cursor)
    assert digest(a.state.keys[:, :, rows]) == digest(b.state.keys[:, :, rows])
    assert digest(a.state.brightness[rows]) == digest(b.state.brightness[rows])


def test_a_journal_that_cannot_be_is_refused(open_parrot: OpenTiny) -> None:
    quick, plain = pair(open_parrot, **ROOMY)
    for b in (quick, plain):
        b.prime(PERIOD)
        b.tick()
    before = digest(*quick.state, *quick.cursor), digest(*plain.state, *plain.cursor)
    for b, ids in ((quick, [1] * 5), (plain, [1, 2])):
        with pytest.raises(Refused, match="one pass"):
            b.replay(ids)
    bad: list[Any] = [[], [300], [True], ["a"], [-1]]
    for ids in bad:
        with pytest.raises(Refused):
            quick.replay(ids)
    assert before == (digest(*quick.state, *quick.cursor), digest(*plain.state, *plain.cursor))
    assert [tick.token for tick in quick.replay([1, 2, 3])] == [1, 2, 3]
    assert quick.mirror.token_id.tolist()[-2:] == [1, 2]


def test_the_command_line_tells_how_it_went(parrot_folder: Path, tmp_path: Path) -> None:
    settings = ["lookup=ngram", "sampler=greedy", "prompt=abcdeabcdeabcde", "capacity=96"]
    texts = []
    for name in ("first", "again"):
        out = f"hydra.run.dir={name}"
        done = call(tmp_path, parrot_folder, *settings, "ticks=60", "stop_at_eos=false", out)
        texts.append(done.stdout)
        assert "tokens per read" in done.stderr
        report = json.loads((tmp_path / name / "run.json").read_text("utf-8"))
        assert report["lookup"]["tokens"] == len(report["tokens"]) == 60
        assert 0 < report["lookup"]["accepted"] <= report["lookup"]["proposed"]
        assert report["lookup"]["passes"] + report["lookup"]["accepted"] == 60
    assert texts[0] == texts[1] == (tmp_path / "first" / "transcript.txt").read_text("utf-8")
    more = call(tmp_path, parrot_folder, *settings, "ticks=75", "hydra.run.dir=first").stdout
    assert (tmp_path / "first" / "transcript.txt").read_text("utf-8") == texts[0] + more


# Settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"lookup.width": -1},
        {"lookup.width": 32},
        {"lookup.width": 48},
        {"lookup.shortest": 0},
        {"lookup.shortest": 4},
        {"lookup.longest": 99},
        {"lookup.window": -1},
        {"lookup.trust": 1.5},
        {"lookup.trust": float("nan")},
        {"lookup": "psychic"},
        {"capacity": 3, "cull": "none", "cull.target": None},
    ],
    ids=str,
)
def test_lookups_that_make_no_sense_are_refused(
    wrong: dict[str, Any], open_parrot: OpenTiny
) -> None:
    with pytest.raises(Refused) as refused:
        open_parrot(**{**LOOKUP, **wrong})
    message = str(refused.value)
    assert "lookup" in message
    assert "\n" not in message


def test_a_save_from_before_there_was_lookup_loads(open_parrot: OpenTiny, tmp_path: Path) -> None:
    from brain.saves import sealed

    b = open_parrot(engine="eager")
    b.prime(IDS[:10])
    b.save(tmp_path / "save")
    path = tmp_path / "save" / "brain.json"
    description = json.loads(path.read_text())
    del description["conf"]["lookup"]
    engine = description["conf"]["engine"]
    del engine["native"]
    engine["compiled"] = engine.pop("captured")
    path.write_text(json.dumps(sealed(description)))
    loaded = brain.load(tmp_path / "save")
    assert loaded.settings.conf.engine.native is False
    assert loaded.tick().token == b.tick().token


# The real model ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("smollm2_folder", "all_threads")
def test_smollm2_says_the_same_in_half_the_passes() -> None:
    days = "Monday: open at nine, close at five.\nTuesday: open at nine, close at five.\nWednesday:"
    said: list[list[Tick]] = []
    for lookup in ("ngram", "none"):
        b = brain.open("smollm2", capacity=128, cull="none", sampler="greedy", lookup=lookup)
        b.prime(days)
        said.append(list(b.stream(48)))
        account = b.lookahead.counts
        if lookup == "ngram":
            assert account.passes < 48 / 2
    assert [tick.token for tick in said[0]] == [tick.token for tick in said[1]]
    assert "".join(tick.text for tick in said[0]).startswith(" open at nine, close at five.")
