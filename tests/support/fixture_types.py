"""Types of the functions that fixtures hand out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from brain import Brain

EditJson = Callable[[Path, dict[str, Any]], None]
SaveLlama = Callable[..., dict[str, Tensor]]
OpenTiny = Callable[..., Brain]
RoomyBrain = Callable[[str, str, str], Brain]
Reference = Callable[[str, str], Any]
CommandLine = Callable[..., tuple[int, str, str]]
