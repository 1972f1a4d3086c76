"""What a GGUF file says when its blocks are multiplied, beside the same file made float32.

    python profiles/blocks_quality.py FILE.gguf [--text FILE] [--tokens 1024] [--all]

Every model reads the same text, 512 tokens at a time, each time in an empty memory, and is told
what comes next. The reference is the file dequantized to float32, in PyTorch (``engine=eager``).
Beside it: its blocks by the native engine, one token after another and 32 at a time; llama.cpp,
where it is installed, on the same file with its cache in float32; with ``--all`` the reference
rounded to eight and to four bits (``weights=int8``, ``weights=int4``), for scale. Activations of
ours are float32.

Prints a table and writes profiles/results/blocks-quality-FILE.json, or ``--out``: the KL divergence
of each from the reference, mean and largest, in nats per token; perplexity; how often both have the
same likeliest token; and the largest difference of a logit.
"""

import argparse
import importlib.util
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import brain
from brain import Append, Brain, Refused
from brain.checkpoints.gguf_file import gguf_format
from brain.machine.environment import environment
from compiled.blocks import KINDS

ROOT = Path(__file__).parents[1]
WINDOW = 512
"""Tokens in a memory, but for a token that begins a text."""
AT_ONCE = 32
"""Tokens of a read of several."""
ROWS_AT_ONCE = 64
"""Rows of logits that are compared at a time, in float64."""


@dataclass(frozen=True)
class Subject:
    """A model of ours, and how it reads."""

    name: str
    width: int  # tokens of a read
    engine: str = "native"
    weights: str = "model"


REFERENCE = Subject("dequantized", AT_ONCE, engine="eager")
BLOCKS = (
    Subject("blocks, token by token", 1),
    Subject(f"blocks, {AT_ONCE} at a time", AT_ONCE),
)
ROUNDED = tuple(
    Subject(f"weights={weights}", AT_ONCE, weights=weights) for weights in ("int8", "int4")
)
LLAMA_CPP = "llama.cpp"


class Tally:
    """What has been compared so far."""

    def __init__(self) -> None:
        self.divergences: list[float] = []  # of every row, nats
        self.nats: list[float] = []  # of every token but the first of each window
        self.alike = 0
        self.largest = 0.0

    def add(self, told: Tensor, reference: Tensor, ids: Sequence[int]) -> None:
        """Counts a window.

        Args:
            told: [T, vocab] float32, logits.
            reference: [T, vocab] float32, those of the reference.
            ids: The T tokens that were read.
        """
        following = torch.tensor(ids[1:])
        for first in range(0, len(ids), ROWS_AT_ONCE):
            some = slice(first, first + ROWS_AT_ONCE)
            ours, theirs = told[some].double(), reference[some].double()
            self.largest = max(self.largest, float((ours - theirs).abs().max()))
            self.alike += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
            self.divergences += (theirs.exp() * (theirs - ours)).sum(-1).tolist()
            wanted = following[some]
            self.nats += (-ours[torch.arange(len(wanted)), wanted]).tolist()

    def report(self) -> dict[str, float]:
        """Means and extremes."""
        rows = len(self.divergences)
        return {
            "kl_mean": math.fsum(self.divergences) / rows,
            "kl_largest": max(self.divergences),
            "perplexity": math.exp(math.fsum(self.nats) / len(self.nats)),
            "same_likeliest": self.alike / rows,
            "logit_largest": self.largest,
        }


def opened(path: Path, subject: Subject) -> Brain:
    """A brain that forgets nothing of a window."""
    return brain.open(
        path,
        engine=subject.engine,
        weights=subject.weights,
        device="cpu",
        dtype="float32",
        cull="none",
        capacity=WINDOW + 1,
    )


def windows_of(b: Brain, text: str, most: int) -> list[list[int]]:
    """The first tokens of a text, in windows, each begun as the model wants a text to begin."""
    ids = b.encode(text)[:most]
    parts = [ids[first : first + WINDOW] for first in range(0, len(ids), WINDOW)]
    windows = [b.tokenizer.with_bos(part) for part in parts]
    return [window for window in windows if len(window) > 1]


def read_by_ours(b: Brain, window: Sequence[int], width: int) -> Tensor:
    """Logits [T, vocab] of a text that is read ``width`` tokens at a time."""
    logits = []
    for first in range(0, len(window), width):
        part = window[first : first + width]
        if first == 0:
            b.prime(part)
            logits.append(b.read(part, range(len(part))).logits)  # own rows hide themselves
        else:
            logits.append(b.read(part).logits)
            b.patch([Append(part)])
    return torch.cat(logits).float()


def read_by_llama_cpp(path: Path, windows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """Logits [T, vocab] of every window."""
    library: Any = importlib.import_module("llama_cpp")
    float32, threads = 0, torch.get_num_threads()
    llama = library.Llama(
        str(path),
        n_ctx=WINDOW + 1,
        n_threads=threads,
        n_threads_batch=threads,
        type_k=float32,
        type_v=float32,
        logits_all=True,
        verbose=False,
    )
    for window in windows:
        llama.reset()
        llama.eval(window)
        yield torch.tensor(llama.scores[: len(window)])


def compared(path: Path, text: str, most: int, *, rounds: bool) -> dict[str, Any]:
    """Every subject beside the reference, by name, and the count of tokens. One model at a time is
    in memory, and the logits of the reference.

    Args:
        path: The GGUF file.
        text: What is read.
        most: Tokens of it.
        rounds: Whether to round the reference, too.
    Raises:
        Refused: The file is not in blocks, or cannot be opened; or the text is too short.
    """
    if KINDS.get(stored := gguf_format(path), KINDS["F32"]).weights == 1:
        raise Refused(f"{path} is in {stored}, which is not multiplied in blocks")
    b = opened(path, REFERENCE)
    windows = windows_of(b, text, most)
    if not windows:
        raise Refused("the text is too short: give one of at least 2 tokens")
    reference = [read_by_ours(b, window, REFERENCE.width) for window in windows]
    found = {REFERENCE.name: told_by(reference, reference, windows)}
    for subject in (*BLOCKS, *(ROUNDED if rounds else ())):
        del b  # before the next one is opened
        b = opened(path, subject)
        logits = (read_by_ours(b, window, subject.width) for window in windows)
        found[subject.name] = told_by(logits, reference, windows)
    if importlib.util.find_spec("llama_cpp") is not None:
        found[LLAMA_CPP] = told_by(read_by_llama_cpp(path, windows), reference, windows)
    tokens = sum(map(len, windows))
    return {"format": stored, "tokens": tokens, "window": WINDOW, "subjects": found}


def told_by(
    logits: Iterator[Tensor] | Sequence[Tensor],
    reference: Sequence[Tensor],
    windows: Sequence[Sequence[int]],
) -> dict[str, float]:
    """What one subject says, beside the reference."""
    tally = Tally()
    for rows, theirs, window in zip(logits, reference, windows, strict=True):
        tally.add(rows, theirs, window)
    return tally.report()


def table(found: dict[str, dict[str, float]]) -> str:
    """A line for every subject."""
    lines = [
        f"{'':<26} {'KL, mean':>10} {'largest':>10} {'perplexity':>11} {'same token':>10} "
        f"{'|logit|':>9}"
    ]
    for name, row in found.items():
        lines.append(
            f"{name:<26} {row['kl_mean']:>10.2e} {row['kl_largest']:>10.2e} "
            f"{row['perplexity']:>11.4f} {row['same_likeliest']:>10.2%} "
            f"{row['logit_largest']:>9.2e}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compares what the command line names."""
    parser = argparse.ArgumentParser(description="a GGUF file's blocks beside their float32")
    parser.add_argument("file", type=Path)
    parser.add_argument("--text", type=Path, default=ROOT / "tests" / "golden" / "passage.txt")
    parser.add_argument("--tokens", type=int, default=2 * WINDOW)
    parser.add_argument("--all", action="store_true", help="eight and four bits, for scale")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    try:
        text = asked.text.read_text("utf-8")
        report = compared(asked.file, text, asked.tokens, rounds=asked.all)
    except (Refused, OSError) as refusal:
        raise SystemExit(f"refused: {refusal}") from None
    out = asked.out or ROOT / "profiles" / "results" / f"blocks-quality-{asked.file.stem}.json"
    told = {"file": asked.file.name, "text": asked.text.name, **report, **environment("cpu")}
    out.write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    print(f"{asked.file.name}, mostly {report['format']}, {report['tokens']} tokens")
    print(table(report["subjects"]))


if __name__ == "__main__":
    main()
