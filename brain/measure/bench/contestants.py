"""Who is timed: an engine at a precision."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from brain.auto import plainest
from brain.config.compose import compose_conf
from brain.config.settings import settings_of
from brain.errors import Refused
from compiled.llama import LlamaConfig

DEFAULT = "default"
"""``brain`` with nothing said of engine or precision, as a command: see ``command.py``."""

NATIVE, COMPILED, EAGER = "native", "compiled", "eager"
LLAMA_CPP = "llama-cpp"
LLAMA_CPP_COMMAND = "llama-cpp, a Python process"
"""What is timed beside the default command, in place of ``llama-cli``."""

DYNAMIC, STATIC = "transformers-dynamic", "transformers-static-compiled"
OURS = (NATIVE, COMPILED, EAGER)
"""Choices of ``engine=``."""

PEERS = {LLAMA_CPP: "llama_cpp", DYNAMIC: "transformers", STATIC: "transformers"}
"""Engines that are not ours, and the package that each needs."""

ENGINES = (*OURS, *PEERS)
"""Each is timed at every precision that is asked for."""

MEMORY = "memory"
"""Not an engine: reads as many bytes as a token needs and does nothing with them."""

GREEDY = "sampler=greedy"

ENGINE_KEYS = ("engine", "engine.captured", "engine.native")
"""Keys that say which engine runs."""

INT8, INT4 = "int8", "int4"


@dataclass(frozen=True)
class Precision:
    """Number formats of weights, and of activations and cache."""

    overrides: tuple[str, ...]  # that our engines take
    dtype: str  # of activations and cache
    weight_bytes: float  # of one number in a matrix
    gguf: str  # the nearest format of a GGUF file
    scale_bytes: int = 0  # beside the numbers of each row of a matrix
    file: Path | None = None  # the GGUF file that is timed as it lies


PRECISIONS = {
    "float32": Precision(("dtype=float32",), "float32", 4, "F32"),
    "bfloat16": Precision(("dtype=bfloat16",), "bfloat16", 2, "BF16"),
    "float16": Precision(("dtype=float16",), "float16", 2, "F16"),
    INT8: Precision(("dtype=bfloat16", "weights=int8"), "bfloat16", 1, "Q8_0", 4),
    INT4: Precision(("dtype=float32", "weights=int4"), "float32", 0.625, "Q4_1"),
}
"""Those of a model's folder. A GGUF file has one of its own, named after its format."""


@dataclass(frozen=True)
class Contestant:
    """An engine, or the reading of memory, at a precision."""

    engine: str
    precision: str

    @property
    def label(self) -> str:
        """What it is called in front of people."""
        return f"{self.engine} {self.precision}"

    @property
    def is_ours(self) -> bool:
        """Whether it is an engine of this program."""
        return self.engine in OURS

    def overrides(self, asked: Sequence[str], formats: Precision) -> list[str]:
        """The configuration of our engines: what was asked for, with this engine in these number
        formats. Without a sampler they take the likeliest token, as the others do.
        """
        sampled = any(key_of(override).partition(".")[0] == "sampler" for override in asked)
        return [
            *without_engine(asked),
            *([] if sampled else [GREEDY]),
            f"engine={self.engine}",
            *formats.overrides,
        ]


def key_of(override: str) -> str:
    """The key of an override on the command line."""
    return override.partition("=")[0].lstrip("+~")


def without_engine(asked: Sequence[str]) -> list[str]:
    """The overrides without those that choose an engine or a precision."""
    chosen = (*ENGINE_KEYS, "dtype", "weights")
    return [override for override in asked if key_of(override) not in chosen]


def contestants(engines: Sequence[str], precisions: Sequence[str]) -> list[Contestant]:
    """Every engine at every precision that it has: transformers has no int8 or int4, and the
    default command chooses for itself.
    """
    return [
        Contestant(engine, precision)
        for precision in precisions
        for engine in engines
        if engine in ENGINES
        and not (precision in (INT8, INT4) and PEERS.get(engine) == "transformers")
    ]


def why_missing(contestant: Contestant, asked: Sequence[str], formats: Precision) -> str | None:
    """Why it cannot be timed here in these number formats, in one line; None where it can."""
    package = PEERS.get(contestant.engine)
    if package == "transformers" and formats.file is not None:
        return f"it cannot multiply {formats.file} as it lies: give the folder of the model"
    if package is not None and importlib.util.find_spec(package) is None:
        return f"{package} is not installed: pip install 'positronic-brain[peers]'"
    if contestant.is_ours:
        try:
            settings_of(plainest(compose_conf(contestant.overrides(asked, formats))))
        except Refused as refusal:
            return str(refusal)
    return None


def weight_bytes(config: LlamaConfig, formats: Precision) -> int:
    """Bytes of weights that a token needs: everything but an embedding that is not the head.

    Norms and biases count as numbers of the activations' format. Of a GGUF file see
    ``token_bytes``.
    """
    c = config
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    matrices = [  # outputs, inputs, how many
        (queries + 2 * keys, c.hidden_size, c.num_layers),
        (c.hidden_size, queries, c.num_layers),
        (2 * c.intermediate_size, c.hidden_size, c.num_layers),
        (c.hidden_size, c.intermediate_size, c.num_layers),
        (c.vocab_size, c.hidden_size, 1),
    ]
    each, scale = formats.weight_bytes, formats.scale_bytes
    in_matrices = sum(count * rows * (columns * each + scale) for rows, columns, count in matrices)
    vectors = (2 * c.num_layers + 1) * c.hidden_size
    vectors += c.num_layers * ((queries + 2 * keys) * c.qkv_bias + 2 * c.head_dim * c.qk_norm)
    return round(in_matrices) + vectors * _activation_bytes(formats)


def row_bytes(config: LlamaConfig, formats: Precision) -> int:
    """Bytes of the cache that a token needs for each remembered row."""
    numbers = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return numbers * _activation_bytes(formats)


def _activation_bytes(formats: Precision) -> int:
    return 4 if formats.dtype == "float32" else 2
