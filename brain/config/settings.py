"""The configuration of one brain: checked once, and in the terms of ``compiled/``.

Every rule that a value must keep is stated here or, where it follows from what the value does, in
the dataclass of ``compiled/`` that takes it.
"""

import dataclasses
import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from brain.checkpoints import has_blocks
from brain.errors import Refused, did_you_mean, shown, unknown
from brain.files import given_path
from brain.machine.compiler import require_capture
from brain.machine.memory import free_bytes
from brain.mirror import SOURCES
from brain.policies import CustomPolicy, policy
from compiled.blocks import Blocks
from compiled.choose import Eviction
from compiled.chunk import MOST_IN_CHUNK
from compiled.graphs import GraphSpec
from compiled.int8 import Int8
from compiled.llama import LlamaConfig
from compiled.lookup import Lookup
from compiled.read_cpu import Formats, formats
from compiled.sample import SamplingMethod
from compiled.score import MOST_CULLED, Brightness, Culling, Novelty
from compiled.state import state_bytes
from conf.schema import (
    Conf,
    CullConf,
    DType,
    EngineConf,
    LookupConf,
    Positions,
    SamplerConf,
    WeightFormat,
)

MOST_ROWS = 1 << 62
FEWEST_ROWS_TO_CULL = 8  # below this target, sinks, recent rows and victims do not all fit
SMALLEST, LARGEST = 1e-15, 1e15
"""Of numbers by which logits are divided, one after the other, and of brightness seeds: float32
holds what comes of them."""


@dataclass(frozen=True)
class Settings:
    """Everything about a brain but its model: the configuration, found possible, and what follows
    from it in the terms of ``compiled/``.
    """

    conf: Conf
    device: torch.device
    dtype: torch.dtype
    cache: Path | None  # folder for what is built once; None: the user's
    graphs: GraphSpec

    @property
    def culling(self) -> Culling:
        """How many rows are forgotten, and which never are."""
        return self.graphs.eviction.culling

    @property
    def policy_sha256(self) -> str | None:
        """The hash of the source of a custom policy; None for any other."""
        keep_score = self.graphs.eviction.keep_score
        return keep_score.sha256 if isinstance(keep_score, CustomPolicy) else None

    @property
    def native(self) -> bool:
        """Whether reads and draws use the CPU's operators, where there are any for the model."""
        return bool(self.conf.engine.native)

    def check_against(self, config: LlamaConfig) -> None:
        """Raises Refused if a memory of this capacity cannot be had on the device."""
        capacity = self.conf.capacity
        if self.graphs.rebases and capacity > roomy(config):
            raise Refused(
                f"positions=rebase needs capacity={roomy(config)} or less, three quarters of the "
                f"{config.max_position_embeddings} positions the model was trained on, not "
                f"{capacity}"
            )
        needed = state_bytes(config, capacity, self.dtype)
        free = free_bytes(self.device)
        if free is not None and needed > free:
            raise Refused(
                f"capacity={capacity} needs {needed / 1e9:.1f} GB of memory but "
                f"{free / 1e9:.1f} GB are free on {self.device}"
            )


def engine_name(engine: EngineConf) -> str:
    """The choice of the group ``engine`` that runs as this one does."""
    return "compiled" if engine.captured else "native" if engine.native else "eager"


def known_formats(conf: Conf, dtype: torch.dtype, device: torch.device) -> Formats | None:
    """What the CPU's operators are built for; None where they do not know the number format or the
    device.
    """
    if conf.weights is WeightFormat.int8:
        return formats(dtype, device, Int8)
    return formats(dtype, device, Blocks if keeps_blocks(conf, device) else torch.Tensor)


def keeps_blocks(conf: Conf, device: torch.device) -> bool:
    """Whether matrices are kept in blocks: where they are, or are rounded to four bits, and the
    operator for the CPU can multiply them.
    """
    plain = DType.float32 if conf.dtype is DType.auto else conf.dtype
    if conf.engine.native is False or not formats(getattr(torch, plain.value), device, Blocks):
        return False
    if conf.weights is WeightFormat.model:
        return has_blocks(conf.model, conf.cache_dir)
    return conf.weights is WeightFormat.int4


def settings_of(conf: Conf, given: CustomPolicy | None = None) -> Settings:
    """Checks a configuration in which nothing is left to choose (``brain/auto.py``). Raises
    Refused, naming the key. ``given`` is the policy that ``cull.policy`` names, where it need not
    be imported.
    """
    assert None not in (conf.engine.captured, conf.engine.native)
    assert conf.dtype is not DType.auto
    if not 1 <= conf.capacity <= MOST_ROWS:
        raise Refused(f"capacity must be at least 1 and at most {MOST_ROWS}, not {conf.capacity}")
    if not -(2**63) <= conf.seed < 2**64:
        raise Refused(f"seed must fit in 64 bits, not {conf.seed}")
    _check_sampler(conf.sampler)
    _check_repair(conf)
    device = device_of(conf.device)
    if conf.engine.captured:
        require_capture()
    dtype: torch.dtype = getattr(torch, conf.dtype.value)
    if engine_name(conf.engine) == "native" and not formats(dtype, device, torch.Tensor):
        raise Refused(
            f"engine=native has no operators for dtype={conf.dtype.value} on {device}: use "
            "engine=auto, or leave it out"
        )
    if conf.engine.captured and device.type == "cpu":
        _check_linkable(Path(torch.__file__).parent)
    if conf.engine.kernels:
        _require_kernels(device)
    lookup = _lookup(conf.lookup, conf.capacity)
    eviction = eviction_of(conf.cull, conf.capacity, given)
    with _naming("engine"):
        graphs = GraphSpec(
            compiled=bool(conf.engine.captured),
            method=SamplingMethod(
                conf.sampler.greedy, conf.sampler.top_k, nucleus=conf.sampler.top_p < 1.0
            ),
            eviction=eviction,
            widths=tuple(conf.engine.widths),
            smallest_bucket=conf.engine.smallest_bucket,
            chunk=conf.engine.chunk,
            rebases=conf.positions is Positions.rebase,
            lookup=lookup,
        )
    return Settings(
        conf=conf,
        device=device,
        dtype=dtype,
        cache=None if conf.cache_dir is None else given_path(conf.cache_dir),
        graphs=graphs,
    )


@contextmanager
def _naming(group: str) -> Iterator[None]:
    """Refuses, by its key in the configuration, a value that ``compiled/`` finds wrong."""
    try:
        yield
    except ValueError as error:
        raise Refused(f"{group}.{error}") from None


def device_of(name: str) -> torch.device:
    """The device of a name; ``auto`` is CUDA where there is one. Raises Refused."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        hint = did_you_mean(name, ("auto", "cpu", "cuda"))
        raise Refused(f"device={name} is unknown: use auto, cpu, cuda or cuda:N{hint}") from None
    if device.type not in ("cpu", "cuda"):
        raise Refused(f"device={name} is not supported: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Refused(f"device={name} is not there: PyTorch sees {torch.cuda.device_count()} GPUs")
    return device


def _require_kernels(device: torch.device) -> None:
    """Refuses kernels where they cannot run."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # for tests
    if (device.type == "cuda") == interpreted:
        wanted = "device=cpu where TRITON_INTERPRET=1 is set" if interpreted else "a GPU"
        raise Refused(f"engine.kernels=true needs {wanted}, not {device}: leave it out")
    if importlib.util.find_spec("triton") is None:
        raise Refused(
            "engine.kernels=true needs Triton, which PyTorch for CUDA brings along: install it "
            "(pip install triton), or leave it out"
        )


def _check_linkable(libraries: Path) -> None:
    """Refuses a path of PyTorch that its C++ compiler cannot be given, because it is not quoted."""
    if any(character.isspace() or character in "'\"" for character in str(libraries)):
        raise Refused(
            f"engine=compiled cannot use a PyTorch whose path has a space or quote ({libraries}): "
            "install it under another path, or use engine=eager"
        )


def _check_sampler(sampler: SamplerConf) -> None:
    def refuse(key: str, rule: str) -> None:
        raise Refused(f"sampler.{key} must be {rule}, not {getattr(sampler, key)}")

    divisors = f"{SMALLEST:g} to {LARGEST:g}"
    if not SMALLEST <= sampler.temperature <= LARGEST:
        refuse("temperature", f"{divisors} (for the likeliest token use sampler=greedy)")
    if sampler.top_k < 0:
        refuse("top_k", "0 (off) or more")
    if not 0 < sampler.top_p <= 1:
        refuse("top_p", "above 0 and at most 1 (off)")
    if not 0 <= sampler.min_p <= 1:
        refuse("min_p", "between 0 (off) and 1")
    if not SMALLEST <= sampler.repetition_penalty <= LARGEST:
        refuse("repetition_penalty", f"{divisors} (1 is off)")


def roomy(config: LlamaConfig) -> int:
    """The largest capacity in which rows may be renumbered. Nearer to the range that the model was
    trained on, keys would be turned, and rounded, every few ticks.
    """
    return config.max_position_embeddings * 3 // 4


def eviction_of(cull: CullConf, capacity: int, given: CustomPolicy | None = None) -> Eviction:
    """What decides which rows stay in a memory of this capacity. Raises Refused, naming the key."""
    brightness = cull.brightness
    if others := set(brightness.seeds) - set(SOURCES):
        raise unknown("cull.brightness.seeds", min(others), SOURCES)
    for name, value in (("gain", brightness.gain), ("maximum", brightness.maximum)):
        if not value >= 0:
            raise Refused(f"cull.brightness.{name} must be 0 or more, not {value}")
    if not 0 <= brightness.decay <= 1:
        raise Refused(f"cull.brightness.decay must be between 0 and 1, not {brightness.decay}")
    for name, seed in brightness.seeds.items():
        if not isinstance(seed, int | float) or not abs(seed) <= LARGEST:
            raise Refused(
                f"cull.brightness.seeds: {name} is {shown(seed)}, not a number of at most "
                f"{LARGEST:g}"
            )
    if not 0 <= cull.novelty.decay < 1:
        raise Refused(f"cull.novelty.decay must be in 0 to below 1, not {cull.novelty.decay}")
    if not 0 <= cull.novelty.share <= 1:
        raise Refused(f"cull.novelty.share must be between 0 and 1, not {cull.novelty.share}")
    lifetime = cull.novelty.lifetime
    if lifetime is not None and not lifetime > 0:
        raise Refused(f"cull.novelty.lifetime must be above 0, or null, not {lifetime}")
    culling = _culling(cull, capacity)
    return Eviction(
        brightness=Brightness(
            brightness.decay,
            brightness.gain,
            brightness.maximum,
            tuple(float(brightness.seeds.get(source, 0.0)) for source in SOURCES),
        ),
        novelty=Novelty(cull.novelty.decay),
        culling=culling,
        keep_score=given or policy(cull.policy, culling, cull.novelty.share, lifetime),
    )


def _check_repair(conf: Conf) -> None:
    repair = conf.repair
    if repair.every < 0:
        raise Refused(f"repair.every must be 0 (never) or more, not {repair.every}")
    if repair.candidates < 1:
        raise Refused(f"repair.candidates must be at least 1, not {repair.candidates}")
    if math.isnan(repair.least_gain):
        raise Refused("repair.least_gain must be a number of nats, not nan")
    if repair.every and conf.cull.policy == "tova":
        raise Refused("repair=pairs needs keep-scores between two ticks, which cull=tova lacks")


def _lookup(lookup: LookupConf, capacity: int) -> Lookup | None:
    given = dataclasses.asdict(lookup)
    with _naming("lookup"):  # the other numbers are checked even where the width turns it off
        asked = Lookup(**given | ({} if lookup.width else {"width": 1}))
    if lookup.width == 0:
        return None
    if lookup.width >= capacity:
        raise Refused(
            f"lookup.width={lookup.width} needs capacity={lookup.width + 1} or more, not {capacity}"
        )
    return asked


def _culling(cull: CullConf, capacity: int) -> Culling:
    """Constants of culling. In a small memory the protected ranges shrink with it, so that there
    is always something to forget.
    """
    if not 1 <= cull.chunk <= MOST_IN_CHUNK:
        raise Refused(
            f"cull.chunk must be 1 (one token after another) to {MOST_IN_CHUNK}, not {cull.chunk}"
        )
    if cull.policy == "none":
        return Culling(target=0)
    target = capacity if cull.target is None else cull.target
    if target > capacity:
        raise Refused(f"cull.target={target} is more than capacity={capacity}")
    if target < FEWEST_ROWS_TO_CULL:
        raise Refused(
            f"cull.target={target} is too few rows to choose from: use "
            f"{FEWEST_ROWS_TO_CULL} or more, or cull=none"
        )
    if cull.sinks < 0:
        raise Refused(f"cull.sinks must be 0 or more, not {cull.sinks}")
    if cull.recent < 1:
        raise Refused(f"cull.recent must be at least 1 (the row being read), not {cull.recent}")
    if not 0 <= cull.recent_share <= 0.5:
        raise Refused(f"cull.recent_share must be between 0 and 0.5, not {cull.recent_share}")
    sinks = min(cull.sinks, target // 4)
    recent = min(max(cull.recent, int(cull.recent_share * target)), target // 2)
    assert sinks + recent + MOST_CULLED <= target
    return Culling(target, sinks, recent, cull.at_once)
