"""What a tick must move and compute, and how fast that lets it be: on paper.

    python profiles/roofline.py --bandwidth 30            # GB/s of this machine's memory
    python profiles/roofline.py --measure                 # … as a loop that reads finds it now

Writes ``profiles/roofline.md`` and ``profiles/roofline.png``. Tokens per second are the bytes of a
tick (``roofline_model.py``) through the memory of a device. Where this machine was measured
(``results/bench.json``) the error is stated; what is said of other machines is prediction.
"""

# ruff: noqa: E501  (lines of the page are as long as what is filled in makes them)

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from roofline_model import (
    COLUMN_BYTES,
    DECIDE_MS,
    FORMATS,
    H100,
    H200,
    LLAMA3_8B,
    LLAMA3_70B,
    MODELS,
    OWN,
    PATCH_MS,
    SMOLLM2,
    TWIN,
    per_slot,
    row_bytes,
    score_bytes,
    tick,
)

from brain.measure.golden.seeded import TINYLLAMA

HERE = Path(__file__).resolve().parent
REPORT = HERE / "results" / "bench.json"


def measured_bandwidth(megabytes: int = 512, rounds: int = 60) -> float:
    """Bytes per second of the fastest of some passes over more memory than any cache holds."""
    numbers = torch.ones(megabytes * (1 << 20) // 4)
    fastest = math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        numbers.sum()
        fastest = min(fastest, time.perf_counter() - start)
    return numbers.nbytes / fastest


def measurements(report: Path) -> list[dict[str, Any]]:
    """Of a report of ``task=bench`` with SmolLM2: seconds of a captured tick at every precision,
    and how many bytes a second were read beside it.
    """
    try:
        told = json.loads(report.read_text("utf-8"))
    except FileNotFoundError:
        return []
    limits = {row["precision"]: row["gb_per_second"] * 1e9 for row in told.get("limits", [])}
    return [
        {
            "format": row["precision"],
            "capacity": told["capacity"],
            "rows": told["task"]["context"],
            "tick": 1 / row["tokens_per_second"],
            "bandwidth": limits[row["precision"]],
        }
        for row in told.get("engines", [])
        if told.get("model") == "smollm2"
        and row["engine"] == "compiled"
        and row["precision"] in FORMATS
        and row["precision"] in limits
    ]


def lines_of(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    ruled = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in ruled)


def of_models() -> str:
    """Bytes and operations of one tick, model by model."""
    rows = []
    for name, config in MODELS.items():
        for kind, number in FORMATS.items():
            told = tick(config, number, 8192)
            rows.append(
                [
                    name,
                    kind,
                    f"{told.weights / 1e9:.3f}",
                    f"{row_bytes(config, number) / 1e3:.1f}",
                    f"{told.cache / 1e9:.3f}",
                    f"{told.scores / told.moved:.1%}",
                    f"{(told.logits + told.columns) / told.moved:.2%}",
                    f"{told.operations / 1e9:.1f}",
                    f"{told.operations / told.moved:.1f}",
                ]
            )
    return lines_of(
        [
            "model",
            "weights",
            "weights, GB",
            "KB per row",
            "cache read, GB",
            "scores",
            "logits, columns",
            "G operations",
            "per byte",
        ],
        rows,
    )


def of_this_machine(report: Path) -> str:
    """Predicted and measured, SmolLM2, with the error of the prediction."""
    rows = []
    for measured in measurements(report):
        told = tick(
            SMOLLM2, FORMATS[measured["format"]], measured["capacity"], bucket=measured["rows"]
        )
        seconds = told.moved / measured["bandwidth"]
        rows.append(
            [
                measured["format"],
                f"{told.moved / 1e6:.0f}",
                f"{measured['bandwidth'] / 1e9:.1f}",
                f"{seconds * 1e3:.2f}",
                f"{measured['tick'] * 1e3:.2f}",
                f"{1 / seconds:.1f}",
                f"{1 / measured['tick']:.1f}",
                f"{measured['tick'] / seconds - 1:+.0%}",
            ]
        )
    return lines_of(
        ["weights", "MB", "GB/s", "predicted ms", "measured ms", "per s", "per s", "time above"],
        rows,
    )


def of_gpus() -> str:
    """Ticks per second, predicted."""
    rows = []
    for name, config in MODELS.items():
        for kind in ("bfloat16", "int8"):
            number = FORMATS[kind]
            small = 512 * row_bytes(config, number) / 1e9
            for gigabytes in (small, 10, 40):
                capacity = round(gigabytes * 1e9 / row_bytes(config, number))
                row = [name, kind, f"{gigabytes:.2g}", f"{capacity:,}"]
                ticks = [tick(config, number, capacity, form=form) for form in (TWIN, OWN)]
                least = ticks[0].weights + ticks[0].cache
                for device in (H100, H200):
                    star = "" if least <= device.memory else " *"
                    row.append(f"{device.bandwidth / least:,.0f}")
                    for told, form in zip(ticks, (TWIN, OWN), strict=True):
                        row.append(f"{1 / device.seconds(config, told, form):,.0f}{star}")
                rows.append(row)
    return lines_of(
        [
            *("model", "weights", "cache, GB", "rows"),
            *("H100: bytes alone", TWIN.name, OWN.name),
            *("H200: bytes alone", TWIN.name, OWN.name),
        ],
        rows,
    )


def of_kernels() -> str:
    """What a tick with our kernels moves and starts, on paper."""
    rows = []
    for name, config in MODELS.items():
        for kind in ("bfloat16", "int8"):
            number = FORMATS[kind]
            told = tick(config, number, 1024, bucket=512, form=OWN)
            least = told.weights + told.cache
            moved = told.moved - told.scores
            rows.append(
                [
                    *(name, kind, str(OWN.kernels(config)), str(TWIN.kernels(config))),
                    *(f"{least / 1e6:,.1f}", f"{moved / 1e6:,.1f}", f"{moved / least:.3f}"),
                ]
            )
    return lines_of(
        [
            *("model", "weights", "kernels", "of PyTorch's compiler"),
            *("weights and 512 rows, MB", "moved, MB", "ratio"),
        ],
        rows,
    )


def of_large_caches() -> str:
    """Shares of a tick on an H100 as the cache grows."""
    rows = []
    for name in ("TinyLlama-1.1B", "Llama-3-8B"):
        config, number = MODELS[name], FORMATS["bfloat16"]
        for gigabytes in (1, 10, 20, 40, 60):
            capacity = round(gigabytes * 1e9 / row_bytes(config, number))
            told = tick(config, number, capacity, form=OWN)
            seconds = H100.seconds(config, told, OWN)

            def share(moved: int, seconds: float = seconds) -> str:
                return f"{moved / H100.bandwidth / seconds:.1%}"

            rows.append(
                [
                    name,
                    str(gigabytes),
                    f"{capacity:,}",
                    f"{seconds * 1e3:.2f}",
                    share(told.weights),
                    share(told.cache),
                    share(told.scores),
                    share(told.columns),
                    f"{H100.overhead(config, OWN) / seconds:.1%}",
                ]
            )
    return lines_of(
        [
            "model",
            "cache, GB",
            "rows",
            "ms per tick",
            "weights",
            "cache",
            "scores",
            "steps 2 to 4",
            "kernels",
        ],
        rows,
    )


def of_slots(bandwidth: float) -> str:
    """What one slot costs on this machine: to read it, to patch it, to decide about it."""
    rows = []
    for name, config in MODELS.items():
        read = row_bytes(config, FORMATS["bfloat16"]) / bandwidth * 1e9
        patch, decide = per_slot(PATCH_MS), per_slot(DECIDE_MS)
        rows.append(
            [
                name,
                f"{read:,.0f}",
                f"{patch:.1f}",
                f"{patch / read:.2%}",
                f"{decide:.0f}",
                f"{decide / read:.1%}",
            ]
        )
    return lines_of(
        ["bfloat16", "read, ns", "patch, ns", "of the read", "steps 2 to 4, ns", "of the read"],
        rows,
    )


def draw(path: Path) -> None:
    """Tokens per second against the size of the cache, predicted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    panel = figure.add_subplot()
    sizes = [10 ** (exponent / 8) for exponent in range(-16, 16)]
    colours = {"TinyLlama-1.1B": "#4878a8", "Llama-3-8B": "#d9973f", "Llama-3-70B": "#6a9f58"}
    for name, colour in colours.items():
        config = MODELS[name]
        kind = "int8" if name == "Llama-3-70B" else "bfloat16"
        number = FORMATS[kind]
        for device, style in ((H100, "-"), (H200, "--")):
            points = []
            for gigabytes in sizes:
                rows = round(gigabytes * 1e9 / row_bytes(config, number))
                told = tick(config, number, rows, form=OWN)
                if told.weights + told.cache <= device.memory:
                    points.append((gigabytes, 1 / device.seconds(config, told, OWN)))
            if points:
                label = f"{name} {kind}, {device.name}"
                panel.plot(*zip(*points, strict=True), style, color=colour, label=label)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.xaxis.set_major_formatter("{x:g}")
    known = (20, 50, 100, 200, 500, 1000)
    panel.set_yticks(known, [f"{ticks:,}" for ticks in known])
    panel.yaxis.set_minor_formatter("")
    panel.set_xlabel("cache, GB, all of it read in every tick")
    panel.set_ylabel("ticks per second (prediction)")
    panel.grid(alpha=0.3, which="both")
    panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, dpi=100, bbox_inches="tight")


def page(bandwidth: float) -> str:
    """The whole of ``roofline.md``."""
    bfloat16 = FORMATS["bfloat16"]
    tiny, medium, large = (row_bytes(c, bfloat16) for c in (TINYLLAMA, LLAMA3_8B, LLAMA3_70B))
    return f"""# A tick on paper

Made by `python profiles/roofline.py --bandwidth {bandwidth / 1e9:.1f}`. With one new token nothing is
computed for long: a tick takes as long as its bytes need through memory.

## What a tick moves

With L layers, H heads, K key heads of D numbers, a vocabulary of V, w bytes for a weight and k for
a number of the cache, capacity C and bucket B (the slots that a read looks at):

| | bytes |
|---|---|
| weights | w × (all matrices, and one row of the embedding), norms |
| cache | 2 × L × K × D × k × B |
| scores and shares | at most {TWIN.score_passes} × 4 × L × H × B: while they fit into a cache they stay there |
| logits | {TWIN.logit_passes} × 4 × V |
| columns: mask, brightness, decision, patch | about {COLUMN_BYTES} × C |

Operations: 2 × (numbers in all matrices + 2 × L × H × D × B). Nothing else grows with C or B: no
copy, no concatenation, and the patch writes 2 × L × K × D × k bytes for each row it writes.

At a capacity of 8,192, all of it read; int8 is for the matrices, the cache stays in bfloat16:

{of_models()}

A processor of today computes more operations per byte than the last column asks for, so memory
alone decides; on a CPU that holds as long as the loops are vectorised.

## This machine

SmolLM2-135M, whole ticks of `task=bench` (`results/bench.json`), and what the bytes of the rows that
are remembered and of everything else would take at the speed at which as many bytes were read in the
same run. The last column is the error of the prediction: how much longer it takes.

{of_this_machine(REPORT)}

Left out of the prediction: threads that wait for each other five times a layer, the arithmetic of
attention, and what Python does between graphs. Counted, but in fact never leaving a cache here:
scores and logits.

## H100 and H200: predictions

A tick is two graphs, its step and its patch. With kernels of our own (`engine.kernels=true`) it starts
six kernels a layer and {OWN.kernels_around} around them, counted without a GPU by `profiles/kernels_on_paper.py`; PyTorch's
compiler made {TWIN.kernels_per_layer} a layer and {TWIN.kernels_around} around them. What they move beside weights and visible rows are logits,
written and read once, and columns. Their scratch is expected to stay in the GPU's cache; it is not counted. At 512 rows
of 1,024 slots:

{of_kernels()}

Ticks per second at {H100.bandwidth / 1e12:.1f} and {H200.bandwidth / 1e12:.1f} TB/s: for the bytes alone, and with {H100.kernel_seconds * 1e6:.1f} µs for each kernel. That time is
of the one model that was measured on an H100, SmolLM2 with PyTorch's compiler (`results/h100.json`:
1.55 ms a tick at its fastest, in three graphs, each token waited for). **Our kernels have not run on a
GPU: of the numbers below nothing has been measured.** The host's part, {H100.launches} × {H100.launch_seconds * 1e6:.0f} µs, is hidden behind the
tick before it. All of the cache is read in every tick. A star: weights and cache do not fit into the memory
of one such GPU.

{of_gpus()}

![Ticks per second against the size of the cache](roofline.png)

## Tens of gigabytes of cache

Shares of a tick on an H100, bfloat16, predicted:

{of_large_caches()}

* **The patch and steps 2 to 4** scan columns: {COLUMN_BYTES} bytes of a slot, of which the read moves
  {tiny / 1e3:.0f} KB (TinyLlama) to {large / 1e3:.0f} KB (70B). Both grow with the capacity, so their share stays what it
  is: they never begin to matter, however large the cache, while the read looks at all of it. They
  would if it did not: where only a bucket of less than {COLUMN_BYTES / tiny:.1%} (TinyLlama) or {COLUMN_BYTES / medium:.2%} (8B)
  of the slots is read, they move more than the cache does.
* **Attention scores** are up to {score_bytes(TINYLLAMA, bfloat16, 1, OWN) / tiny:.0%} of the cache's bytes for TinyLlama, {score_bytes(LLAMA3_8B, bfloat16, 1, OWN) / medium:.0%} for 8B ({score_bytes(TINYLLAMA, bfloat16, 1, TWIN) / tiny:.0%} and {score_bytes(LLAMA3_8B, bfloat16, 1, TWIN) / medium:.0%}
  with PyTorch's compiler): the price of knowing the attention that every row received. They are counted
  here as if they left the GPU's cache, in which those of one layer, 2 × H × B bytes, may stay.
* **The number of kernels** is more than a tenth of a tick while it moves less than
  {bytes_for_kernels(0.1)}.
  For a small model with a small cache they decide; the last column of the table says how little
  they are at tens of gigabytes.

On this machine, one more slot costs (the read predicted at {bandwidth / 1e9:.1f} GB/s, the others measured, see
`README.md`):

{of_slots(bandwidth)}

Steps 2 to 4 take longer here than their bytes would: ranking rows for novelty is a library's
selection on one thread. Of the smallest models it takes a few percent, of larger ones nothing.
"""


def bytes_for_kernels(share: float) -> str:
    """Bytes of a tick at which kernels take this share of it, for two models, on an H100."""
    told = []
    for name in ("TinyLlama-1.1B", "Llama-3-8B"):
        overhead = H100.overhead(MODELS[name], OWN)
        moved = overhead * (1 - share) / share * H100.bandwidth
        told.append(f"{moved / 1e9:.0f} GB ({name})")
    return " or ".join(told)


def main() -> None:
    """Writes the page and the picture."""
    parser = argparse.ArgumentParser(description="A tick on paper.")
    known = parser.add_mutually_exclusive_group(required=True)
    known.add_argument("--bandwidth", type=float, help="GB/s of this machine's memory")
    known.add_argument("--measure", action="store_true", help="measure it now")
    arguments = parser.parse_args()
    bandwidth = measured_bandwidth() if arguments.measure else arguments.bandwidth * 1e9
    (HERE / "roofline.md").write_text(page(bandwidth), "utf-8")
    draw(HERE / "roofline.png")
    print(f"{bandwidth / 1e9:.1f} GB/s; profiles/roofline.md and roofline.png are written")


if __name__ == "__main__":
    main()
