"""Evaluation measures what it says: against the brain itself, and against plain arithmetic."""

import json
import re
from pathlib import Path

import pytest
import torch

from brain import Refused
from brain.measure.evaluation import fluency, mending, retrieval
from brain.measure.evaluation.contestants import FULL, Contestant, contestants
from brain.measure.evaluation.endurance import endure
from brain.measure.evaluation.facts import DISTRACTORS, KINDS, make_facts
from brain.measure.evaluation.fluency import Fluency
from brain.measure.evaluation.retrieval import Answer, Course, Recall, lay_course, planted
from brain.measure.evaluation.streams import Streams
from brain.measure.evaluation.texts import excerpts, read_text
from fixture_types import CommandLine, OpenTiny
from toys import digest

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(3))


def nothing(_: int) -> None:
    pass


@pytest.mark.parametrize("label", ["novelty", "sink_recent", "tova", "random", FULL])
def test_streams_are_brains_fed_the_same(label: str, open_tiny: OpenTiny) -> None:
    """Tick for tick: the same negative log-likelihoods, the same rows, under every policy."""
    streams = Streams(open_tiny().checkpoint, Contestant(label).eviction(16), TEXTS)
    nats = torch.cat([streams.feed_until(10, nothing), streams.feed_until(39, nothing)], 1)
    assert nats.shape == (3, 39)
    policy = {"cull": "none"} if label == FULL else {"cull": label, "cull.target": 16}
    for stream, text in enumerate(TEXTS.tolist()):
        # open_tiny's own recent=4 is for its own tests: this is the policy as it comes.
        b = open_tiny(**{**policy, "cull.recent": 32, "cull.chunk": 1})
        b.prime(text[:1])
        b.feed(text[1:2])
        told = b.feed(text[2:])
        torch.testing.assert_close(nats[stream, 1:], told, rtol=1e-4, atol=1e-4)
        state = streams.memories.state
        held = state.position[stream][state.valid[stream]].sort().values.tolist()
        assert held == b.mirror.position.tolist()


def test_asking_is_reading_behind_the_pending_token(open_tiny: OpenTiny) -> None:
    b = open_tiny(**{"cull": "none"})
    streams = Streams(b.checkpoint, Contestant(FULL).eviction(40), TEXTS)
    streams.feed_until(20, nothing)
    before = digest(*streams.memories.state, *streams.memories.cursor)
    told = streams.ask([[5, 6, 7], [8], [9, 10]])
    assert digest(*streams.memories.state, *streams.memories.cursor) == before
    for stream, question in enumerate([[5, 6, 7], [8], [9, 10]]):
        ids = TEXTS[stream, :21].tolist()
        b.prime(ids[:-1])
        logits = b.read([ids[-1], *question], list(range(20, 21 + len(question)))).logits[-1]
        expected = torch.log_softmax(logits, -1)
        torch.testing.assert_close(told[stream], expected, rtol=1e-4, atol=1e-4)


def test_fluency_scores_the_tokens_read_with_a_full_memory(open_tiny: OpenTiny) -> None:
    result = fluency.measure(open_tiny().checkpoint, Contestant("sink_recent"), 16, TEXTS, nothing)
    assert result.nll.shape == (3, 39 - 16)
    policy = {"cull": "sink_recent", "cull.target": 16, "cull.recent": 32}
    b = open_tiny(**policy, **{"cull.chunk": 1})
    b.prime(TEXTS[1, :1].tolist())
    told = b.feed(TEXTS[1, 1:].tolist())
    torch.testing.assert_close(result.nll[1], told[16:], rtol=1e-4, atol=1e-4)


def test_differences_are_paired_and_their_errors_are_of_blocks() -> None:
    base = torch.rand(4, 128, generator=torch.Generator().manual_seed(0))
    floor = Fluency("sink_recent", 8, base)
    same_everywhere = Fluency("x", 8, base + 0.25)
    mean, error = same_everywhere.against(floor)
    assert mean == pytest.approx(0.25, abs=1e-6)
    assert error == pytest.approx(0.0, abs=1e-6)
    blocks = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]])
    stepped = Fluency("x", 8, base + blocks.repeat_interleave(64, 1))
    mean, error = stepped.against(floor)
    assert mean == pytest.approx(3.5, abs=1e-6)
    assert error == pytest.approx(float(blocks.std()) / 8**0.5, rel=1e-5)
    rows = fluency.table([floor, stepped, Fluency("y", 16, base)])
    assert rows[1]["difference"] == pytest.approx(3.5)
    assert "difference" not in rows[2]  # nothing to compare with at that budget


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


def test_recall_counts_first_ranks() -> None:
    answers = tuple(
        Answer("key" if index % 2 else "quote", 64, rank, -1.0 * rank, 0.0)
        for index, rank in enumerate([0, 0, 0, 5])
    )
    (row,) = retrieval.table([Recall("x", 32, answers, 3.0)])
    assert row["recall"] == 0.75
    assert row["standard_error"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert row["recall_by_kind"] == {"key": 0.5, "quote": 1.0}
    assert row["log_likelihood"] == -1.25


def test_a_fact_that_is_remembered_is_found(open_tiny: OpenTiny) -> None:
    """The measure itself, through: a full memory asked with the statement's own words ranks the
    word that followed by what the model makes of them, the same as a brain would."""
    b = open_tiny(**{"cull": "none", "capacity": 400})
    facts = [make_facts(b.tokenizer, 1, KINDS[1:2], "z")]
    course = Course((20,), len(facts[0][0].statement), (10,))
    texts = planted(torch.randint(0, 200, (1, 200)), facts, course)
    recall = retrieval.measure(b.checkpoint, Contestant(FULL), 20, texts, facts, course, nothing)
    (answer,) = recall.answers
    fact = facts[0][0]
    asked_after = course.questions()[0][0]
    ids = texts[0, : asked_after + 1].tolist()
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
    row = mending.measure(mended, dropped, torch.tensor([text, text]), 8, 12, nothing)
    assert row["pairs"] == row["repaired"] == 2
    assert row["difference"] == pytest.approx(one.repaired - one.dropped, abs=1e-6)
    assert row["standard_error"] == pytest.approx(0.0, abs=1e-6)


def test_mending_compares_nothing_where_no_repair_gains(open_tiny: OpenTiny) -> None:
    options = {"cull.target": 20, "capacity": 24, "repair.least_gain": 1000.0}
    mended, dropped = open_tiny(**options), open_tiny(**options)
    row = mending.measure(mended, dropped, TEXTS[:1, :32], 8, 12, nothing)
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
        ("sink_recent:recent=0", "recent"),
    ],
)
def test_policies_that_make_no_sense_are_refused(label: str, told: str) -> None:
    with pytest.raises(Refused, match=told):
        contestants([label], [64])
    with pytest.raises(Refused, match="twice"):
        contestants(["novelty", "novelty"], [64])


def test_settings_of_a_policy_may_be_changed() -> None:
    eviction = Contestant("novelty:novelty.decay=0.5,recent=7").eviction(64)
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
        (["task.distances=[0]"], "task.distances"),
        (["task.kinds=[rumour]"], "rumour"),
        (["task.distances=[0.001]", "task.budgets=[64]"], "task.distances: 0.001 of 64 rows"),
        (["threads=-5", "task.text=."], "threads must be 1 to"),
        (["task.text=x", "positions=rebase"], "positions=rebase does not apply"),
        (["task.measures=[repair]", "cull=tova"], "cull=tova lacks"),
        (["task.measures=[endurance]", "cull=none"], "needs a memory that forgets"),
        (["task.streams=0"], "task.streams"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_long(
    arguments: list[str], told: str, tiny_folder: Path, tmp_path: Path
) -> None:
    from brain.config.compose import compose_conf
    from brain.tasks import eval as task

    conf = compose_conf(
        ["task=eval", "model=folder", f"model.path={tiny_folder}", "capacity=32", *arguments]
    )
    with pytest.raises(Refused, match=re.escape(told)) as refused:
        task.run(conf, tmp_path)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


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
    assert {row["budget"] for row in report["fluency"]} == {32, 64}
    assert len(report["retrieval"]) == 3 * 2 * 2  # 0.501 of these budgets are 0.5 of them
    header, row = (
        next(line for line in shown.splitlines() if re.match(start, line))
        for start in (r"policy +rows +1×", "novelty +32 +[0-9.]+ ±")
    )
    assert header.count("×") == row.count("±") == 3
    assert [row["ticks"] for row in report["endurance"]] == [5, 10]
    for picture in ("fluency.png", "retrieval.png", "endurance.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
