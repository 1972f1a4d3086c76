"""From Hydra overrides to the typed configuration."""

import dataclasses
import difflib
import re
from collections.abc import Iterator
from typing import Any, cast, get_type_hints

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from brain.config.model_name import named_model
from brain.config.overrides import as_given
from brain.config.type_check import check_types
from brain.errors import Refused, did_you_mean, one_line
from conf.schema import Conf, Source, register

_OF_SOURCES = (
    ("path", (Source.folder, Source.gguf), "model=folder"),
    ("repo", (Source.hub,), "model=tinyllama"),
    ("revision", (Source.hub,), "model=ORG/NAME"),
    ("file", (Source.hub,), "model=ORG/NAME"),
    ("wheel", (Source.wheel,), "model=smollm2"),
)
"""Keys of a model, the sources that each is for, and a model of such a source."""


def compose_conf(overrides: list[str]) -> Conf:
    """The typed configuration for these overrides, ``path`` in its place. Raises Refused."""
    register()
    around = GlobalHydra.instance()
    hydra = around.hydra  # of the application around this call, if there is one
    around.clear()
    try:
        with initialize_config_module("conf", version_base=None):
            return typed(compose("config", overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise Refused(configuration_error(error)) from None
    finally:
        around.hydra = hydra


def typed(conf: DictConfig) -> Conf:
    """The dataclasses behind a composed configuration. Raises Refused for a value of another type
    than the schema's, which can come in behind an escaped interpolation.
    """
    found = cast(Conf, as_given(OmegaConf.to_object(conf)))
    check_types(found, Conf)
    return _with_path_in_model(found)


def _with_path_in_model(conf: Conf) -> Conf:
    """``path`` moved to ``model.path``, and what a model's name names. Raises Refused for a key of
    the model that does not apply to its source.
    """
    model = conf.model
    if model.source is Source.named:
        others = {"path": conf.path, "model.path": model.path, "model.repo": model.repo}
        for key, value in others.items():
            if value is not None:
                raise Refused(
                    f"{key}={value} does not apply to model={model.name}: give one of them"
                )
        model = named_model(model)
    if conf.path is not None:
        if model.path is not None and model.path != conf.path:
            raise Refused(f"path={conf.path} and model.path={model.path} differ: give one of them")
        model = dataclasses.replace(model, path=conf.path)
    for key, sources, choice in _OF_SOURCES:
        if getattr(model, key) is not None and model.source not in sources:
            named = key if key == "path" and conf.path is not None else f"model.{key}"
            raise Refused(
                f"{named} does not apply to model={model.name}: use {choice}, or leave it out"
            )
    return dataclasses.replace(conf, model=model, path=None)


def configuration_error(error: BaseException) -> str:
    """Hydra's error about an override, in one line, with the nearest key or choice."""
    reasons = [str(error).split("\n")[0]]
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        reasons.append(str(cause).split("\n")[0])
    reason = ": ".join(dict.fromkeys(reason.rstrip(".") for reason in reasons if reason))
    return f"{reason or one_line(error)}{_nearest(error)}; brain --help lists the keys"


def _nearest(error: BaseException) -> str:
    """The key or choice that was meant, where there is one like it."""
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.options:
        asked = str(error.missing_cfg_file).rpartition("/")[2]
        return did_you_mean(asked, (o for o in error.options if not o.endswith("schema")))
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        within, dot, name = str(cause.full_key).rpartition(".")
        kind = cause.object_type
        fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
        near = did_you_mean(name, (field.name for field in fields), within + dot)
        grouped = {key.rpartition(".")[2]: key for key in _keys(Conf)}
        if near or dot:
            return near
        close = difflib.get_close_matches(name.lower(), grouped, 1)
        return f"; did you mean {grouped[close[0]]}?" if close else ""
    if found := re.match(r"Invalid value '(.*)', expected one of \[(.*)\]", str(cause)):
        return did_you_mean(found[1], found[2].split(", "))
    if found := re.match(r"Value '(.*)' is not a valid bool", str(cause)):
        return did_you_mean(found[1], ("true", "false"))
    return ""


def _keys(kind: Any, within: str = "") -> Iterator[str]:
    """Every key of a schema, in full."""
    for name, inner in get_type_hints(kind).items():
        yield within + name
        if dataclasses.is_dataclass(inner):
            yield from _keys(inner, f"{within}{name}.")
