"""What a report says about where its numbers were made."""

import json
import platform
from importlib.metadata import version

import torch

from brain.machine.environment import environment


def test_a_report_tells_versions_and_the_machine() -> None:
    told = environment(torch.device("cpu"))
    assert json.loads(json.dumps(told)) == told
    assert told["torch"] == torch.__version__
    assert told["python"] == platform.python_version()
    assert told["transformers"] == version("transformers")
    assert told["cpu"] == torch.backends.cpu.get_cpu_capability()
    assert told["threads"] == torch.get_num_threads()
    assert told["device"] == "cpu"
