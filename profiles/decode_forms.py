"""In which form a tick is fastest on this device: ``python profiles/decode_forms.py smollm2``.

The products and the attention of one token can be library calls or streaming loops, and the
compiler has options of its own. Each form is captured in a process of its own, for a brain of
seeded random weights, and timed by whole ticks. Prints a line for each and one JSON line.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import torch
from seeded_folder import SHAPES

import compiled.attention
import compiled.int8
import compiled.linear
from brain.brain import Brain
from brain.checkpoints import Checkpoint
from brain.config.compose import compose_conf
from brain.config.settings import settings_of
from brain.measure.golden.seeded import SeededModel
from compiled.read import read

Options = Mapping[str, Any]


class Form(NamedTuple):
    """How a tick is compiled."""

    products: bool = False  # as streaming loops
    attention: bool = False  # as one
    options: Options = MappingProxyType({})  # of Inductor
    kernels: bool = False  # our own in place of its own


FORMS = {
    "as it is": Form(),
    "kernels of our own": Form(kernels=True),
    "streaming products": Form(products=True),
    "streaming attention": Form(attention=True),
    "both streaming": Form(products=True, attention=True),
    "small kernels joined": Form(options={"combo_kernels": True}),
    "both streaming, joined": Form(True, True, {"combo_kernels": True}),
    "both streaming, tuned": Form(True, True, {"coordinate_descent_tuning": True}),
}
"""Tuned kernels may sum in another order after every tuning: to be known, not to be used."""
UNTIMED, TICKS = 10, 200


def checkpoint_of(shape: str, dtype: torch.dtype, device: torch.device, int8: bool) -> Checkpoint:
    """Seeded random weights, in eight bits if wanted."""
    found = SeededModel(shape, SHAPES[shape], seed=7).checkpoint(dtype, device)
    if not int8:
        return found
    rounded: Options = {
        name: compiled.int8.quantize(getattr(found.weights, name))
        for name in ("embedding", "qkv", "attention_out", "gate_up", "down", "head")
    }
    return Checkpoint(
        found.name,
        found.config,
        found.weights._replace(**rounded),
        found.tokenizer,
        found.hash_weights,
    )


def ticks_per_second(form: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Of a brain captured in this form."""
    products, attention, options, kernels = FORMS[form]
    device = torch.device(asked.device)
    capacity = max(asked.rows + UNTIMED + TICKS, 1024)
    overrides = [f"capacity={capacity}", f"engine.smallest_bucket={capacity}", "engine=compiled"]
    overrides.append("engine.native=false")  # forms are of what the compiler is given
    overrides.append(f"engine.kernels={str(kernels).lower()}")
    precision = "bfloat16" if asked.precision == "int8" else asked.precision
    conf = compose_conf([*overrides, f"device={asked.device}", f"dtype={precision}"])
    settings = settings_of(conf)
    found = checkpoint_of(asked.shape, settings.dtype, device, asked.precision == "int8")
    brain = Brain(found, settings)

    def streams(x: torch.Tensor, num_tokens: int) -> bool:
        return num_tokens == 1 and torch.compiler.is_compiling()

    def never(x: torch.Tensor, num_tokens: int) -> bool:
        return False

    started = time.perf_counter()
    with (
        mock.patch.object(compiled.linear, "streams_rows", streams if products else never),
        mock.patch.object(compiled.attention, "streams_rows", streams if attention else never),
        torch._inductor.config.patch(dict(options)),
    ):
        for _ in brain.warm_up(edits=False):
            pass
        captured = time.perf_counter() - started
        brain.prime([token % 97 for token in range(asked.rows)])
        for _ in range(UNTIMED):
            _ = brain.tick().token
        seconds = []
        for _ in range(TICKS):
            start = time.perf_counter()
            _ = brain.tick().token
            seconds.append(time.perf_counter() - start)
    return {
        "ticks_per_second": 1 / statistics.median(seconds),
        "capture_seconds": captured,
        "off": _off(brain),
    }


def _off(brain: Brain) -> float:
    """How far its logits are from those of the functions called directly, at most."""
    ours = brain.read().logits
    memory, cursor = brain.memory, brain.cursor
    weights, rows = brain.checkpoint.weights, memory.account.high_water
    asked = (cursor.token, cursor.position, memory.one)
    plain = read(brain.checkpoint.config, weights, brain.state, *asked, bucket=rows)
    return float((ours - plain.logits).abs().max())


def main() -> None:
    """Times every form, or, asked for one, prints its numbers."""
    parser = argparse.ArgumentParser(description="the forms in which a tick can be compiled")
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--precision", choices=["float32", "bfloat16", "int8"], default="bfloat16")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=90, help="the most that a form may take")
    parser.add_argument("--form", choices=list(FORMS))
    asked = parser.parse_args()
    if asked.form is not None:
        print(json.dumps(ticks_per_second(asked.form, asked)))
        return
    report: dict[str, Any] = {"shape": asked.shape, "precision": asked.precision, "forms": {}}
    print(f"{asked.shape}, {asked.precision}, {asked.rows} rows, torch {torch.__version__}")
    for form in FORMS:
        command = [sys.executable, __file__, *sys.argv[1:], "--form", form]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=asked.seconds, check=True
            )
            told = json.loads(done.stdout.strip().splitlines()[-1])
            report["forms"][form] = told
            rate, captured = told["ticks_per_second"], told["capture_seconds"]
            print(
                f"{form:<24} {rate:>8.1f} ticks/s, captured in {captured:.0f} s, "
                f"logits off by {told['off']:.3g}",
                flush=True,
            )
        except subprocess.SubprocessError as error:
            said = str(getattr(error, "stderr", None) or error).strip().splitlines()[-1:]
            print(f"{form:<24} failed: {' '.join(said)[:200]}", flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
