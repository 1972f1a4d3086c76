"""A run that was killed goes on as if it had not been."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError, safe_open
from soak import soak

from brain import load
from brain.brain import Brain
from brain.errors import BrainWarning, Refused, Unwritten
from brain.record.commands import ANSWERS, send
from brain.record.lock import sole_writer
from brain.record.run_record import RunRecord, as_recorded
from brain.saves import sealed
from fixture_types import CommandLine, OpenTiny
from killed_runs import ORDERS, RECORD, Killed, power_cut_at, was_sent
from processes import ENVIRONMENT, command
from toys import digest, raw_bytes

PROMPT = "The lighthouse keeper had not spoken"


@pytest.fixture
def open_(open_tiny: OpenTiny) -> Callable[[], Brain]:
    return lambda: open_tiny(save_every=7, prompt=PROMPT, **{"repair": "pairs", "repair.every": 3})


def go(
    brain: Brain,
    folder: Path,
    ticks: int,
    orders: dict[int, str] | None = None,
    prompt: str = PROMPT,
) -> RunRecord:
    """Runs up to so many ticks; ``orders`` are commands by the number of tokens spoken."""
    folder.mkdir(exist_ok=True)
    run_record = RunRecord(folder, brain, brain.settings.conf)
    first, rest = brain.prompt_ids(prompt)
    run_record.begin(lambda: brain.prime(first), rest)
    for _ in run_record.hear():
        pass

    def hear() -> None:
        order = (orders or {}).get(run_record.spoken)
        if order is not None and not was_sent(folder, order):
            send(folder, order)
        run_record.inbox.poll()

    hear()  # what came when it was killed
    while run_record.spoken < ticks:
        run_record.record_ticks(brain.tick())
        hear()
        run_record.save_if_due()
    return run_record


def told(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in RECORD if (folder / name).exists()}


@pytest.mark.parametrize("length", [1, 6])
def test_a_run_killed_anywhere_goes_on_with_the_same_token(
    open_tiny: OpenTiny, tmp_path: Path, length: int
) -> None:
    """Killed at every kind of write there is, again and again, at random: while it hears a text
    that does not fit, too.
    """

    def open_() -> Brain:
        return open_tiny(
            save_every=40 if length > 1 else 7,
            prompt=PROMPT * length,
            **{"repair": "pairs", "repair.every": 3 * length, "cull.chunk": 4},
        )

    prompt = PROMPT * length
    whole = go(open_(), tmp_path / "whole", 40, ORDERS, prompt)
    assert whole.heard == len(open_().prompt_ids(prompt)[1])
    assert (whole.heard > 100) == (length > 1)
    draw = random.Random(0)
    folder = tmp_path / "killed"
    kills, run_record = 0, None
    for attempt in range(16):
        brain = open_()
        try:
            with power_cut_at(draw.randrange(1, 60) if attempt < 15 else 0):
                run_record = go(brain, folder, 40, ORDERS, prompt)
            break
        except Killed:
            kills += 1
    assert run_record is not None
    assert kills > 5
    assert told(folder) == told(tmp_path / "whole")
    assert digest(*run_record._brain.cursor) == digest(*whole._brain.cursor)
    mine, other = run_record._brain.mirror, whole._brain.mirror
    assert mine.token_id.tolist() == other.token_id.tolist()
    assert mine.position.tolist() == other.position.tolist()
    assert mine.brightness.tolist() == other.brightness.tolist()


@pytest.mark.parametrize("chunk", [6, 32])
def test_a_text_is_heard_from_the_journal_alone(
    open_short: OpenTiny, tmp_path: Path, chunk: int
) -> None:
    """Killed after every chunk: rows are renumbered before the same chunks, although a journal does
    not say how long a chunk might have been.
    """

    def heard(folder: Path, chunks: int | None) -> RunRecord:
        brain = open_short(positions="keep", **{"cull.chunk": chunk}, save_every=0)
        folder.mkdir(exist_ok=True)
        first, rest = brain.prompt_ids([n * n % 300 for n in range(150)])
        run_record = RunRecord(folder, brain, brain.settings.conf)
        run_record.begin(lambda: brain.prime(first), rest)
        for number, _ in enumerate(run_record.hear(), 1):
            if number == chunks:
                break
        run_record.close()
        return run_record

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BrainWarning)
        whole = heard(tmp_path / "whole", None)
        killed, kills = heard(tmp_path / "killed", 1), 1
        while killed.heard < whole.heard:
            killed, kills = heard(tmp_path / "killed", 1), kills + 1
    assert kills > 5
    mine, other = killed._brain, whole._brain
    assert digest(*mine.state, *mine.cursor) == digest(*other.state, *other.cursor)
    assert mine.ticks == other.ticks == 130


def test_the_last_words_of_a_killed_run_are_not_lost_and_not_doubled(
    open_: Callable[[], Brain], tmp_path: Path
) -> None:
    go(open_(), tmp_path / "whole", 30)
    go(open_(), tmp_path / "run", 23)
    for name in RECORD[:3]:  # whatever came behind the save is of no account
        path = tmp_path / "run" / name
        if path.exists():
            path.write_bytes(path.read_bytes() + b"garbage")
    journal = tmp_path / "run" / "saves" / "3.journal"
    journal.write_bytes(journal.read_bytes() + b"0123 torn")
    go(open_(), tmp_path / "run", 30)
    assert told(tmp_path / "run") == told(tmp_path / "whole")


def test_a_damaged_save_is_not_needed(open_: Callable[[], Brain], tmp_path: Path) -> None:
    go(open_(), tmp_path / "whole", 30)
    go(open_(), tmp_path / "run", 23)
    saves = tmp_path / "run" / "saves"
    assert sorted(path.name for path in saves.iterdir() if path.is_dir()) == ["2", "3"]
    tensors = saves / "3" / "state.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-5] ^= 1
    tensors.write_bytes(content)
    with pytest.warns(BrainWarning, match="damaged"):
        go(open_(), tmp_path / "run", 30)
    assert told(tmp_path / "run") == told(tmp_path / "whole")


def test_the_record_of_another_run_is_not_touched(
    open_: Callable[[], Brain], open_tiny: OpenTiny, tmp_path: Path
) -> None:
    go(open_(), tmp_path / "run", 10).close()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = open_tiny(save_every=7, prompt=PROMPT, seed=5)
    with pytest.raises(Refused, match=r"seed: 0 in the record, 5 given|repair"):
        go(other, tmp_path / "run", 20)
    (tmp_path / "run" / "saves" / "run.json").write_text("[]")
    with pytest.raises(Refused, match="format"):
        go(open_(), tmp_path / "run", 20)
    (tmp_path / "run" / "saves" / "run.json").write_bytes(
        before[tmp_path / "run" / "saves" / "run.json"]
    )
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize(("key", "value"), [("lookup", "ngram"), ("weights", "int8")])
def test_a_record_from_before_a_setting_was_made_without_it(
    key: str, value: str, open_tiny: OpenTiny, tmp_path: Path
) -> None:
    run_record = go(open_tiny(), tmp_path, 4)
    run_record.finish("")
    run_record.close()
    path = tmp_path / "saves" / "run.json"
    record = json.loads(path.read_text("utf-8"))
    del record["conf"][key]
    path.write_text(json.dumps(record), "utf-8")
    with pytest.raises(Refused, match=rf"\({key}.* in the record, .* given\)"):
        go(open_tiny(**{key: value}), tmp_path, 6)
    go(open_tiny(), tmp_path, 6).close()
    assert len((tmp_path / "tokens.txt").read_text("utf-8").splitlines()) == 6


def test_a_record_from_before_the_operator_was_made_without_it(
    open_tiny: OpenTiny, tmp_path: Path
) -> None:
    """An eager run never had one; a captured one goes on only as it began."""
    for engine in ("eager", "compiled"):
        folder = tmp_path / engine
        run_record = go(open_tiny(engine=engine, **{"engine.native": False}), folder, 4)
        run_record.finish("")
        run_record.close()
        path = folder / "saves" / "run.json"
        record = json.loads(path.read_text("utf-8"))
        written = record["conf"]["engine"]
        del written["native"]
        written["compiled"] = written.pop("captured")
        path.write_text(json.dumps(record), "utf-8")
    with pytest.raises(Refused, match=r"\(engine\."):
        go(open_tiny(engine="compiled"), tmp_path / "compiled", 6)
    go(open_tiny(engine="eager"), tmp_path / "eager", 6).close()


def test_a_record_from_before_novelty_had_a_lifetime_was_made_without_one(
    open_tiny: OpenTiny, tmp_path: Path
) -> None:
    none = {"cull.novelty.lifetime": None}
    run_record = go(open_tiny(**none), tmp_path, 4)
    run_record.finish("")
    run_record.close()
    path = tmp_path / "saves" / "run.json"
    record = json.loads(path.read_text("utf-8"))
    del record["conf"]["cull"]["novelty"]["lifetime"]
    path.write_text(json.dumps(record), "utf-8")
    with pytest.raises(Refused, match=r"\(cull\."):
        go(open_tiny(), tmp_path, 6)
    go(open_tiny(**none), tmp_path, 6).close()


def test_a_run_keeps_the_rule_for_special_tokens_that_it_began_with(
    open_tiny: OpenTiny, tmp_path: Path
) -> None:
    def roomy(**rule: bool | None) -> Brain:
        return open_tiny(capacity=96, **{"cull.target": 96}, **rule)

    def going_on() -> Brain:
        return roomy(special=as_recorded(roomy().settings.conf, tmp_path / "run").special)

    order = '[{"do": "inject", "text": "<|end|>", "source": "tool"}]'

    def from_tool(run_record: RunRecord) -> list[int]:
        rows = run_record._brain.mirror
        pairs = zip(rows.token_id.tolist(), rows.sources(), strict=True)
        run_record.close()
        return [token for token, source in pairs if source == "tool"]

    began = go(roomy(), tmp_path / "run", 3)
    began.save()
    began.close()
    path = tmp_path / "run" / "saves" / "run.json"
    record = json.loads(path.read_text("utf-8"))
    assert record["conf"].pop("special") is None  # as before there was the setting
    path.write_text(json.dumps(record), "utf-8")
    assert from_tool(go(going_on(), tmp_path / "run", 6, {3: order})) == [0]
    assert from_tool(go(going_on(), tmp_path / "run", 7)) == [0]  # replayed by the same rule
    with pytest.raises(Refused, match=r"special: True in the record, False given"):
        go(roomy(special=False), tmp_path / "run", 8)
    as_text = began._brain.tokenizer.encode("<|end|>", special=False)
    assert from_tool(go(roomy(), tmp_path / "new", 6, {3: order})) == as_text


@pytest.mark.parametrize("part", ["vocab", "merges"])
def test_another_tokenizer_is_refused(
    part: str, tiny_folder: Path, open_tiny: OpenTiny, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    path = {"model.path": str(model)}
    b = open_tiny(**path)
    run_record = go(b, tmp_path / "run", 3)
    run_record.save()
    run_record.close()
    b.save(tmp_path / "save")
    file = model / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    if part == "vocab":
        words = content["model"]["vocab"]
        words["he"], words["ll"] = words["ll"], words["he"]
    else:
        content["model"]["merges"].pop()
    file.write_text(json.dumps(content), "utf-8")
    with pytest.raises(Refused, match=r"another tokenizer .*in the record, .* given"):
        go(open_tiny(**path), tmp_path / "run", 6)
    with pytest.raises(Refused, match="another tokenizer"):
        load(tmp_path / "save")
    for where, name in ((tmp_path / "save", "brain.json"), (tmp_path / "run/saves", "run.json")):
        told = json.loads((where / name).read_text("utf-8"))
        del told["vocabulary_sha256"]  # from before there was a hash
        (where / name).write_text(json.dumps(sealed(told) if "seal" in told else told), "utf-8")
    assert load(tmp_path / "save").ticks == 3
    with pytest.raises(Refused, match="another tokenizer"):  # its saves have one
        go(open_tiny(**path), tmp_path / "run", 6)


def test_a_difference_at_the_end_of_a_long_text_is_shown(
    open_tiny: OpenTiny, tmp_path: Path
) -> None:
    text = "abc " * 40
    go(open_tiny(prompt=text + "this"), tmp_path, 1).close()
    with pytest.raises(Refused, match=r"prompt: '….*this' in the record, '….*that' given"):
        go(open_tiny(prompt=text + "that"), tmp_path, 2)


def test_I13_nothing_of_a_redacted_row_is_left_in_the_record(
    open_: Callable[[], Brain], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run_record = go(open_(), folder, 17)
    brain = run_record._brain
    mirror = brain.mirror
    transcript = folder / "transcript.txt"

    def told_apart(row: int) -> bool:
        """Whether id and text of a row that was spoken are nowhere else."""
        token = int(mirror.token_id[row])
        spelled = brain.decode([token]).encode()
        once = transcript.read_bytes().count(spelled) == 1
        return mirror.born[row] > 0 and once and run_record.tokens().count(token) == 1

    index = next(n for n in reversed(range(len(mirror))) if told_apart(n))
    token, position, born = (
        int(column[index]) for column in (mirror.token_id, mirror.position, mirror.born)
    )
    line = f"{born - 1} {token}\n"
    slot = int(mirror.slot[index])
    secrets = [
        raw_bytes(rows[layer, head, slot])
        for rows in (brain.state.keys, brain.state.values)
        for layer in range(rows.shape[0])
        for head in range(rows.shape[1])
    ]
    secrets += [brain.decode([token]).encode(), f'"said":{token}}}'.encode(), line.encode()]
    run_record.save()
    everywhere = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert all(secret in everywhere for secret in secrets)  # the search can find them
    assert line in (folder / "tokens.txt").read_text()
    spelled = brain.decode([token])
    before = (folder / "transcript.txt").read_text("utf-8")
    send(folder, json.dumps([{"do": "redact", "positions": [position]}]))
    assert run_record.inbox.poll() == 1
    assert line not in (folder / "tokens.txt").read_text()
    after = (folder / "transcript.txt").read_text("utf-8")
    assert len(after) <= len(before) - len(spelled) + 1
    # One save and its journal, of after the redaction.
    names = sorted(path.name for path in (folder / "saves").iterdir())
    assert names == ["4", "4.journal", "run.json"]
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(secret in content for secret in secrets), path
    with safe_open(folder / "saves" / "4" / "state.safetensors", "pt") as saved:
        for name in ("token_id", "cursor.token"):
            assert token not in saved.get_tensor(name).tolist()
    run_record.record_ticks(brain.tick())
    run_record.close()
    again = go(open_(), folder, 20)
    assert line not in (folder / "tokens.txt").read_text()
    assert again.spoken == 20
    # A second way to the same end: nothing was killed in between.
    assert (folder / "transcript.txt").read_text("utf-8").startswith(after)


@pytest.mark.parametrize("nth", range(1, 40, 2))
def test_I13_a_redaction_that_is_killed_is_done_in_the_end(
    nth: int, open_: Callable[[], Brain], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run_record = go(open_(), folder, 17)
    mirror = run_record._brain.mirror
    index = next(n for n in reversed(range(len(mirror))) if mirror.born[n] > 0)
    line = f"{int(mirror.born[index]) - 1} {int(mirror.token_id[index])}\n"
    position = int(mirror.position[index])
    send(folder, f'[{{"do": "redact", "positions": [{position}]}}]')
    with contextlib.suppress(Killed), power_cut_at(nth):
        run_record.inbox.poll()
    again = go(open_(), folder, 20)
    assert line not in (folder / "tokens.txt").read_text()
    saves = folder / "saves"
    assert not list(saves.glob(".*"))
    assert not list(folder.glob("*.rewritten"))
    alone = [
        path.parent for path in saves.glob("*/brain.json") if '"alone": true' in path.read_text()
    ]
    assert len(alone) == 1
    assert min(int(path.stem) for path in saves.glob("*.journal")) == int(alone[0].name)
    answers = [json.loads(answer) for answer in (folder / ANSWERS).read_text().splitlines()]
    assert [answer["applied"] for answer in answers] == [1]
    assert len(again.tokens()) == 19
    assert again.spoken == 20


def test_what_was_not_written_down_did_not_happen(
    open_: Callable[[], Brain], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full for a moment: nothing is saved after it, and nothing is lost."""
    go(open_(), tmp_path / "whole", 40, ORDERS)
    folder, brain = tmp_path / "run", open_()
    run_record = go(brain, folder, 20, ORDERS)

    class Full:
        """A file on a full disk."""

        def write(self, text: str) -> None:
            raise OSError(28, "No space left")

    transcript = run_record._files.streams["transcript.txt"]
    monkeypatch.setitem(run_record._files.streams, "transcript.txt", Full())
    with pytest.raises(Unwritten, match="No space left"):
        run_record.record_ticks(brain.tick())
    monkeypatch.setitem(run_record._files.streams, "transcript.txt", transcript)
    before = sorted(path.name for path in (folder / "saves").iterdir())
    run_record.save()
    assert sorted(path.name for path in (folder / "saves").iterdir()) == before
    go(open_(), folder, 40, ORDERS)
    assert told(folder) == told(tmp_path / "whole")


def test_I13_only_the_row_that_was_spoken_leaves_the_transcript(
    open_: Callable[[], Brain], tmp_path: Path
) -> None:
    """An injected token may be the very one that is spoken next."""
    folder, brain = tmp_path / "run", open_()
    run_record = go(brain, folder, 9)
    spoken = brain.decode([run_record.tokens()[-1]])
    send(folder, json.dumps([{"do": "inject", "text": "h", "source": "tool"}]))
    run_record.inbox.poll()
    run_record.record_ticks(brain.tick())
    tokens = run_record.tokens()
    rows = brain.mirror
    place = next(n for n in range(len(rows)) if rows.sources()[n] == "tool")
    send(folder, json.dumps([{"do": "redact", "positions": [int(rows.position[place])]}]))
    assert run_record.inbox.poll() == 1
    assert run_record.tokens() == tokens
    assert spoken in (folder / "transcript.txt").read_text("utf-8")


def test_two_brains_do_not_write_into_one_folder(tmp_path: Path) -> None:
    with (
        sole_writer(tmp_path),
        pytest.raises(Refused, match="belongs to a brain that is running"),
        sole_writer(tmp_path),
    ):
        pass
    with sole_writer(tmp_path):  # and a lock that was left is no lock
        pass


def test_a_full_disk_is_told_and_loses_nothing(
    open_: Callable[[], Brain], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    run_record = go(open_(), folder, 20)

    for error in (OSError(28, "No space left"), SafetensorError("No space left")):

        def full(*_: object, error: Exception = error) -> None:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr("brain.saves.save_file", full)
            with pytest.raises(Refused, match="No space left"):
                run_record.save()
    names = sorted(path.name for path in (folder / "saves").iterdir())
    assert names == ["1", "1.journal", "2", "2.journal", "run.json"]
    run_record.close()
    go(open_(), folder, 30)
    go(open_(), tmp_path / "whole", 30)
    assert told(folder) == told(tmp_path / "whole")


def test_kill_9_and_the_same_command_again(
    tiny_folder: Path, tmp_path: Path, tiny_command_line: CommandLine
) -> None:
    """As a user would: processes, signals, and the text on standard output."""
    settings = [f"prompt={PROMPT}", "capacity=64", "save_every=40"]
    arguments = command(tiny_folder, *settings, "ticks=400")
    kills, differing = soak(arguments, tmp_path, kills=3, seed=1, environment=ENVIRONMENT)
    assert kills == 3
    assert differing == []
    out = tmp_path / "killed"
    report = json.loads((out / "run.json").read_text("utf-8"))
    assert len(report["tokens"]) == 400
    # Once more: there is nothing left to say, and nothing is said.
    before = told(out)
    status, text, _ = tiny_command_line(*settings, "ticks=400", f"hydra.run.dir={out}")
    assert (status, text) == (0, "")
    assert told(out) == before
    # More of the same: the text alone goes to standard output.
    status, more, _ = tiny_command_line(*settings, "ticks=420", f"hydra.run.dir={out}")
    assert status == 0
    after = (out / "transcript.txt").read_text("utf-8")
    assert after.endswith(more)
    assert len(more) > 0
    another = ["prompt=Another", "capacity=64", f"hydra.run.dir={out}"]
    status, _, refusal = tiny_command_line(*another)
    assert status == 2
    assert "prompt: " in refusal


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_whoever_asks_it_to_stop_gets_a_save(
    asked: signal.Signals, tiny_folder: Path, tmp_path: Path
) -> None:
    running = subprocess.Popen(
        command(tiny_folder, f"prompt={PROMPT}", "ticks=1000000", "hydra.run.dir=out"),
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    transcript = tmp_path / "out" / "transcript.txt"
    deadline = time.monotonic() + 60
    while not transcript.exists() or transcript.stat().st_size == 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(asked)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert "Traceback" not in errors
    spoken = len((tmp_path / "out" / "tokens.txt").read_text().splitlines())
    newest = max(
        (tmp_path / "out" / "saves").glob("*/brain.json"), key=lambda p: int(p.parent.name)
    )
    assert json.loads(newest.read_text("utf-8"))["notes"]["spoken"] == spoken


def test_damaged_records_are_refused_in_one_line(
    open_: Callable[[], Brain], tmp_path: Path
) -> None:
    go(open_(), tmp_path / "run", 23).close()
    damages: list[Callable[[Path], object]] = [
        lambda f: (f / "transcript.txt").unlink(),
        lambda f: os.truncate(f / "tokens.txt", 1),
        lambda f: (f / "saves" / "3.journal").write_bytes(b"x\ny\nz\n"),
        lambda f: [(f / "saves" / name / "brain.json").write_bytes(b"{") for name in ("2", "3")],
    ]
    for number, damage in enumerate(damages):
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / "run", copy)
        damage(copy)
        with pytest.raises(Refused):
            go(open_(), copy, 30)
