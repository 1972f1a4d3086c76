"""From named tensors in files to the packed tensors of ``Weights``, copying only where needed."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from brain.checkpoints.llama_names import EMBEDDING, HEAD, Part, packed_parts
from brain.checkpoints.safetensors_file import DTYPES, TensorFile
from brain.errors import Refused
from compiled.int8 import Int8, Matrix, quantize
from compiled.llama import LlamaConfig, Weights, weight_shapes
from compiled.rope import inverse_frequencies

IGNORED_SUFFIX = "rotary_emb.inv_freq"  # a buffer of old checkpoints, computed here
CACHE_LINE = 64


def load_weights(
    config: LlamaConfig,
    files: Sequence[TensorFile],
    *,
    dtype: torch.dtype,
    device: torch.device,
    int8: bool = False,
) -> Weights:
    """The packed weights: views of the mapped files where possible, else one copy each.

    A packed tensor is a view where its parts lie one after the other in one file, in ``dtype``,
    and ``device`` is the CPU. Otherwise it is allocated once and filled part by part, each part's
    mapped pages being released at once: no second copy of the weights is ever in memory.
    With ``int8`` every matrix is rounded to eight bits, part by part from what the file holds.
    Raises Refused, before allocating, where a tensor is missing, unexpected or misshapen.
    """
    if dtype not in DTYPES.values():
        raise Refused(f"dtype {dtype} is not supported; use float32, bfloat16 or float16")
    owners = _owners(files)
    fields = packed_parts(config)
    _validate(config, fields, owners)
    shapes = weight_shapes(config)
    packed: dict[str, Matrix] = {}
    for field, parts in fields.items():
        stored = [_Stored(owners[name], name) for name, _ in parts]
        if int8 and all(len(shape) == 2 for _, shape in parts):
            packed[field] = _quantized(stored, shapes[field], device)
        else:
            packed[field] = _pack(stored, dtype, device).view(shapes[field])
    packed.setdefault("head", packed["embedding"])
    frequencies = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    return Weights(**packed, inverse_frequencies=frequencies.to(device))  # type: ignore[arg-type]


def checked_owners(config: LlamaConfig, files: Sequence[TensorFile]) -> dict[str, TensorFile]:
    """The file that holds each of the model's tensors. Raises Refused as :func:`load_weights`."""
    owners = _owners(files)
    _validate(config, packed_parts(config), owners)
    return owners


@dataclass(frozen=True)
class _Stored:
    """A tensor as it lies in a file."""

    file: TensorFile
    name: str

    @property
    def start(self) -> int:
        return self.file.entries[self.name].start

    @property
    def end(self) -> int:
        return self.file.entries[self.name].end

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.file.entries[self.name].dtype]


def _pack(parts: list[_Stored], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The parts flattened, one after the other: [elements]."""
    first = parts[0]
    count = sum((part.end - part.start) // part.dtype.itemsize for part in parts)
    in_place = (
        device.type == "cpu"
        and first.start % CACHE_LINE == 0  # kernels load whole cache lines
        and all(part.dtype == dtype and part.file is first.file for part in parts)
        and all(a.end == b.start for a, b in pairwise(parts))
    )
    if in_place:
        return first.file.view(first.start, (count,), dtype)
    packed = torch.empty(count, dtype=dtype, device=device)
    offset = 0
    for part in parts:
        source = part.file.tensor(part.name).view(-1)
        packed[offset : offset + len(source)].copy_(source)
        offset += len(source)
        part.file.release(part.name)
    return packed


def _quantized(parts: list[_Stored], shape: tuple[int, ...], device: torch.device) -> Int8:
    """The parts in eight bits, their rows one after the other, as a matrix of this shape."""
    values = torch.empty(shape, dtype=torch.int8, device=device)
    scale = torch.empty(shape[:-1], dtype=torch.float32, device=device)
    offset = 0
    for part in parts:
        rows = quantize(part.file.tensor(part.name))
        after = offset + len(rows.scale)
        values.view(-1, shape[-1])[offset:after].copy_(rows.values)
        scale.view(-1)[offset:after].copy_(rows.scale)
        offset = after
        part.file.release(part.name)
    return Int8(values, scale)


def _owners(files: Sequence[TensorFile]) -> dict[str, TensorFile]:
    """The file that holds each tensor."""
    owners: dict[str, TensorFile] = {}
    for file in files:
        for name in file.entries:
            if name in owners:
                raise Refused(f"{file.path}: tensor {name} is also in {owners[name].path.name}")
            owners[name] = file
    return owners


def _validate(
    config: LlamaConfig, fields: dict[str, list[Part]], owners: dict[str, TensorFile]
) -> None:
    """Refuses weights whose names, shapes or dtypes are not exactly the model's."""
    expected = {name: shape for parts in fields.values() for name, shape in parts}
    if config.tie_word_embeddings:
        # Some checkpoints store the tied head a second time.
        expected[HEAD] = (config.vocab_size, config.hidden_size)
    for name, file in owners.items():
        if name not in expected:
            if name.endswith(IGNORED_SUFFIX):
                continue
            reason = "biases are not supported" if name.endswith(".bias") else "it is not Llama's"
            raise Refused(f"{file.path}: unexpected tensor {name}: {reason}")
        entry = file.entries[name]
        if entry.shape != expected[name]:
            raise Refused(
                f"{file.path}: tensor {name} has shape {list(entry.shape)}, "
                f"config.json implies {list(expected[name])}"
            )
        if entry.dtype not in DTYPES:
            raise Refused(
                f"{file.path}: tensor {name} has dtype {entry.dtype}; use {', '.join(DTYPES)}"
            )
    for name in expected:
        if name not in owners and not (name == HEAD and config.tie_word_embeddings):
            found = sorted({str(file.path) for file in owners.values()})
            where = found[0] + (f" and {len(found) - 1} more shards" if len(found) > 1 else "")
            hint = " (or set tie_word_embeddings)" if name == HEAD and EMBEDDING in owners else ""
            raise Refused(
                f"{where}: tensor {name} is missing, config.json implies "
                f"{list(expected[name])}{hint}"
            )
