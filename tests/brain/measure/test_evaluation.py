"""Evaluation measures what it says: against the brain itself, and against plain arithmetic."""

import dataclasses
import importlib.resources
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from brain import Refused
from brain.auto import plainest
from brain.config.compose import compose_conf
from brain.config.settings import settings_of
from brain.measure.evaluation import fluency, measures, mending, retrieval
from brain.measure.evaluation.contestants import FULL, Contestant, contestants
from brain.measure.evaluation.endurance import endure
from brain.measure.evaluation.facts import DISTRACTORS, KINDS, make_facts
from brain.measure.evaluation.fluency import Fluency
from brain.measure.evaluation.mending import Mended
from brain.measure.evaluation.paired import difference
from brain.measure.evaluation.parts import Parts
from brain.measure.evaluation.reading import begin, feed, logits_behind, numbers
from brain.measure.evaluation.request import QUICK, THOROUGH, request_of
from brain.measure.evaluation.retrieval import (
    Answer,
    Course,
    Lived,
    Recall,
    lay_course,
    planted,
)
from brain.measure.evaluation.texts import excerpts, read_text
from brain.record.journal import Journal
from conf.schema import Conf, EvalTask
from fixture_types import CommandLine, OpenTiny
from toys import digest

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(3))


def nothing(_: int) -> None:
    pass


def conf_of(folder: Path, *overrides: str) -> Conf:
    return compose_conf(["model=folder", f"model.path={folder}", "dtype=float32", *overrides])


@pytest.mark.parametrize("label", ["novelty", "sink_recent", "tova", "random"])
def test_a_contestant_is_the_policy_as_it_comes(
    label: str, tiny_folder: Path, open_tiny: OpenTiny
) -> None:
    """Tick for tick the same nats and the same rows as a brain of that policy, whatever the
    configuration around it says of forgetting.
    """
    conf = conf_of(tiny_folder, "cull=brightness", "cull.chunk=1", "cull.recent=7", "capacity=99")
    text = TEXTS[0].tolist()
    b = Contestant(label).open(open_tiny().checkpoint, plainest(conf), 16, len(text))
    nats = fluency.measure(b, 16, text, nothing)
    # open_tiny's own recent=4 is for its own tests: this is the policy as it comes.
    other = open_tiny(
        **{"cull": label, "capacity": 16, "cull.target": 16, "cull.recent": 32, "cull.chunk": 1}
    )
    other.prime(text[:1])
    told = other.feed(text[1:])
    assert len(nats) == len(text) - 17  # those read with a full memory
    torch.testing.assert_close(torch.tensor(nats), told[16:], rtol=1e-5, atol=1e-5)
    assert b.mirror.position.tolist() == other.mirror.position.tolist()


def test_contestants_read_by_the_chunk_of_the_configuration(
    tiny_folder: Path, open_tiny: OpenTiny
) -> None:
    checkpoint = open_tiny().checkpoint
    conf = plainest(conf_of(tiny_folder, "cull.chunk=5"))
    text = TEXTS[0].tolist()
    parts: list[int] = []
    fluency.measure(Contestant("novelty").open(checkpoint, conf, 16, 40), 16, text, parts.append)
    assert sum(parts) == len(text) - 1
    assert max(parts) == 5
    by_name = Contestant("novelty:chunk=3").open(checkpoint, conf, 16, 40)
    parts.clear()
    fluency.measure(by_name, 16, text, parts.append)
    assert max(parts) == 3


def test_full_forgets_nothing(tiny_folder: Path, open_tiny: OpenTiny) -> None:
    text = TEXTS[1].tolist()
    conf = plainest(conf_of(tiny_folder, "positions=rebase"))
    b = Contestant(FULL).open(open_tiny().checkpoint, conf, 16, len(text))
    fluency.measure(b, 16, text, nothing)
    assert len(b) == len(text) - 1  # the last one is pending
    assert b.mirror.position.tolist() == list(range(len(text) - 1))


def test_long_texts_are_renumbered_as_they_are_read(
    short_folder: Path, open_short: OpenTiny
) -> None:
    """Without a word of it each time, and only where there is room to do so."""
    checkpoint = open_short().checkpoint
    trained = checkpoint.config.max_position_embeddings
    text = torch.randint(0, 200, (trained + 40,)).tolist()
    conf = plainest(conf_of(short_folder))
    contestant = Contestant("novelty")
    b = contestant.open(checkpoint, conf, 16, len(text))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fluency.measure(b, 16, text, nothing)
    assert b.memory.account.position < trained
    ticks = plainest(conf_of(short_folder, "cull.chunk=1"))
    leaves = {
        (label, one.cull.chunk): Contestant(label).leaves_range(
            one, 16, len(text), checkpoint.config
        )
        for label in ("novelty", FULL)
        for one in (conf, ticks)
    }
    assert leaves == {
        ("novelty", conf.cull.chunk): False,
        ("novelty", 1): True,
        (FULL, conf.cull.chunk): True,
        (FULL, 1): True,
    }
    assert not Contestant(FULL).leaves_range(conf, 16, trained, checkpoint.config)


def test_asking_is_reading_behind_the_pending_token(open_tiny: OpenTiny) -> None:
    b = open_tiny(**{"cull": "none"})
    ids = TEXTS[0, :21].tolist()
    begin(b, ids)
    feed(b, ids[1:], nothing)
    before = digest(*b.state, *b.cursor)
    told = logits_behind(b, [5, 6, 7])
    assert digest(*b.state, *b.cursor) == before
    b.prime(ids[:-1])
    expected = b.read([ids[-1], 5, 6, 7], range(20, 24)).logits
    torch.testing.assert_close(told, expected, rtol=1e-4, atol=1e-4)


def test_differences_are_paired_and_their_errors_are_of_blocks() -> None:
    base = torch.rand(4, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, error = difference((base + 0.25).tolist(), base.tolist())
    assert mean == pytest.approx(0.25)
    assert error == pytest.approx(0.0, abs=1e-12)
    blocks = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]])
    stepped = base + blocks.repeat_interleave(64, 1)
    mean, error = difference(stepped.tolist(), base.tolist())
    assert mean == pytest.approx(3.5)
    assert error == pytest.approx(float(blocks.std()) / 8**0.5)
    results = [
        Fluency("sink_recent", 8, base.tolist()),
        Fluency("x", 8, stepped.tolist()),
        Fluency("y", 16, base.tolist()),
    ]
    rows = fluency.table(results, "sink_recent")
    assert rows[1]["difference"] == pytest.approx(3.5)
    assert "difference" not in rows[2]  # nothing to compare with at that budget
    assert fluency.table(results, "x")[0]["difference"] == pytest.approx(-3.5)


def test_one_stream_has_no_error() -> None:
    """However many tokens it has: it says nothing about other texts."""
    apart = difference([[1.0] * 640], [[0.5] * 640])
    assert apart.mean == 0.5
    assert apart.error is None
    assert measures.plus_minus(*apart) == "+0.5000 ± n/a"


def test_facts_are_planted_where_the_course_says_and_nothing_is_lost(open_tiny: OpenTiny) -> None:
    tokenizer = open_tiny().tokenizer
    facts = [make_facts(tokenizer, 2, KINDS[:3], f"seed {stream}") for stream in range(3)]
    course = lay_course(facts, budget=150, distances=[2, 0.5], spacing=1)
    assert course.distances == (75, 300)
    assert course.starts[0] == 150
    assert course.starts[1] - course.starts[0] >= max(150, course.room)
    texts = torch.arange(1000).expand(3, -1) + 10_000
    streams = planted(texts, facts, course)
    assert streams.shape == (3, course.length)
    for row, stream_facts in zip(streams.tolist(), facts, strict=True):
        for start, fact in zip(course.starts, stream_facts, strict=True):
            assert row[start : start + len(fact.statement)] == list(fact.statement)
            assert len(fact.statement) <= course.room
        text = [token for token in row if token >= 10_000]
        assert text == list(range(10_000, 10_000 + len(text)))  # every word of it, in order
    questions = course.questions()
    assert questions == sorted(questions)
    assert len(questions) == 4
    for index, number, distance in questions:
        assert index + 1 - (course.starts[number] + course.room) == distance
        assert index < course.length


def test_facts_have_one_right_answer_among_distinct_tokens(open_tiny: OpenTiny) -> None:
    tokenizer = open_tiny().tokenizer
    facts = make_facts(tokenizer, 32, KINDS, "a")
    assert facts == make_facts(tokenizer, 32, KINDS, "a")
    assert facts != make_facts(tokenizer, 32, KINDS, "b")
    assert {fact.kind for fact in facts} == {kind.name for kind in KINDS}
    for fact in facts:
        assert len(set(fact.options)) == len(fact.options) <= DISTRACTORS + 1


def test_real_words_give_ten_options(smollm2_folder: Path) -> None:
    from brain.tokens import load_tokenizer

    tokenizer = load_tokenizer(smollm2_folder)
    for fact in make_facts(tokenizer, 32, KINDS, "a"):
        assert len(fact.options) == DISTRACTORS + 1, fact.kind
        assert fact.options[0] in fact.statement
        assert not set(fact.options[1:]) & set(fact.statement)


def lived(*ranks: int, nats: float = 3.0) -> Lived:
    answers = tuple(
        Answer("key" if index % 2 else "quote", index, 64, rank, -1.0 * rank, 0.0)
        for index, rank in enumerate(ranks)
    )
    return Lived(answers, (nats,) * 64)


def test_recall_counts_first_ranks() -> None:
    recall = Recall("x", 32, (lived(0, 0), lived(0, 5, nats=4.0)))
    (row,) = retrieval.table([recall], "y")
    assert row["recall"] == 0.75
    assert row["standard_error"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert row["recall_by_kind"] == {"key": 0.5, "quote": 1.0}
    assert row["log_likelihood"] == -1.25
    assert row["nll"] == 3.5
    assert "difference" not in row
    (row,) = retrieval.table([Recall("x", 32, (lived(0, 5),))], "y")
    assert row["standard_error"] is None  # one text says nothing about others


def test_recall_is_compared_fact_by_fact() -> None:
    ours = Recall("x", 32, (lived(0, 0), lived(0, 5, nats=4.0)))
    theirs = Recall("y", 32, (lived(0, 5), lived(5, 0)))
    rows = retrieval.table([ours, theirs], "y")
    hits = torch.tensor([0.0, 1.0, 1.0, -1.0])
    assert rows[0]["difference"] == 0.25
    assert rows[0]["difference_error"] == pytest.approx(float(hits.std()) / 2)
    assert rows[0]["nll_difference"] == 0.5
    assert rows[0]["nll_standard_error"] == pytest.approx(0.5)  # two blocks, 0 and 1
    mean, error = retrieval.over_distances(ours, theirs)
    assert mean == 0.25
    assert error == pytest.approx(float(hits.std()) / 2)


def test_over_distances_a_fact_counts_once() -> None:
    near = lived(0, 5).answers
    far = tuple(dataclasses.replace(answer, distance=128, rank=9) for answer in near)
    ours = Recall("x", 32, (Lived((*near, *far), (1.0,)),) * 2)
    theirs = Recall("y", 32, (Lived((*far, *far), (1.0,)),) * 2)
    mean, error = retrieval.over_distances(ours, theirs)
    assert mean == 0.25
    assert error == pytest.approx(float(torch.tensor([0.5, 0, 0.5, 0]).std()) / 2)


def test_what_a_stream_came_to_is_kept_whole() -> None:
    one = lived(0, 3, 1)
    assert Lived.of(json.loads(json.dumps(one.plain()))) == one
    pair = Mended(0.5, 1.5, 2.0)
    assert Mended.of(json.loads(json.dumps(dataclasses.asdict(pair)))) == pair


def test_a_fact_that_is_remembered_is_found(open_tiny: OpenTiny) -> None:
    """The measure itself, through: a full memory asked with the statement's own words ranks the
    word that followed by what the model makes of them, the same as a brain would."""
    b = open_tiny(**{"cull": "none", "capacity": 400})
    facts = [make_facts(b.tokenizer, 1, KINDS[1:2], "z")]
    course = Course((20,), len(facts[0][0].statement), (10,))
    text = planted(torch.randint(0, 200, (1, 200)), facts, course)[0].tolist()
    parts: list[int] = []
    found = retrieval.measure(b, text, facts[0], course, parts.append)
    (answer,) = found.answers
    fact = facts[0][0]
    asked_after = course.questions()[0][0]
    assert sum(parts) == asked_after
    assert len(found.nats) == asked_after + 1 - 20
    ids = text[: asked_after + 1]
    b.prime(ids[:-1])
    where = list(range(asked_after, asked_after + 1 + len(fact.question)))
    logits = b.read([ids[-1], *fact.question], where).logits[-1]
    scores = torch.log_softmax(logits, -1)[list(fact.options)]
    assert answer.log_likelihood == pytest.approx(float(scores[0]), abs=1e-3)
    assert answer.rank == int((scores[1:] >= scores[0]).sum())


def test_endurance_accounts_for_every_tick(open_tiny: OpenTiny) -> None:
    b = open_tiny()
    b.prime(TEXTS[0, :10].tolist())
    rows = list(endure(b, 25, 10))
    assert [row["ticks"] for row in rows] == [10, 20, 25]
    assert b.ticks == 25
    for row in rows:
        assert 0 < row["distinct"] <= 1
        assert row["ticks_per_second"] > 0
        assert row["resident_mb"] > 10


def test_mending_compares_the_same_tokens_under_both_memories(open_tiny: OpenTiny) -> None:
    options = {"cull.target": 20, "capacity": 24, "repair.least_gain": -100.0}
    mended, dropped = open_tiny(**options), open_tiny(**options)
    text = torch.randint(0, 256, (32,), generator=torch.Generator().manual_seed(5)).tolist()
    one = mending.compare(mended, dropped, text, ticks=8, horizon=12)
    assert one is not None
    assert len(mended) == len(dropped) + 1
    kept = mended.mirror
    (put,) = [i for i, source in enumerate(kept.sources()) if source == "repair"]
    assert set(kept.position.tolist()) - set(dropped.mirror.position.tolist()) == {
        int(kept.position[put])
    }
    for brain, told in ((mended, one.repaired), (dropped, one.dropped)):
        before = digest(*brain.state, *brain.cursor)
        assert mending._nats(brain, text[-12:]) == pytest.approx(told, abs=1e-6)
        assert digest(*brain.state, *brain.cursor) == before
    again = mending.compare(mended, dropped, text, ticks=8, horizon=12)
    row = mending.table([one, again], 12)
    assert row["pairs"] == row["repaired"] == 2
    assert row["difference"] == pytest.approx(one.repaired - one.dropped, abs=1e-6)
    assert row["standard_error"] == pytest.approx(0.0, abs=1e-6)


def test_mending_compares_nothing_where_no_repair_gains(open_tiny: OpenTiny) -> None:
    options = {"cull.target": 20, "capacity": 24, "repair.least_gain": 1000.0}
    mended, dropped = open_tiny(**options), open_tiny(**options)
    one = mending.compare(mended, dropped, TEXTS[0, :32].tolist(), ticks=8, horizon=12)
    assert one is None
    row = mending.table([one], 12)
    assert row["repaired"] == 0
    assert row["difference"] is None


# Bad input ---------------------------------------------------------------------------------------


def test_text_is_read_from_a_file_or_all_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("first ünï")
    assert read_text(tmp_path) == "first ünï\nsecond"
    assert read_text(tmp_path / "b.txt") == "second"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "empty"),
        (b" \n\t", "empty"),
        (b"caf\xe9 au lait", "not UTF-8"),
        (b"\x00\x01\x02", "binary"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_text_is_refused(content: bytes | None, told: str, tmp_path: Path) -> None:
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(Refused, match=told) as refused:
        read_text(file)
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no files"):
        read_text(tmp_path)


def test_a_text_shorter_than_the_budget_is_refused() -> None:
    with pytest.raises(Refused, match="10 tokens, but 11"):
        excerpts(list(range(10)), 2, 11, "x")
    assert excerpts(list(range(10)), 2, 10, "x").tolist() == [list(range(10))] * 2
    assert excerpts(list(range(10)), 3, 4, "x")[:, 0].tolist() == [0, 3, 6]


@pytest.mark.parametrize(
    ("label", "told"),
    [
        ("whim", "whim"),
        ("novelty:novelty.share=2", "novelty.share"),
        ("novelty:novelty.lifetime=0", "novelty.lifetime"),
        ("novelty:novelty.lifetime=nan", "novelty.lifetime"),
        ("novelty:shine=2", "shine"),
        ("novelty:target=9", "task.budgets says"),
        ("none", "forgets nothing: here that is called full"),
        ("sink_recent:recent=0", "recent"),
    ],
)
def test_policies_that_make_no_sense_are_refused(label: str, told: str) -> None:
    conf = compose_conf([])
    with pytest.raises(Refused, match=told):
        contestants([label], [64], conf, full=False)
    with pytest.raises(Refused, match="twice"):
        contestants(["novelty", "novelty"], [64], conf, full=False)


def test_settings_of_a_policy_may_be_changed() -> None:
    conf = plainest(Contestant("novelty:novelty.decay=0.5,recent=7").conf(compose_conf([]), 64, 99))
    eviction = settings_of(conf).graphs.eviction
    assert eviction.novelty.decay == 0.5
    assert eviction.culling.recent == 7
    assert eviction.culling.target == 64


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["task.text=nowhere.txt"], "nowhere.txt cannot be read"),
        ([], "task.text is missing"),
        (["task.measures=[]"], "task.measures"),
        (["task.measures=[vigour]"], "vigour"),
        (["task.policies=[whim]"], "whim"),
        (["task.policies=[]"], "task.policies"),
        (["task.budgets=[4]"], "task.budgets"),
        (["task.distances=[inf]"], "task.distances"),
        (["task.spacing=nan"], "task.spacing"),
        (["task.spacing=1e307"], "task.spacing"),
        (["task.distances=[1e307]"], "task.distances"),
        (["task.distances=[0]"], "task.distances"),
        (["task.kinds=[rumour]"], "rumour"),
        (["task.distances=[0.001]", "task.budgets=[64]"], "task.distances: 0.001 of 64 rows"),
        (["threads=-5", "task.text=."], "threads must be 1 to"),
        (["task.text=.", "task.policies=['novelty:chunk=0']"], "cull.chunk must be 1"),
        (["task.measures=[repair]", "cull=tova"], "cull=tova lacks"),
        (["task.measures=[endurance]", "cull=none"], "needs a memory that forgets"),
        (["task.streams=0"], "task.streams"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_long(
    arguments: list[str], told: str, tiny_folder: Path, tmp_path: Path
) -> None:
    from brain.tasks import eval as task

    conf = compose_conf(
        ["task=eval", "model=folder", f"model.path={tiny_folder}", "capacity=32", *arguments]
    )
    with pytest.raises(Refused, match=re.escape(told)) as refused:
        task.run(conf, tmp_path)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_quick_is_smaller_and_what_is_given_stays() -> None:
    conf = compose_conf(["task=eval", "task.text=x", "task.quick=true", "task.streams=16"])
    request = request_of(cast(EvalTask, conf.task), conf)
    assert request.sizes == dataclasses.replace(QUICK, streams=16)
    conf = compose_conf(["task=eval", "task.text=x"])
    assert request_of(cast(EvalTask, conf.task), conf).sizes == THOROUGH
    for name in ("streams", "tokens", "pairs", "spacing"):
        assert getattr(QUICK, name) < getattr(THOROUGH, name)
    assert QUICK.streams * QUICK.facts < THOROUGH.streams * THOROUGH.facts
    assert {*QUICK.policies} < {*THOROUGH.policies}


def test_every_setting_of_the_task_is_in_the_help() -> None:
    text = importlib.resources.files("conf").joinpath("hydra/help/brain.yaml").read_text("utf-8")
    told = text[text.index("task=eval  ") :]
    for setting in dataclasses.fields(EvalTask):
        assert setting.name == "name" or f"task.{setting.name}" in told, setting.name


# What is kept ------------------------------------------------------------------------------------


def test_parts_are_kept_and_found_again(tmp_path: Path) -> None:
    about = {"seed": 3, "task.tokens": 8}
    parts = Parts(tmp_path, about)
    parts.keep(("fluency", "novelty", 64, 0), [1.5, 2.25])
    parts.keep(("repair", 64, 0), None)
    parts.close()
    with (tmp_path / "parts.jsonl").open("ab") as file:
        file.write(b"0123 torn")  # by a crash
    again = Parts(tmp_path, about)
    assert len(again) == 2
    assert again.read(("fluency", "novelty", 64, 0), numbers) == [1.5, 2.25]
    assert again.read(("repair", 64, 0), Mended.of) is None
    with pytest.raises(Refused, match="something else for fluency novelty 64 0"):
        again.read(("fluency", "novelty", 64, 0), Lived.of)
    assert ("repair", 64, 0) in again
    assert ("repair", 64, 1) not in again
    again.keep(("repair", 64, 1), {"gain": 1.0})
    again.close()
    assert len(Parts(tmp_path, about)) == 3
    with (tmp_path / "parts.jsonl").open("r+b") as file:
        file.truncate(5)  # so soon that not even the first line was there
    torn = Parts(tmp_path, about)
    assert len(torn) == 0
    torn.keep(("a",), 1)
    torn.close()
    assert len(Parts(tmp_path, about)) == 1
    for other in ({**about, "seed": 4}, {"seed": 3}, {**about, "new": 1}):
        with pytest.raises(Refused, match="holds an evaluation with another") as refused:
            Parts(tmp_path, other)
        assert "hydra.run.dir" in str(refused.value)


@pytest.mark.parametrize("line", ["[]", "3", '[["a"]]', '{"x": 1}'])
def test_what_holds_no_parts_is_refused(line: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "parts.jsonl")
    if line[0] == "[":
        journal.add({})
    journal.add(json.loads(line))
    journal.close()
    with pytest.raises(Refused) as refused:
        Parts(tmp_path, {})
    assert "\n" not in str(refused.value)


def small_evaluation(text: Path, *more: str) -> list[str]:
    text.write_text("It was a truth, not much acknowledged. " * 400)
    return [
        "task=eval",
        f"task.text={text}",
        "task.policies=[sink_recent,novelty]",
        "task.budgets=[32]",
        "task.streams=2",
        "task.tokens=64",
        "task.facts=1",
        "task.distances=[1]",
        "hydra.run.dir=out",
        *more,
    ]


def test_an_interrupted_evaluation_goes_on(
    tiny_command_line: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it was ended, it comes to the same results, and measures no part twice."""
    command = small_evaluation(tmp_path / "text.txt", "task.measures=[fluency,retrieval,repair]")
    command.append("task.pairs=2")
    status, _, told = tiny_command_line(*command)
    assert status == 0, told
    expected = json.loads((tmp_path / "out" / "eval.json").read_text())
    count = len((tmp_path / "out" / "parts.jsonl").read_text().splitlines()) - 1
    assert count == 3 * 2 + 3 * 2 + 2
    keep = Parts.keep
    for stop in (1, 9):
        shutil.rmtree(tmp_path / "out")
        kept: list[Any] = []

        def counting(self: Parts, key: Any, found: Any, stop: int = stop, kept: Any = kept) -> None:
            if len(kept) == stop:
                raise KeyboardInterrupt
            keep(self, key, found)
            kept.append(key)

        monkeypatch.setattr(Parts, "keep", counting)
        status, _, told = tiny_command_line(*command)
        assert status == 130
        assert f"{stop} parts are measured and kept" in told
        assert "hydra.run.dir=" in told
        monkeypatch.setattr(Parts, "keep", keep)
        status, _, told = tiny_command_line(*command)
        assert status == 0, told
        lines = (tmp_path / "out" / "parts.jsonl").read_text().splitlines()
        assert len(lines) == count + 1
        found = json.loads((tmp_path / "out" / "eval.json").read_text())
        for measure in ("fluency", "retrieval", "repair"):
            assert found[measure] == expected[measure]


def test_policies_may_be_added_but_nothing_else_changed(
    tiny_command_line: CommandLine, tmp_path: Path
) -> None:
    command = small_evaluation(tmp_path / "text.txt", "task.measures=[fluency]")
    assert tiny_command_line(*command)[0] == 0
    first = json.loads((tmp_path / "out" / "eval.json").read_text())["fluency"]
    command[2] = "task.policies=[sink_recent,novelty,random]"
    assert tiny_command_line(*command)[0] == 0
    second = json.loads((tmp_path / "out" / "eval.json").read_text())["fluency"]
    assert second[: len(first)] == first
    assert [row["policy"] for row in second] == ["full", "sink_recent", "novelty", "random"]
    command[2] = "task.policies=[novelty]"
    more = ["task.measures=[fluency,repair]", "task.pairs=48", "task.horizon=32"]
    status, _, told = tiny_command_line(*command, *more)
    assert status == 0, told
    status, _, told = tiny_command_line(*command, "task.tokens=100000")
    assert status == 2
    status, _, told = tiny_command_line(*command, "task.tokens=100000", "hydra.run.dir=new")
    assert status == 2
    assert "give a longer text" in told
    assert not (tmp_path / "new").exists()  # so that a smaller number may follow there
    status, _, told = tiny_command_line(*command, "task.tokens=32")
    assert status == 2
    assert "holds an evaluation with another task.tokens (64, not 32)" in told
    status, _, told = tiny_command_line(*command, "cull.chunk=4")
    assert status == 2
    assert "another cull.chunk" in told


def test_what_is_not_used_is_said(tiny_command_line: CommandLine, tmp_path: Path) -> None:
    command = small_evaluation(tmp_path / "text.txt", "task.measures=[fluency]")
    command[2] = "task.policies=[novelty]"
    status, shown, told = tiny_command_line(*command, "capacity=77", "task.streams=1")
    assert status == 0, told
    assert "capacity=77 is not used: task.budgets=[32]" in told
    assert "sink_recent is not among task.policies" in told
    assert "full: a memory that holds the whole text" in shown
    status, _, told = tiny_command_line(*command, "task.against=full", "hydra.run.dir=out3")
    assert status == 0, told
    assert "is not among" not in told
    status, shown, told = tiny_command_line(
        *command, "task.against=novelty", "task.streams=1", "hydra.run.dir=out2"
    )
    assert status == 0, told
    assert "± n/a" in shown
    assert "capacity" not in told


def test_the_task_writes_tables_and_pictures(
    tiny_command_line: CommandLine, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was a truth, not much acknowledged. " * 400)
    status, shown, told = tiny_command_line(
        "task=eval",
        f"task.text={text}",
        "task.measures=[fluency,retrieval,repair,endurance]",
        "task.pairs=2",
        "task.horizon=8",
        "task.policies=[sink_recent,novelty]",
        "task.budgets=[32,64]",
        "task.streams=2",
        "task.tokens=64",
        "task.facts=1",
        "task.distances=[1,0.5,0.501]",
        "task.bucket=5",
        "ticks=10",
        "prompt=Once",
        "capacity=32",
        "hydra.run.dir=out",
    )
    assert status == 0, told
    for word in ("fluency", "retrieval", "repair", "endurance", "sink_recent", "novelty", "full"):
        assert word in shown
    report = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert report["chunk"] == 32
    assert report["task"]["streams"] == 2
    assert {row["budget"] for row in report["fluency"]} == {32, 64}
    assert len(report["retrieval"]) == 3 * 2 * 2  # 0.501 of these budgets are 0.5 of them
    header, row = (
        next(line for line in shown.splitlines() if re.match(start, line))
        for start in (r"policy +rows +1×", "novelty +32 +[0-9.]+ ±")
    )
    assert header.count("×") == 3
    assert row.count("±") == 3 + 2  # and the two differences
    assert [row["ticks"] for row in report["endurance"]] == [5, 10]
    for picture in ("fluency.png", "retrieval.png", "endurance.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
