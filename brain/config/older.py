"""Settings that older saves and records do not hold: what was made before them was made without."""

import copy
import dataclasses
from typing import Any

from conf.schema import LookupConf, WeightFormat

_UNSAID: dict[tuple[str, ...], Any] = {
    ("lookup",): dataclasses.asdict(LookupConf()),
    ("path",): None,
    ("weights",): WeightFormat.model.value,
    ("engine", "native"): False,
    ("cull", "novelty", "lifetime"): None,
}
"""What each setting, by its path, would have been."""


def add_unsaid(conf: dict[str, Any]) -> None:
    """Adds to a configuration that was written down the settings that were not yet there, in place.

    Whatever it says stays as it is, damage included: nothing is put into what is no group.
    """
    for (*groups, name), value in _UNSAID.items():
        within: Any = conf
        for group in groups:
            within = within.get(group) if isinstance(within, dict) else None
        if isinstance(within, dict):
            within.setdefault(name, copy.copy(value))
