"""Making goldens with the reference implementation, on the CPU.

In float32, and once more in every lower precision: how far the reference is then from its own
float32 run is the noise that a low-precision engine is measured by.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from brain.checkpoints import Checkpoint, model_folder, open_checkpoint
from brain.errors import Refused, one_line
from brain.machine.environment import environment
from brain.machine.progress import progress_bar
from brain.measure.golden.cases import TEXT, Case, cases
from brain.measure.golden.files import Golden, save_golden
from brain.measure.golden.judge import Distance, Expected, distance, expected_of
from brain.measure.golden.reference import (
    load_reference,
    reference_run,
    seeded_reference,
    transformers,
)
from brain.measure.golden.seeded import SEEDED
from conf.schema import Conf

PASSAGE, ABOUT_PASSAGE = "passage.txt", "passage.json"
LOW_PRECISION = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def write(conf: Conf, folder: Path, names: Sequence[str]) -> list[str]:
    """Makes these goldens anew (all, if none is named) and returns their names.

    Raises Refused where the reference is not installed, or there is no passage to read.
    """
    library = transformers()
    cpu = torch.device("cpu")
    checkpoint = open_checkpoint(conf.model, conf.cache_dir, torch.float32, cpu)
    passage, ids = _passage(folder, checkpoint)
    here = environment(cpu)
    made = {
        "by": "Hugging Face transformers, LlamaForCausalLM, masked passes without a cache",
        "transformers": library.__version__,
        "torch": here["torch"],
        "dtype": "float32",
        "device": here["device"],
        "cpu": here["cpu"],
        "platform": here["platform"],
    }
    groups: dict[str | None, list[Case]] = {}
    chosen = chosen_cases(cases(ids), names)
    for case in chosen:
        groups.setdefault(case.seeded, []).append(case)
    runs = (1 + len(LOW_PRECISION)) * len(chosen)
    with progress_bar("writing goldens", runs, "run", leave=False) as bar:
        for seeded, group in groups.items():
            results = _run_all(conf, seeded, group, bar)
            for case, (expected, noise) in zip(group, results, strict=True):
                command = f"brain task=golden task.write=true task.cases=[{case.name}]"
                provenance: dict[str, Any] = {**made, "command": command}
                if seeded is None:
                    provenance["command"] += f" model={conf.model.name}"
                    provenance["text"] = passage
                golden = Golden(
                    name=case.name,
                    description=case.description,
                    model=seeded or checkpoint.name,
                    model_sha256=SEEDED[seeded].sha256() if seeded else checkpoint.sha256,
                    script=case.script,
                    memory=case.memory,
                    expected=expected,
                    noise=noise,
                    provenance=provenance,
                )
                save_golden(golden, folder)
    return [case.name for case in chosen]


def chosen_cases(known: Sequence[Case], names: Sequence[str]) -> list[Case]:
    """The cases of these names, or all. Raises Refused for a name that there is not."""
    by_name = {case.name: case for case in known}
    chosen(list(by_name), names)
    return [by_name[name] for name in names or by_name]


def chosen(known: Sequence[str], names: Sequence[str]) -> list[str]:
    """These names, or all. Raises Refused for a name that there is not."""
    for name in names:
        if name not in known:
            raise Refused(f"task.cases: no golden {name!r}; there are {', '.join(known)}")
    return list(names or known)


def _run_all(
    conf: Conf, seeded: str | None, group: Sequence[Case], bar: Any
) -> list[tuple[Expected, dict[str, Distance]]]:
    """The reference's float32 runs of all cases of one model, and its noise."""

    def model_in(dtype: torch.dtype) -> Any:
        if seeded is not None:
            return seeded_reference(SEEDED[seeded], dtype)
        return load_reference(model_folder(conf.model, conf.cache_dir), dtype)

    model = model_in(torch.float32)
    results: list[tuple[Expected, dict[str, Distance]]] = []
    for case in group:
        bar.set_postfix_str(f"{case.name} float32")
        results.append((expected_of(reference_run(model, case.script), case.full), {}))
        bar.update()
    for name, dtype in LOW_PRECISION.items():
        del model
        model = model_in(dtype)
        for case, (expected, noise) in zip(group, results, strict=True):
            bar.set_postfix_str(f"{case.name} {name}")
            noise[name] = distance(expected, reference_run(model, case.script))
            bar.update()
    return results


def _passage(folder: Path, checkpoint: Checkpoint) -> tuple[dict[str, Any], list[int]]:
    """What is known of the passage, and its tokens."""
    path = folder / PASSAGE
    try:
        raw = path.read_bytes()
        ids = checkpoint.tokenizer.encode(raw.decode("utf-8"))
        about = folder / ABOUT_PASSAGE
        described = json.loads(about.read_text("utf-8")) if about.exists() else {}
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise Refused(
            f"{path}: cannot be read ({reason}); put a text of at least {TEXT} tokens there"
        ) from None
    if len(ids) < TEXT:
        raise Refused(f"{path}: {len(ids)} tokens, but {TEXT} are read; use a longer text")
    return {"file": PASSAGE, "sha256": hashlib.sha256(raw).hexdigest(), **described}, ids
