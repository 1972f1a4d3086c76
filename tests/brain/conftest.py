"""A tokenizer that two test files read."""

from pathlib import Path

import pytest

from texts import train_sentencepiece


@pytest.fixture(scope="session")
def spm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spm")
    (folder / "tokenizer.model").write_bytes(train_sentencepiece())
    return folder
