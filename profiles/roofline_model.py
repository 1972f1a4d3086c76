"""A tick on paper: its bytes and operations from the shapes of ``compiled/``, and devices to move
them. ``roofline.py`` makes a page of it.
"""

import math
from dataclasses import dataclass

from brain.measure.golden.seeded import TINYLLAMA
from compiled.llama import LlamaConfig, weight_shapes

MATRICES = ("qkv", "attention_out", "gate_up", "down", "head")

SMOLLM2 = LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, 1e-5, 1e5, 8192, None, True)
LLAMA3_8B = LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 1e-5, 5e5, 8192)
LLAMA3_70B = LlamaConfig(128256, 8192, 28672, 80, 64, 8, 128, 1e-5, 5e5, 8192)
MODELS = {
    "SmolLM2-135M": SMOLLM2,
    "TinyLlama-1.1B": TINYLLAMA,
    "Llama-3-8B": LLAMA3_8B,
    "Llama-3-70B": LLAMA3_70B,
}


@dataclass(frozen=True)
class Format:
    """Bytes of one number of the weights and of the cache."""

    weight: int
    cache: int
    scales: int = 0  # bytes for each row of a matrix


FORMATS = {
    "float32": Format(4, 4),
    "bfloat16": Format(2, 2),
    "int8": Format(1, 2, scales=4),  # weights alone; the cache in bfloat16
}


@dataclass(frozen=True)
class Form:
    """What a tick is made of: how often it passes over scores and logits, and, on a GPU, in how
    many kernels.
    """

    name: str
    kernels_per_layer: int
    kernels_around: int
    score_passes: int
    logit_passes: int
    wide_scores: bool  # float32, whatever the number format of the cache

    def kernels(self, config: LlamaConfig) -> int:
        """Of a tick."""
        return config.num_layers * self.kernels_per_layer + self.kernels_around


TWIN = Form("PyTorch's compiler", 19, 50, score_passes=5, logit_passes=8, wide_scores=True)
"""Kernels as counted in the code generated for an H100. Scores are written, read by the softmax,
written as shares, and read for values and for mass. Logits are written; read for penalty,
selection, two softmaxes and the surprise; and between those, written twice and read once more.
"""
OWN = Form("our kernels", 6, 19, score_passes=2, logit_passes=2, wide_scores=False)
"""``compiled/read_kernels.py`` and ``tick_kernels.py``: 199 kernels for SmolLM2, by
``kernels_on_paper.py``. Scores are written and read as shares of a block, logits written and read.
"""

COLUMN_BYTES = 130
"""Of every slot, for steps 2 to 4 and the mask: its columns are read by the mask (9), by score and
decision (46), written anew (17), and copied into place by the patch (32), which also looks for free
slots (10); a policy that ranks its rows reads and writes some 16 more.
"""


def weight_bytes(config: LlamaConfig, number: Format) -> int:
    """Bytes of weights that one tick reads: all of them, but of the embedding one row."""
    shapes = weight_shapes(config)
    total = config.hidden_size * number.weight
    for name, shape in shapes.items():
        if name in MATRICES:
            total += math.prod(shape) * number.weight + math.prod(shape[:-1]) * number.scales
        elif name.endswith("norm"):
            total += math.prod(shape) * max(2, number.weight)
    return total


def row_bytes(config: LlamaConfig, number: Format) -> int:
    """Bytes of the keys and values of one slot in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * number.cache


def score_bytes(config: LlamaConfig, number: Format, bucket: int, form: Form) -> int:
    """Bytes of scores and shares, one for each head and slot of the bucket."""
    width = 4 if form.wide_scores else number.cache
    return form.score_passes * width * config.num_layers * config.num_heads * bucket


@dataclass(frozen=True)
class Tick:
    """Bytes that one tick moves, and the operations of its read."""

    weights: int
    cache: int
    scores: int
    logits: int
    columns: int
    operations: int

    @property
    def read(self) -> int:
        """Bytes of step 1 without sampling."""
        return self.weights + self.cache + self.scores

    @property
    def moved(self) -> int:
        """Bytes of the whole tick."""
        return self.read + self.logits + self.columns


def tick(
    config: LlamaConfig,
    number: Format,
    capacity: int,
    bucket: int | None = None,
    form: Form = TWIN,
) -> Tick:
    """What one tick moves at a capacity, reading a bucket of it (default: all of it)."""
    bucket = capacity if bucket is None else bucket
    shapes = weight_shapes(config)
    products = sum(math.prod(shapes[name]) for name in MATRICES)
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * bucket
    return Tick(
        weights=weight_bytes(config, number),
        cache=bucket * row_bytes(config, number),
        scores=score_bytes(config, number, bucket, form),
        logits=form.logit_passes * 4 * config.vocab_size,
        columns=COLUMN_BYTES * capacity,
        operations=2 * (products + attention),
    )


@dataclass(frozen=True)
class Device:
    """A GPU on paper. What it does beside moving bytes is taken from one measured point
    (``results/h100.json``): a tick of SmolLM2 in bfloat16 took 1.55 ms at its fastest, 1.41 of them
    in some 620 kernels, 1.32 more than their bytes. It had three graphs then. Now it has two, and
    what the host does for them is hidden behind the tick before.
    """

    name: str
    bandwidth: float  # bytes per second
    memory: float  # bytes
    kernel_seconds: float = 2.1e-6  # of each, whatever it moves
    launches: int = 2
    launch_seconds: float = 50e-6  # of a graph, with what Python does for it

    def overhead(self, config: LlamaConfig, form: Form) -> float:
        """Seconds of a tick in which the device moves nothing."""
        return form.kernels(config) * self.kernel_seconds

    def seconds(self, config: LlamaConfig, told: Tick, form: Form) -> float:
        """Of one tick."""
        device = told.moved / self.bandwidth + self.overhead(config, form)
        return max(device, self.launches * self.launch_seconds)


H100 = Device("H100", 3.0e12, 80e9)
H200 = Device("H200", 4.3e12, 141e9)


PATCH_MS = {1024: 0.063, 8192: 0.103, 65536: 0.440}
DECIDE_MS = {1024: 0.10, 8192: 0.21, 65536: 1.98}
"""Measured on this machine (README.md): the patch alone, and steps 2 to 4 with ``cull=novelty``."""


def per_slot(milliseconds: dict[int, float]) -> float:
    """Nanoseconds for each further slot, between the smallest and the largest capacity."""
    (low, first), (high, last) = min(milliseconds.items()), max(milliseconds.items())
    return (last - first) / (high - low) * 1e6
