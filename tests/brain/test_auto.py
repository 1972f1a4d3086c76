"""What ``auto`` is replaced by, before anything is recorded."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import brain
from brain import app, auto
from brain.auto import plainest, resolved
from brain.config.compose import compose_conf
from brain.config.settings import engine_name, settings_of
from brain.errors import BrainWarning, Refused
from brain.record.run_record import as_recorded
from conf.schema import Conf, DType
from fixture_types import CommandLine, EditJson, SaveLlama

Model = list[str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, save_llama: SaveLlama) -> dict[str, Model]:
    """Overrides that open a model, by the format that its weights are stored in."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("float32", "bfloat16", "float16"):
        save_llama(folder / name, dtype=getattr(torch, name))
    return {path.name: ["model=folder", f"path={path}", "device=cpu"] for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def fast_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


def chosen(*overrides: str) -> tuple[str, str]:
    conf = resolved(compose_conf(list(overrides))).conf
    assert None not in (conf.engine.captured, conf.engine.native)
    return engine_name(conf.engine), conf.dtype.value


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")


@pytest.mark.parametrize(
    ("stored", "expected"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "bfloat16")],
)
def test_the_number_format_follows_that_of_the_stored_weights(
    models: dict[str, Model], stored: str, expected: str
) -> None:
    assert chosen(*models[stored]) == ("native", expected)


def test_a_converted_folder_says_what_it_was_made_of(
    models: dict[str, Model], tmp_path: Path, save_llama: SaveLlama, edit_json: EditJson
) -> None:
    save_llama(tmp_path)
    edit_json(tmp_path / "config.json", {"converted_from": "Q4_K"})
    conf = compose_conf(["model=folder", f"path={tmp_path}", "device=cpu"])
    told = resolved(conf)
    assert told.conf.dtype is DType.bfloat16
    assert told.reason is not None
    assert "Q4_K" in told.reason
    assert "engine=native" in told.reason


def test_a_cpu_that_was_not_measured_gets_float32(
    models: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert chosen(*models["bfloat16"]) == ("native", "float32")


@pytest.mark.parametrize("engine", ["eager", "native", "compiled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_said_is_kept(models: dict[str, Model], engine: str, dtype: str) -> None:
    conf = compose_conf([*models["bfloat16"], f"engine={engine}", f"dtype={dtype}"])
    told = resolved(conf)
    assert told.conf is conf
    assert told.reason is None


def test_the_eager_engine_gains_nothing_from_fewer_bits(models: dict[str, Model]) -> None:
    assert chosen(*models["bfloat16"], "engine=eager") == ("eager", "float32")
    assert chosen(*models["bfloat16"], "engine=compiled") == ("compiled", "bfloat16")


def test_without_a_compiler_the_eager_engine_runs_and_it_is_said(
    models: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_compiler(monkeypatch)
    with pytest.warns(BrainWarning, match="compiler.*; the eager engine runs, which is slow"):
        assert chosen(*models["bfloat16"]) == ("eager", "float32")
    with pytest.raises(Refused, match="compiler"):
        brain.open("folder", engine="native", path=models["float32"][1].removeprefix("path="))


def test_float16_has_no_operators(models: dict[str, Model]) -> None:
    with pytest.warns(BrainWarning, match="dtype=float16 has no operators for the CPU"):
        assert chosen(*models["float16"], "dtype=float16") == ("eager", "float16")


def test_native_where_it_has_no_operators_is_refused() -> None:
    conf = compose_conf(["engine=native", "dtype=float16", "device=cpu"])
    with pytest.raises(Refused, match="engine=native has no operators for dtype=float16 on cpu"):
        settings_of(conf)


@pytest.mark.parametrize(
    ("capability", "expected"), [((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((7, 5), "float32")]
)
def test_a_gpu_captures_and_multiplies_in_what_it_has(
    models: dict[str, Model],
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    expected: str,
) -> None:
    gpu = SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(auto, "settings_of", lambda conf, policy: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert chosen(*models["bfloat16"]) == ("compiled", expected)
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    with pytest.warns(BrainWarning, match="TORCH_COMPILE_DISABLE"):
        assert chosen(*models["bfloat16"]) == ("eager", "float32")


def test_a_wrong_value_is_refused_before_a_model_is_looked_for() -> None:
    conf = compose_conf(["model=folder", "path=/no/such/folder", "capacity=-1"])
    with pytest.raises(Refused, match="capacity must be"):
        resolved(conf)


def test_the_plainest_leaves_nothing_to_choose() -> None:
    conf = plainest(compose_conf([]))
    assert (engine_name(conf.engine), conf.dtype) == ("eager", DType.float32)


# Records ----------------------------------------------------------------------------------------


def speak(command_line: CommandLine, model: Model, folder: Path, *more: str) -> tuple[int, str]:
    code, _, err = command_line(*model, f"hydra.run.dir={folder}", "prompt=hello", *more)
    return code, err


def recorded(folder: Path) -> dict[str, Any]:
    conf: dict[str, Any] = json.loads((folder / "saves" / "run.json").read_text())["conf"]
    return conf


def test_what_was_chosen_is_recorded_and_kept(
    models: dict[str, Model], command_line: CommandLine, tmp_path: Path
) -> None:
    folder, model = tmp_path / "run", models["bfloat16"]
    code, err = speak(command_line, model, folder, "ticks=3")
    assert code == app.DONE, err
    assert "engine=native dtype=bfloat16 (the weights come from BF16" in err
    conf = recorded(folder)
    assert (conf["engine"]["captured"], conf["engine"]["native"]) == (False, True)
    assert conf["dtype"] == "bfloat16"
    report = json.loads((folder / "run.json").read_text())
    assert (report["engine"], report["dtype"]) == ("native", "bfloat16")
    saved = json.loads(next((folder / "saves").glob("*/brain.json")).read_text())["conf"]
    assert saved["dtype"] == "bfloat16"
    assert "auto" not in json.dumps(saved["engine"])

    code, err = speak(command_line, model, folder, "ticks=5")
    assert code == app.DONE, err
    for other in ("dtype=float32", "engine=eager"):
        code, err = speak(command_line, model, folder, "ticks=7", other)
        assert code == app.REFUSED
        assert "has the record of another run" in err
    assert len(json.loads((folder / "run.json").read_text())["tokens"]) == 5


@pytest.mark.parametrize("engine", ["eager", "native"])
def test_a_record_of_another_engine_goes_on_with_it_when_nothing_is_said(
    models: dict[str, Model], command_line: CommandLine, tmp_path: Path, engine: str
) -> None:
    folder, model = tmp_path / "run", models["bfloat16"]
    code, err = speak(command_line, model, folder, "ticks=3", f"engine={engine}", "dtype=float32")
    assert code == app.DONE, err
    code, err = speak(command_line, model, folder, "ticks=6")
    assert code == app.DONE, err
    report = json.loads((folder / "run.json").read_text())
    assert (report["engine"], report["dtype"]) == (engine, "float32")


def as_of_old(path: Path, *, captured: bool, native: bool | None) -> None:
    """A record as it was written when nothing was captured by the name of ``compiled``."""
    record = json.loads(path.read_text())
    engine = record["conf"]["engine"]
    del engine["captured"], engine["native"]
    engine["compiled"] = captured
    if native is not None:
        engine["native"] = native
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("native", [None, False])
def test_a_record_from_before_there_was_a_choice_was_made_eagerly(
    models: dict[str, Model], command_line: CommandLine, tmp_path: Path, native: bool | None
) -> None:
    folder, model = tmp_path / "run", models["bfloat16"]
    code, err = speak(command_line, model, folder, "ticks=3", "engine=eager", "dtype=float32")
    assert code == app.DONE, err
    as_of_old(folder / "saves" / "run.json", captured=False, native=native)
    code, err = speak(command_line, model, folder, "ticks=6")
    assert code == app.DONE, err
    assert json.loads((folder / "run.json").read_text())["engine"] == "eager"


@pytest.mark.parametrize("content", ["", "[]", '{"conf": 3}', '{"conf": {"engine": []}}'])
def test_a_damaged_record_decides_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "saves").mkdir()
    (tmp_path / "saves" / "run.json").write_text(content)
    conf: Conf = compose_conf([])
    assert as_recorded(conf, tmp_path) is conf


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("native", [True, False])
def test_what_is_said_of_an_engine_stays(
    models: dict[str, Model], captured: bool, native: bool
) -> None:
    """Half of what makes an engine may be said."""
    for key, value in (("captured", captured), ("native", native)):
        engine = resolved(
            compose_conf(
                [*models["float32"], "dtype=float32", f"engine.{key}={str(value).lower()}"]
            )
        ).conf.engine
        assert getattr(engine, key) is value
        assert None not in (engine.captured, engine.native)
