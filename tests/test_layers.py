"""Which part of the code may import which.

The written list of layers: a module may import what stands before it, and what stands in its own
room. There is no circle anywhere, and one module imports the writer.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import compiled

ROOT = Path(compiled.__file__).parents[1]

LAYERS = (
    "conf",
    "compiled",
    "brain.errors",
    "brain.files",
    "brain.machine",
    "brain.terminal",
    "brain.prompt_file",
    "brain.mirror",
    "brain.policies",
    "brain.tokenizers",
    "brain.tokens",
    "brain.chat",
    "brain.checkpoints",
    "brain.diagnosis",
    "brain.config",
    "brain.memory",
    "brain.row_index",
    "brain.actions",
    "brain.edits",
    "brain.repair",
    "brain.tick",
    "brain.speculate",
    "brain.loop",
    "brain.chunks",
    "brain.saves",
    "brain.brain",
    "brain.auto",
    "brain.opening",
    "brain.record",
    "brain.conversation",
    "brain.measure",
    "brain.tasks",
    "brain.app",
    "brain",
)


def modules() -> dict[str, Path]:
    """Every module of the product by its name."""
    found = {}
    for top in ("conf", "compiled", "brain"):
        for path in (ROOT / top).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the product that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in known:
                    yield inner
                elif node.module in known:
                    yield str(node.module)


MODULES = modules()
GRAPH = {name: set(imports(path, MODULES)) - {name} for name, path in MODULES.items()}


def layer_of(module: str) -> int:
    """The layer of the longest name that the module is, or lies in."""
    fitting = [
        index
        for index, layer in enumerate(LAYERS)
        if module == layer or module.startswith(f"{layer}.")
    ]
    return max(fitting, key=lambda index: len(LAYERS[index]))


def test_every_module_has_a_layer_of_its_own_or_a_room() -> None:
    alone = {layer for layer in LAYERS if layer not in MODULES}
    assert not alone, "layers that are no modules"
    top = LAYERS.index("brain")
    assert [name for name in MODULES if layer_of(name) == top] == ["brain"]


def test_no_module_imports_one_above_it() -> None:
    wrong = [
        f"{name} imports {found}"
        for name, imported in GRAPH.items()
        for found in imported
        if layer_of(found) > layer_of(name)
    ]
    assert not wrong, wrong


def test_there_is_no_circle_of_imports() -> None:
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way, name))
        if name not in done:
            for found in GRAPH[name]:
                visit(found, (*way, name))
            done.add(name)

    for name in GRAPH:
        if name not in ("brain", "conf"):  # packages whose modules import each other through them
            visit(name, ())


def test_compiled_imports_nothing_of_the_rest() -> None:
    for name, path in MODULES.items():
        if name.split(".")[0] == "compiled":
            outside = ("brain", "conf", "hydra", "omegaconf", "tests")
            tree = ast.walk(ast.parse(path.read_text("utf-8")))
            told = [n for node in tree if isinstance(node, ast.Import) for n in node.names]
            assert not [n for n in told if n.name.split(".")[0] in outside], name
            assert not [f for f in GRAPH[name] if f.split(".")[0] in outside], name


def test_one_module_imports_the_writer() -> None:
    writers = sorted(name for name, found in GRAPH.items() if "compiled.patch" in found)
    assert writers == ["compiled.graphs"]
