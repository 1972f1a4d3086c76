"""``task=eval``: how well each policy remembers, on any text.

Writes ``eval.json`` and a picture for each measure into the run folder; prints the tables. What is
measured is kept there part by part, so that the same command goes on with the rest.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from brain.auto import resolved
from brain.brain import Brain
from brain.checkpoints import Checkpoint
from brain.config.compose import compose_conf
from brain.config.settings import engine_name, settings_of
from brain.errors import Refused
from brain.machine.environment import environment
from brain.measure.evaluation.contestants import Contestant, contestants
from brain.measure.evaluation.measures import (
    Subject,
    measure_endurance,
    measure_fluency,
    measure_repair,
    measure_retrieval,
    plant,
    write,
)
from brain.measure.evaluation.parts import Parts
from brain.measure.evaluation.request import (
    ENDURANCE,
    FLUENCY,
    REPAIR,
    RETRIEVAL,
    Request,
    request_of,
)
from brain.measure.evaluation.texts import read_text
from brain.opening import checkpoint_of, use_threads
from brain.record.lock import sole_writer
from brain.terminal import capture_graphs, note
from conf.schema import Conf, EvalTask

ON_TEXT = {FLUENCY: measure_fluency, RETRIEVAL: measure_retrieval, REPAIR: measure_repair}


def run(conf: Conf, run_dir: Path) -> None:
    """Measures what ``task.measures`` names. Raises Refused before anything long begins."""
    request = request_of(cast(EvalTask, conf.task), conf)
    policies = contestants(request.sizes.policies, request.budgets, conf, full=request.full)
    use_threads(conf.threads)
    text = None if request.text is None else read_text(Path(request.text))
    if text is None and set(request.measures) != {ENDURANCE}:
        raise Refused("task.text is missing: give a UTF-8 file or a folder of them to measure on")
    _say_what_is_not_used(conf, request, policies)
    note(f"loading {conf.model.name} …")
    conf = resolved(conf).conf
    settings = settings_of(conf)
    checkpoint = checkpoint_of(conf, settings)
    brain: Brain | None = None
    if ENDURANCE in request.measures:
        brain = Brain(checkpoint, settings)
        capture_graphs(brain.graphs)
        brain.prime(conf.prompt, conf.source)
    report = _report(conf, request, checkpoint)
    if text is not None and set(request.measures) - {ENDURANCE}:
        ids = checkpoint.tokenizer.encode(text, special=False)
        planting = plant(checkpoint, request, conf.seed)
        with sole_writer(run_dir):
            parts = Parts(run_dir, _about(report, checkpoint, text))
            subject = Subject(checkpoint, conf, request, policies, ids, planting, parts, run_dir)
            subject.check()
            try:
                for measure, measured in ON_TEXT.items():
                    if measure in request.measures:
                        report[measure] = measured(subject)
            except KeyboardInterrupt:
                note(
                    f"{len(parts)} parts are measured and kept: the same command with "
                    f"hydra.run.dir={run_dir} goes on"
                )
                raise
            finally:
                parts.close()
    if brain is not None:
        report[ENDURANCE] = measure_endurance(brain, conf, request, run_dir)
    write(report, run_dir / "eval.json")
    note(f"results and pictures in {run_dir}")


def _say_what_is_not_used(conf: Conf, request: Request, policies: Sequence[Contestant]) -> None:
    usual = compose_conf([]).capacity
    if ENDURANCE not in request.measures and conf.capacity != usual:
        note(
            f"capacity={conf.capacity} is not used: task.budgets={list(request.budgets)} says how "
            "many rows a memory has"
        )
    if request.against not in [policy.label for policy in policies]:
        note(f"{request.against} is not among task.policies: nothing is compared with it")


def _report(conf: Conf, request: Request, checkpoint: Checkpoint) -> dict[str, Any]:
    here = environment(settings_of(conf).device)
    return {
        "model": checkpoint.name,
        "model_sha256": checkpoint.sha256,
        "torch": here["torch"],
        "device": here["device"],
        "engine": engine_name(conf.engine),
        "dtype": conf.dtype.value,
        "weights": conf.weights.value,
        "threads": here["threads"],
        "seed": conf.seed,
        "positions": conf.positions.value,
        "chunk": conf.cull.chunk,  # tokens by which texts are read
        "task": dataclasses.asdict(conf.task) | _plain(request),
        "cull": dataclasses.asdict(conf.cull),  # of repair and endurance
        "repair": dataclasses.asdict(conf.repair),
    }


def _plain(request: Request) -> dict[str, Any]:
    """The keys of ``task`` as they were chosen."""
    plain = dataclasses.asdict(request)
    sizes = plain.pop("sizes")
    return {**plain, **sizes, "kinds": [kind.name for kind in request.kinds]}


def _about(report: dict[str, Any], checkpoint: Checkpoint, text: str) -> dict[str, Any]:
    """What every part depends on, beside its policy. Policies and measures may be added later."""
    free = ("measures", "policies", "full", "against", "bucket", "text", "name", "quick")
    task = {f"task.{name}": value for name, value in report["task"].items() if name not in free}
    depends = ("model_sha256", "device", "engine", "dtype", "weights", "seed", "positions")
    return {
        **{name: report[name] for name in depends},
        "vocabulary_sha256": checkpoint.vocabulary_sha256,
        "cull.chunk": report["chunk"],
        "text": hashlib.sha256(text.encode()).hexdigest(),
        **task,
    }
