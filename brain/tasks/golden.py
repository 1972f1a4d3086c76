"""``task=golden``: compare logits with golden files, or write these files.

The files are in a clone of the repository, in ``tests/golden``. Checking needs nothing else but
this program; writing needs the reference implementation.
"""

import dataclasses
import json
from pathlib import Path
from typing import cast

from brain.auto import resolved
from brain.config.settings import engine_name, settings_of
from brain.errors import Refused
from brain.files import given_path
from brain.machine.environment import environment
from brain.measure.golden.check import check, table
from brain.measure.golden.files import golden_names
from brain.measure.golden.write import chosen, write
from brain.opening import use_threads
from brain.terminal import note
from conf.schema import Conf, DType, GoldenTask, WeightFormat

DEFAULT_FOLDER = Path("tests/golden")


class Mismatch(Refused):
    """The engine's logits differ from those of the golden files."""


def run(conf: Conf, run_dir: Path) -> None:
    """Checks golden files against the engine as configured; with ``task.write`` writes them. A
    check prints a table on standard error and writes ``golden.json`` into the run folder. Raises
    Mismatch saying which goldens fail and where, Refused where nothing can be checked, as with
    weights in eight bits.
    """
    task = cast(GoldenTask, conf.task)
    use_threads(conf.threads)
    if conf.dtype is DType.auto:  # what goldens are made in
        conf = dataclasses.replace(conf, dtype=DType.float32)
    conf = resolved(conf).conf
    if conf.weights is not WeightFormat.model:
        raise Refused(
            f"weights={conf.weights.value} has no goldens: they are made with the weights as "
            "the model has them; leave weights=model"
        )
    folder = DEFAULT_FOLDER if task.folder is None else given_path(task.folder)
    if task.write:
        written = write(conf, folder, task.cases)
        note(f"{len(written)} goldens written to {folder}: {', '.join(written)}")
        return
    outcomes = list(check(conf, folder, chosen(golden_names(folder), task.cases)))
    engine = engine_name(conf.engine)
    here = environment(settings_of(conf).device)
    report = {
        "torch": here["torch"],
        "engine": engine,
        "dtype": conf.dtype.value,
        "device": here["device"],
        "threads": here["threads"],
        "goldens": [outcome.to_json() for outcome in outcomes],
    }
    (run_dir / "golden.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    note(table(outcomes))
    failed = [outcome for outcome in outcomes if outcome.verdict.failure is not None]
    if failed:
        failures = "; ".join(f"{outcome.title}: {outcome.verdict.failure}" for outcome in failed)
        raise Mismatch(f"{len(failed)} of {len(outcomes)} golden runs differ: {failures}")
    note(f"{len(outcomes)} golden runs agree ({engine}, {conf.dtype.value}); {run_dir}")
