"""Fixtures shared by all tests: the default model, and tiny random ones."""

import dataclasses
import functools
import json
import re
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

import brain
from brain import app
from brain.checkpoints.wheel import converted_wheel
from brain.config.compose import compose_conf
from brain.config.settings import settings_of
from brain.errors import Refused
from brain.measure.golden.reference import load_reference, seeded_reference
from brain.measure.golden.seeded import SEEDED
from brain.opening import checkpoint_of
from compiled.llama import frequency_table, weight_shapes
from fixture_types import CommandLine, EditJson, OpenTiny, Reference, RoomyBrain, SaveLlama
from precompiled_headers import precompile_headers
from toy_models import PARROT_OPTIONS, TRAINED
from toys import EVERYTHING

# The same examples on every run, however slow the machine.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")

precompile_headers()

THREADS = torch.get_num_threads()
INVARIANT = re.compile(r"test_I\d+_")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is in ``invariants/`` or carries the number of an invariant in its name."""
    for item in items:
        if item.path.parent.name == "invariants" or INVARIANT.match(item.name):
            item.add_marker(pytest.mark.invariant)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard() -> None:
    """Undoes an ignored SIGINT, which processes started by the tests would inherit: shells ignore
    it in what they run in the background.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2 as a Hugging Face folder, in the user's cache; skips where it cannot be had."""
    try:
        return converted_wheel()
    except Refused as refusal:
        pytest.skip(str(refusal))


@pytest.fixture(scope="session")
def byte_level_json() -> str:
    """The smallest byte-level BPE tokenizer.json: an <|end|> token, 256 bytes, three merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|end|>", *alphabet, "he", "ll", "Ġa"]
    library = Library(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[("h", "e"), ("l", "l"), ("Ġ", "a")],
        )
    )
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|end|>"])
    return str(library.to_str())


@pytest.fixture(scope="session")
def edit_json() -> EditJson:
    """Overrides keys of a JSON object in a file; a value of ``None`` removes the key."""

    def edit(path: Path, changes: dict[str, Any]) -> None:
        settings = json.loads(path.read_text())
        settings.update(changes)
        kept = {key: value for key, value in settings.items() if value is not None}
        path.write_text(json.dumps(kept))

    return edit


@pytest.fixture(scope="session")
def save_llama(byte_level_json: str, edit_json: EditJson) -> SaveLlama:
    """Writes a tiny random Llama with transformers; returns its float32 state dict.

    ``save_llama(folder, dtype=…, max_shard_size=…, edit={…}, std=…, **config)``: ``edit``
    overrides keys of the written config.json, ``None`` removing them.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    def save(
        folder: Path,
        *,
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "1GB",
        edit: dict[str, Any] | None = None,
        std: float = 1.0,
        **settings: Any,
    ) -> dict[str, Tensor]:
        torch.manual_seed(0)
        config = LlamaConfig(
            **{
                "vocab_size": 300,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 128,
                **settings,
            }
        )
        model = LlamaForCausalLM(config)
        model.to(dtype)  # type: ignore[arg-type]
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=std)  # norms too, so that a mix-up shows
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        (folder / "tokenizer.json").write_text(byte_level_json)
        if edit:
            edit_json(folder / "config.json", edit)
        return {name: tensor.float() for name, tensor in model.state_dict().items()}

    return save


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Toy shapes run ten times faster on one thread than on several."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, save_llama: SaveLlama) -> Path:
    """A random Llama of 2 layers, in which 3 query heads share a key head.

    ``std=0.5`` gives attention that is neither flat nor all on one row, and logits of order 2.
    """
    folder = tmp_path_factory.mktemp("tiny")
    save_llama(
        folder,
        std=0.5,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1 << 20,
    )
    return folder


@pytest.fixture(scope="session")
def open_tiny(tiny_folder: Path) -> OpenTiny:
    """``open_tiny(**overrides)`` opens that Llama: 48 slots, of which the loop keeps 24 taken.

    Captured, it needs twelve graphs: reads of 1, 4 and 16 tokens over 32 and 48 slots, ….
    """

    def open_(**overrides: Any) -> brain.Brain:
        torch.set_num_threads(1)
        options = {
            "model.path": str(tiny_folder),
            "capacity": 48,
            "cull.target": 24,
            "cull.recent": 4,
            "engine.widths": [1, 4, 16],
            "engine.smallest_bucket": 32,
            "engine.chunk": None,
        }
        return brain.open("folder", **{**options, **overrides})

    return open_


@pytest.fixture(scope="session")
def warm_brain(open_tiny: OpenTiny) -> brain.Brain:
    """The tiny brain with every graph captured, shared by all tests: prime it before use."""
    captured = open_tiny(engine="compiled")
    for _ in captured.warm_up():
        pass
    return captured


@pytest.fixture(scope="session")
def eager_brain(open_tiny: OpenTiny) -> brain.Brain:
    """The tiny brain without graphs, shared by all tests: prime it before use."""
    return open_tiny(engine="eager")


@pytest.fixture(scope="session")
def native_brain(open_tiny: OpenTiny) -> brain.Brain:
    """The tiny brain with the operators and without graphs, shared: prime it before use."""
    return open_tiny(engine="native")


@pytest.fixture(scope="session")
def everything_brain(native_brain: brain.Brain) -> brain.Brain:
    """The native one with all that a Llama has not: a bias, norms of queries and keys, a layer that
    does not rotate, four scales; shared: prime it before use.
    """
    config = dataclasses.replace(native_brain.checkpoint.config, **EVERYTHING)
    shapes, generator = weight_shapes(config), torch.Generator().manual_seed(2)
    more: dict[str, Any] = {
        name: torch.randn(shapes[name], generator=generator) for name in ("qkv_bias", "qk_gain")
    }
    weights = native_brain.checkpoint.weights._replace(
        **more, inverse_frequencies=frequency_table(config)
    )
    checkpoint = dataclasses.replace(native_brain.checkpoint, config=config, weights=weights)
    return brain.Brain(checkpoint, native_brain.settings)


@pytest.fixture(params=["eager", "native", "warm"])
def llama_brain(request: pytest.FixtureRequest) -> brain.Brain:
    """Each of the three shared brains in turn that transformers has, too."""
    chosen: brain.Brain = request.getfixturevalue(f"{request.param}_brain")
    return chosen


@pytest.fixture(params=["eager", "native", "warm", "everything"])
def either_brain(request: pytest.FixtureRequest) -> brain.Brain:
    """Each of the four shared brains in turn."""
    chosen: brain.Brain = request.getfixturevalue(f"{request.param}_brain")
    return chosen


@pytest.fixture(scope="module")
def strict_cuda() -> Iterator[None]:
    """A graph that cannot be captured is an error, not a slow path; no TF32."""
    cudagraphs = torch._inductor.config.triton
    before = cudagraphs.cudagraph_or_error, torch.get_float32_matmul_precision()
    cudagraphs.cudagraph_or_error = True
    torch.set_float32_matmul_precision("highest")
    yield
    cudagraphs.cudagraph_or_error = before[0]
    torch.set_float32_matmul_precision(before[1])


# The default model and a toy with TinyLlama's heads, in a memory of 1,024 rows ------------------


@pytest.fixture
def all_threads() -> None:
    """For real weights: as many threads as PyTorch would choose, whatever ran before."""
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def roomy_brain(request: pytest.FixtureRequest) -> RoomyBrain:
    """``roomy_brain(model, dtype, engine)``: of ``smollm2`` or ``seeded-toy``, greedy, forgetting
    nothing, with reads of 1 and 128 tokens over one bucket. Shared by all tests: prime it first.
    """

    @functools.cache
    def shared(model: str, dtype: str, engine: str) -> brain.Brain:
        real = model not in SEEDED
        if real:
            request.getfixturevalue("smollm2_folder")
        conf = compose_conf(
            [
                f"dtype={dtype}",
                f"engine={engine}",
                "engine.widths=[1,128]",
                "engine.chunk=null",
                "engine.smallest_bucket=1024",
                "capacity=1024",
                "cull=none",
                "sampler=greedy",
                "device=cpu",
            ]
        )
        settings = settings_of(conf)
        checkpoint = (
            checkpoint_of(conf, settings)
            if real
            else SEEDED[model].checkpoint(settings.dtype, settings.device)
        )
        return brain.Brain(checkpoint, settings)

    return shared


@pytest.fixture(scope="session")
def reference_model(request: pytest.FixtureRequest) -> Reference:
    """``reference_model(model, dtype)``: the same models in Hugging Face transformers."""

    @functools.cache
    def shared(model: str, dtype: str) -> Any:
        if model in SEEDED:
            return seeded_reference(SEEDED[model], getattr(torch, dtype))
        return load_reference(request.getfixturevalue("smollm2_folder"), getattr(torch, dtype))

    return shared


# A toy that was trained on few positions ----------------------------------------------------------


@pytest.fixture(scope="session")
def short_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_folder: Path,
    edit_json: EditJson,
) -> Path:
    """The tiny Llama, trained on TRAINED positions."""
    folder = tmp_path_factory.mktemp("short") / "model"
    shutil.copytree(tiny_folder, folder)
    edit_json(folder / "config.json", {"max_position_embeddings": TRAINED})
    return folder


@pytest.fixture(scope="session")
def open_short(short_folder: Path) -> OpenTiny:
    def open_(**overrides: Any) -> brain.Brain:
        torch.set_num_threads(1)
        options = {
            "model.path": str(short_folder),
            "capacity": 32,
            "positions": "rebase",
            "cull.target": 20,
            "cull.recent": 4,
            "engine.widths": [1, 4],
            "engine.smallest_bucket": 32,
            "engine.chunk": None,
        }
        return brain.open("folder", **{**options, **overrides})

    return open_


# A toy that repeats itself ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def save_parrot(save_llama: SaveLlama) -> Callable[..., None]:
    """``save_parrot(folder, **config)``: a random Llama whose head knows what follows a token: 0,
    1, 2, 3, 4, 0, … and so on for every five tokens. Its layers disturb that a little.
    """
    from safetensors.torch import load_file, save_file

    def save(folder: Path, **settings: Any) -> None:
        save_llama(folder, std=0.5, hidden_size=48, num_hidden_layers=2, **settings)
        path = folder / "model.safetensors"
        weights = load_file(path)
        token = torch.arange(300)
        following = 5 * (token // 5) + (token + 1) % 5
        embedding = weights["model.embed_tokens.weight"]
        head = torch.zeros_like(embedding).index_copy(0, following, 0.4 * embedding)
        weights |= {"lm_head.weight": head, "model.norm.weight": torch.ones(48)}
        for name, weight in weights.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weights[name] = 0.02 * weight
        save_file(weights, path, {"format": "pt"})

    return save


@pytest.fixture(scope="session")
def parrot_folder(
    tmp_path_factory: pytest.TempPathFactory, save_parrot: Callable[..., None]
) -> Path:
    """Such a Llama."""
    folder = tmp_path_factory.mktemp("parrot")
    save_parrot(folder, max_position_embeddings=1 << 20)
    return folder


@pytest.fixture(scope="session")
def open_parrot(parrot_folder: Path, open_tiny: OpenTiny) -> OpenTiny:
    """As ``open_tiny``, but of that one."""

    def open_(**overrides: Any) -> brain.Brain:
        return open_tiny(**{"model.path": str(parrot_folder), **overrides})

    return open_


@pytest.fixture(scope="session")
def warm_parrot(open_parrot: OpenTiny) -> brain.Brain:
    """It looks up, and every graph is captured; shared by all tests: prime it before use."""
    captured = open_parrot(engine="compiled", **PARROT_OPTIONS)
    for _ in captured.warm_up():
        pass
    return captured


# The command line ---------------------------------------------------------------------------------


@pytest.fixture
def command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> CommandLine:
    """``command_line(*arguments)`` is ``brain`` in this process, where importing torch is done, in
    ``tmp_path`` → its status, standard output and standard error.
    """

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["brain", *arguments])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        status = 0
        try:
            app.main()
        except SystemExit as left:
            status = int(left.code or 0)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def tiny_command_line(command_line: CommandLine, tiny_folder: Path) -> CommandLine:
    """The same on the tiny model."""
    return functools.partial(command_line, "model=folder", f"model.path={tiny_folder}")
