"""What ``model=…`` names, on the command line and in Python.

The first that fits: a built-in name, which is a choice of the group ``model``; a path that exists;
a repository on the hub. Anything but a choice reaches Hydra as ``model=named model.name=…``, in a
sweep the choices too, and is told apart when the configuration is composed.
"""

import dataclasses
import importlib.resources
import os
import re
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from brain.errors import Refused, did_you_mean
from brain.files import given_path
from conf.schema import ModelConf, Source

REPOSITORY = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
FILE = re.compile(r".*\.(gguf|safetensors|json)", re.IGNORECASE | re.DOTALL)
"""What is no repository, whether there is such a file or not."""


@cache
def choices() -> frozenset[str]:
    """The built-in names, and ``folder``."""
    names = (file.name for file in importlib.resources.files("conf").joinpath("model").iterdir())
    return frozenset(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def named_model(model: ModelConf) -> ModelConf:
    """The model that ``model.name`` names, with its source. Raises Refused if there is none."""
    name = model.name
    if name in choices():
        return dataclasses.replace(model, **_built_in(name))
    if name and os.path.exists(path := given_path(name)):
        source = Source.folder if path.is_dir() else Source.gguf
        return dataclasses.replace(model, source=source, path=name)
    if REPOSITORY.fullmatch(name) and not FILE.fullmatch(name):
        return dataclasses.replace(model, source=Source.hub, repo=name)
    known = sorted(choices())
    raise Refused(
        f"model={name} is no built-in model ({', '.join(known)}), no path that exists, and no "
        f"repository on the hub (org/name){did_you_mean(name, known)}"
    )


def _built_in(name: str) -> dict[str, Any]:
    """What the file of a choice says."""
    file = importlib.resources.files("conf").joinpath("model", f"{name}.yaml")
    said: Any = OmegaConf.to_container(OmegaConf.create(file.read_text("utf-8")))
    del said["defaults"]
    return {**said, "source": Source[said["source"]]}
