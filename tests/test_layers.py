"""Which part of the code may import which."""

import ast
import inspect
from pathlib import Path

import compiled

SOURCES = sorted(Path(inspect.getfile(compiled)).parent.glob("*.py"))


def test_compiled_imports_nothing_of_the_rest() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, path.name
                names = [str(node.module)]
            for name in names:
                assert name.split(".")[0] not in ("brain", "conf", "hydra", "tests"), path.name
