"""Valid files of every kind, which tests damage."""

from pathlib import Path

import pytest
import torch

from fuzzing.specimens import Specimens


@pytest.fixture(scope="session")
def specimens(tmp_path_factory: pytest.TempPathFactory) -> Specimens:
    """Valid files of every kind, which tests damage."""
    torch.set_num_threads(1)
    return Specimens(tmp_path_factory.mktemp("specimens"))


@pytest.fixture
def toy_model(specimens: Specimens, tmp_path: Path) -> Path:
    """A model folder to damage: config.json, tokenizer.json, model.safetensors."""
    return specimens.copy(specimens.single, tmp_path / "model")
