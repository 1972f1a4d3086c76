"""What ``model=…`` names: a built-in name, a path, or a repository on the hub."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import brain
from brain.config.compose import compose_conf
from brain.config.model_name import choices, named_model
from brain.config.overrides import as_given, literal_arguments, model_overrides
from brain.errors import Refused
from conf.schema import ModelConf, Source
from fixture_types import CommandLine
from gguf_files import byte_level_fields, write_gguf


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def model_of(argument: str, *others: str) -> ModelConf:
    """What a command line comes to."""
    return compose_conf(literal_arguments([f"model={argument}", *others])).model


AWKWARD = (
    "my model",
    "a,b",
    "a=b",
    "it's",
    '"quoted"',
    "größe – 模型 🦙",
    "[x]{y}(z)$HOME${a}",
    "null",
    "1e3",
    "???",
    "~tilde",
    "choice(a)",
    "org/name",
    "back\\slash",
    " spaces ",
)


@pytest.mark.parametrize("name", AWKWARD)
def test_a_path_that_exists_is_itself(here: Path, name: str) -> None:
    (here / name).parent.mkdir(exist_ok=True)
    is_file = len(name) % 2 == 0
    (here / name).touch() if is_file else (here / name).mkdir()
    source = Source.gguf if is_file else Source.folder
    for spelling in (f"./{name}", str(here / name)):
        found = model_of(spelling)
        assert (found.name, found.source, found.path) == (spelling, source, spelling)
        assert (found.repo, found.revision, found.wheel) == (None, None, None)
    assert compose_conf(model_overrides(here / name)).model.source is source


@settings(max_examples=12, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_any_name_arrives_as_it_was_given(name: str) -> None:
    assume(name not in choices())  # the words of the source are among the examples
    assert literal_arguments([f"model={name}"]) == model_overrides(name)
    _, argument = model_overrides(name)
    override = OverridesParser.create().parse_override(argument)
    value = as_given(str(OmegaConf.create({"x": str(override.value())}).x))
    assert value == name


def test_built_in_names_come_first(here: Path) -> None:
    for name in ("smollm2", "tinyllama", "folder"):
        (here / name).mkdir()
        assert model_of(name).source is not Source.named
        assert model_of(name).path is None
        assert model_of(f"./{name}").path == f"./{name}"
        assert compose_conf(model_overrides(name)).model.path is None
        assert compose_conf(model_overrides(Path(name))).model.path == f"./{name}"
    assert choices() == {"smollm2", "tinyllama", "folder"}


def test_a_path_comes_before_a_repository(here: Path) -> None:
    found = model_of("someone/tiny", "model.revision=v2")
    assert (found.source, found.repo, found.revision) == (Source.hub, "someone/tiny", "v2")
    (here / "someone" / "tiny").mkdir(parents=True)
    found = model_of("someone/tiny")
    assert (found.source, found.repo, found.path) == (Source.folder, None, "someone/tiny")
    with pytest.raises(Refused, match=r"model\.revision does not apply to model=someone/tiny"):
        model_of("someone/tiny", "model.revision=v2")


def test_links_slashes_and_home(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "model").mkdir()
    (here / "link").symlink_to("model")
    (here / "blob").touch()
    (here / "x.gguf").symlink_to("blob")
    monkeypatch.setenv("HOME", str(here))
    for name in ("model/", "link", "link/", "~/model", ".", "..", "model/../link"):
        assert model_of(name).source is Source.folder, name
    for name in ("x.gguf", "blob", "~/x.gguf"):
        assert model_of(name).source is Source.gguf, name


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("smolm2", "smollm2"),
        ("tiny-llama", "tinyllama"),
        ("", None),
        ("./nothing", None),
        ("/no/where", None),
        ("a/b/c", None),
        ("models/x.gguf", None),
        ("models/model.safetensors", None),
        ("-x/y", None),
        (".x/y", None),
        ("org/", None),
        ("org/name\n", None),
        ("örg/name", None),
    ],
)
def test_what_is_none_of_them_is_told_in_one_line(here: Path, name: str, meant: str | None) -> None:
    with pytest.raises(Refused) as refusal:
        model_of(name)
    told = str(refusal.value)
    assert "\n" not in told
    assert "no built-in model (folder, smollm2, tinyllama), no path that exists, and no" in told
    assert ("did you mean" in told) == (meant is not None)
    assert told.endswith(f"; did you mean {meant}?" if meant else "(org/name)")


def test_a_path_beside_it_is_refused(here: Path) -> None:
    (here / "model").mkdir()
    for other in ("path=elsewhere", "model.path=elsewhere"):
        with pytest.raises(Refused, match="path=elsewhere does not apply to model=model"):
            model_of("model", other)
    assert model_of("folder", "path=model").path == "model"
    assert model_of("folder", "model.path=model").path == "model"


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("a.gguf,b.gguf", ["a.gguf", "b.gguf"]),
        ("~/a,smollm2", ["~/a", "smollm2"]),
        ('"a,b",c', ["a,b", "c"]),
        ("'a b', c d ", ["a b", "c d"]),
        ("a\\,b,c", ["a,b", "c"]),
        ("it's,b", ["it's", "b"]),
        ('"a"b,c', ['"a"b', "c"]),
        ('"q\\"r",s', ['q"r', "s"]),
        ("C:\\x\\y,z\\", ["C:\\x\\y", "z\\"]),
        ("a", ["a"]),
        ("a,", ["a", ""]),
    ],
)
def test_a_multirun_sweeps_over_names(value: str, names: list[str]) -> None:
    multirun, group, name = literal_arguments([f"model={value}", "-m"])
    assert (multirun, group) == ("--multirun", "model=named")
    override = OverridesParser.create().parse_override(name)
    if len(names) == 1:
        assert override.value() == names[0]
    else:
        assert [str(getattr(n, "text", n)) for n in override.sweep_iterator()] == names


def test_a_multirun_over_choices_is_hydra_s(here: Path) -> None:
    for argument in ("model=smollm2,tinyllama", "model=smollm2", "model=glob(*)"):
        assert literal_arguments(["-m", argument]) == ["--multirun", argument]
    assert literal_arguments(["model=smollm2"]) == ["model=smollm2"]


def test_a_choice_in_a_sweep_of_names_is_what_it_is_alone() -> None:
    for name in ("smollm2", "tinyllama"):
        alone = compose_conf([f"model={name}"]).model
        assert named_model(ModelConf(name=name, source=Source.named)) == alone


@pytest.mark.parametrize("model", [None, 3, ["a"], b"smollm2"])
def test_what_is_no_name_is_refused(model: Any) -> None:
    with pytest.raises(Refused):
        brain.open(model)


# The command itself -------------------------------------------------------------------------------

SMALL = (
    "capacity=48",
    "cull.target=24",
    "cull.recent=4",
    "ticks=4",
    "prompt=Hello",
    "engine=eager",
)


@pytest.fixture
def models(tmp_path: Path, save_llama: Any, byte_level_json: str) -> Path:
    """A folder, its twin ``twin.gguf``, and another model, in ``tmp_path``, where commands run."""
    state = save_llama(tmp_path / "folder", vocab_size=260, std=0.3)
    write_gguf(tmp_path / "twin.gguf", state, byte_level_fields(byte_level_json, "smollm"))
    save_llama(tmp_path / "other, one", vocab_size=260, std=0.5)
    return tmp_path


def report(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "run.json").read_text("utf-8")))


def test_a_file_says_what_its_folder_says(models: Path, command_line: CommandLine) -> None:
    said = []
    for name in ("./folder", "twin.gguf"):
        status, out, notes = command_line(f"model={name}", *SMALL, f"hydra.run.dir=of {name[:6]}")
        assert status == 0, notes
        assert f"loading {name} …" in notes
        said.append(out)
    assert said[0] == said[1] != ""
    assert [report(models / at)["model"] for at in ("of ./fold", "of twin.g")] == [
        "folder",
        "twin.gguf",
    ]
    b = brain.open(models / "twin.gguf", **dict(pair.split("=", 1) for pair in SMALL[:4]))
    assert b.decode(b.encode("Hello")) == "Hello"


def test_a_command_that_is_given_again_goes_on(models: Path, command_line: CommandLine) -> None:
    before = sorted(path for path in models.rglob("*") if path.is_file())
    options = ("hydra.run.dir=out", "hydra.job.chdir=true", f"cache_dir={models / 'cache'}")
    command = ("model=twin.gguf", *SMALL, *options)
    assert command_line(*command)[0] == 0
    assert not (models / "cache").exists()
    first = report(models / "out")["tokens"]
    status, _, notes = command_line(*command, "ticks=9")
    assert status == 0, notes
    assert "going on after 4 tokens" in notes
    tokens = report(models / "out")["tokens"]
    assert (tokens[:4], len(tokens)) == (first, 9)
    recorded = json.loads((models / "out" / "saves" / "run.json").read_text())["conf"]["model"]
    assert (recorded["source"], recorded["path"]) == ("gguf", "twin.gguf")
    assert [p for p in before if not p.exists()] == []
    assert {p.parent for p in models.rglob("*.gguf")} == {models}
    shutil.copytree(models / "folder", models / "twin2")
    status, _, notes = command_line("model=twin2", *command[1:])
    assert status == 2
    assert "model.name: 'twin.gguf' in the record, 'twin2' given" in notes
    os.replace(models / "twin.gguf", models / "gone.gguf")
    status, _, notes = command_line(*command)
    assert status == 2
    assert "model=twin.gguf is no built-in model" in notes.splitlines()[-1]


def test_a_save_opens_its_file_again(models: Path, tmp_path: Path) -> None:
    b = brain.open(str(models / "twin.gguf"), **dict(pair.split("=", 1) for pair in SMALL[:4]))
    b.prime("Hello there")
    b.save(tmp_path / "save")
    expected = [tick.token for tick in b.stream(ticks=5)]
    again = brain.load(tmp_path / "save")
    assert again.settings.conf.model.source is Source.gguf
    assert [tick.token for tick in again.stream(ticks=5)] == expected


def test_a_multirun_runs_every_model(models: Path, command_line: CommandLine) -> None:
    command = ("-m", 'model=twin.gguf,"other, one"', *SMALL, "hydra.sweep.dir=out")
    status, _, notes = command_line(*command)
    assert status == 0, notes
    found = [report(models / "out" / str(job))["model"] for job in range(2)]
    assert found == ["twin.gguf", "other, one"]
    status, _, notes = command_line(*command, "ticks=6")
    assert notes.count("going on after 4 tokens") == 2


def test_eight_bits_of_a_file(models: Path, command_line: CommandLine) -> None:
    status, out, notes = command_line("model=twin.gguf", "weights=int8", *SMALL)
    assert status == 0, notes
    assert out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["model=nowhere.gguf"], "model=nowhere.gguf is no built-in model"),
        (["model=damaged.gguf"], "damaged.gguf: not a GGUF file"),
        (["model=folder/config.json"], "folder/config.json: not a GGUF file"),
        (["model=empty"], "empty/config.json: no such file"),
        (["model=/dev/null"], "/dev/null: not a GGUF file"),
        (["model=twin.gguf", "path=x"], "path=x does not apply to model=twin.gguf"),
        (["model=twin.gguf", "model.repo=a/b"], "model.repo=a/b does not apply to model=twin.gguf"),
        (["model=twin.gguf", "task=bench", "weights=int8"], "is timed as it lies, in F32"),
        (["model=named"], "model=named is no built-in model"),
        (["model=./folder", "model.name=x"], "model.name does not apply to model=./folder"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(
    models: Path, command_line: CommandLine, arguments: list[str], told: str
) -> None:
    content = (models / "twin.gguf").read_bytes()
    (models / "damaged.gguf").write_bytes(content[:5000])
    (models / "empty").mkdir()
    before = sorted(models.rglob("*"))
    status, out, notes = command_line(*arguments)
    assert (status, out) == (2, "")
    assert told in notes.splitlines()[-1]
    assert "Traceback" not in notes
    assert sorted(models.rglob("*")) == before


def test_the_last_of_several_models_counts(models: Path, command_line: CommandLine) -> None:
    status, _, notes = command_line("model=twin.gguf", "model=folder", "path=folder", *SMALL)
    assert status == 0, notes
    assert "loading folder …" in notes


def test_a_choice_of_ones_own_is_found(models: Path, command_line: CommandLine) -> None:
    """In a folder of configurations beside ours."""
    (models / "conf" / "model").mkdir(parents=True)
    told = f"defaults: [schema, _self_]\nname: mine\nsource: folder\npath: {models / 'folder'}\n"
    (models / "conf" / "model" / "mine.yaml").write_text(told)
    for flags in (["--config-dir=conf"], ["--config-dir", "conf"]):
        status, _, notes = command_line(*flags, "model=mine", *SMALL)
        assert status == 0, notes
        assert "loading mine …" in notes


def test_a_sweep_may_be_asked_for_by_mode(models: Path, command_line: CommandLine) -> None:
    where = ["hydra.sweep.dir=all", "hydra.sweep.subdir=${hydra.job.num}"]
    status, _, notes = command_line(
        "hydra.mode=MULTIRUN", "model=twin.gguf,folder", "path=null", *SMALL, *where
    )
    assert (models / "all" / "0" / "run.json").exists(), notes
    assert status == 2  # the second has no path
