"""``task=bench``: tokens per second beside the peers that are installed, from one run.

Our engines take the likeliest token, as the others do, unless a ``sampler`` is named on the command
line, which the report holds. Writes ``bench.json`` and a picture for each measure.
"""

from pathlib import Path
from typing import cast

from hydra.core.hydra_config import HydraConfig

from brain.measure.bench.comparison import Comparison
from brain.measure.bench.contestants import key_of
from brain.measure.bench.request import DECODE, SCALING, check, precisions_of
from brain.terminal import note
from conf.schema import BenchTask, Conf


def run(conf: Conf, run_dir: Path) -> None:
    """Prints one table for each measure; when it is interrupted, those of what has been timed.
    Raises Refused before anything long begins, and KeyboardInterrupt at the end.
    """
    task = cast(BenchTask, conf.task)
    command = HydraConfig.get().overrides.task
    asked = [override for override in command if key_of(override).partition(".")[0] != "task"]
    keys = {key_of(override) for override in asked}
    precisions = precisions_of(task, conf, keys)
    check(task, conf, keys)
    comparison = Comparison(conf, task, command, asked, precisions, run_dir)
    for measure in dict.fromkeys(task.measures):
        if not comparison.interrupted:
            {DECODE: comparison.decode, SCALING: comparison.scaling}[measure]()
    for name, reason in comparison.missing.items():
        print(f"missing: {name}: {reason}")
    note(f"results and pictures in {run_dir}")
    if comparison.interrupted:
        raise KeyboardInterrupt
