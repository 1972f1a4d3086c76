"""Settings of older saves and records, as they are said now."""

import copy
import dataclasses
from typing import Any

from conf.schema import LookupConf, WeightFormat

_UNSAID: dict[tuple[str, ...], Any] = {
    ("lookup",): dataclasses.asdict(LookupConf()),
    ("path",): None,
    ("prompt_file",): None,
    ("special",): True,
    ("weights",): WeightFormat.model.value,
    ("model", "file"): None,
    ("cull", "novelty", "lifetime"): None,
    ("cull", "chunk"): 1,
    ("engine", "kernels"): False,
}
"""What each setting, by its path, would have been where it was not known yet."""


def bring_up_to_date(conf: dict[str, Any]) -> None:
    """Says a recorded configuration as it is said now, in place: adds what it lacks, and renames.
    What it says stays as it is, damage included: nothing is added where a group should be and is
    not.
    """
    engine = conf.get("engine")
    if isinstance(engine, dict) and "compiled" in engine:
        engine["captured"] = engine.pop("compiled")
        # It said nothing where nothing was captured, and was not there at first.
        engine["native"] = engine["captured"] and engine.get("native", False)
    for (*groups, name), value in _UNSAID.items():
        within: Any = conf
        for group in groups:
            within = within.get(group) if isinstance(within, dict) else None
        if isinstance(within, dict):
            within.setdefault(name, copy.copy(value))
