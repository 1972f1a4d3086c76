"""What the numbers of a report depend on besides what was asked for: versions and the machine."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("positronic-brain", "transformers", "llama-cpp-python")


def environment(device: torch.device | str) -> dict[str, Any]:
    """Facts for a report, as JSON can hold them; every report picks those that it needs. A version
    is None where the package is not installed; ``cpu`` is the widest vector instructions that
    PyTorch uses, ``threads`` counts those of PyTorch.
    """
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
            names = [line.split(":", 1)[1].strip() for line in cpuinfo if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor()
