"""Settings that older saves and records lack: these were made without what the settings ask for."""

import copy
import dataclasses
from typing import Any

from conf.schema import LookupConf, WeightFormat

_UNSAID: dict[tuple[str, ...], Any] = {
    ("lookup",): dataclasses.asdict(LookupConf()),
    ("path",): None,
    ("special",): True,
    ("weights",): WeightFormat.model.value,
    ("engine", "native"): False,
    ("cull", "novelty", "lifetime"): None,
}
"""What each setting, by its path, would have been."""


def add_unsaid(conf: dict[str, Any]) -> None:
    """Adds the settings that a recorded configuration lacks, in place. What it says stays as it is,
    damage included: nothing is added where a group should be and is not.
    """
    for (*groups, name), value in _UNSAID.items():
        within: Any = conf
        for group in groups:
            within = within.get(group) if isinstance(within, dict) else None
        if isinstance(within, dict):
            within.setdefault(name, copy.copy(value))
