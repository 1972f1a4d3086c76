"""I2: only the patch writes. Captured graphs and source alike are searched for writes."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

import brain
import compiled
from brain import Brain
from captured_graphs import aliased_inputs, captured, mutated_inputs
from compiled.capture import Graph
from compiled.state import Cursor, State
from histories import IDS
from toys import digest

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCES = sorted(Path(inspect.getfile(compiled)).parent.glob("*.py"))


def assert_writes_nothing(capture: Graph) -> None:
    for module in capture.modules:
        assert mutated_inputs(module) == set(), capture.name
        assert aliased_inputs(module) == 0, capture.name


def test_I2_no_captured_read_can_write(reading_brain: Brain) -> None:
    for capture in captured(reading_brain, "read"):
        assert_writes_nothing(capture)


@pytest.mark.parametrize("prefix", ["step", "surprise"])
def test_I2_no_captured_graph_but_the_patch_can_write(prefix: str, warm_brain: Brain) -> None:
    for capture in captured(warm_brain, prefix):
        assert_writes_nothing(capture)


def test_I2_captured_reads_take_every_input_that_matters(reading_brain: Brain) -> None:
    """What the checks above look at is the read itself: weights, cache, mirror and tokens."""
    for capture in captured(reading_brain, "read"):
        names = [str(n.target) for n in capture.modules[0].graph.find_nodes(op="placeholder")]
        for field in ("keys", "values", "valid", "position", "embedding", "qkv", "down"):
            assert any(name.endswith(field) for name in names), (capture.name, field)


@pytest.mark.parametrize("kind", ["tick", "edit"])
def test_I2_the_patch_writes_what_it_should(kind: str, warm_brain: Brain) -> None:
    """The checks can fail: they find every write of the patch, and only those it is for."""
    everything = {f"L_arguments_0_{name}" for name in warm_brain.state._fields}
    everything |= {f"L_arguments_1_{name}" for name in warm_brain.cursor._fields}
    for capture in captured(warm_brain, f"patch {kind}"):
        assert mutated_inputs(capture.modules[0]) == everything, capture.name


def test_I2_captured_reads_write_no_byte_of_any_input(reading_brain: Brain) -> None:
    """The machine code, not the graph it was made of."""
    b = reading_brain
    b.prime(IDS[:30])
    held = (*b.state, *b.cursor, *b.checkpoint.weights.tensors(), *b.graphs.sampling)
    before = digest(*held)
    graphs = list(captured(b, "read"))
    for capture in graphs:
        width, bucket = map(int, re.findall(r"\d+", capture.name))
        tokens, positions = torch.arange(width), torch.arange(30, 30 + width)
        length = torch.tensor(width)
        inputs = digest(tokens, positions, length)
        b.graphs.read(tokens, positions, length, high_water=bucket)
        assert digest(tokens, positions, length) == inputs
    assert digest(*held) == before
    assert list(captured(b, "read")) == graphs  # it was those that read


def in_place_writes(tree: ast.AST) -> list[str]:
    """Every call of a method that writes its tensor, ``out=``, and every item assignment to
    anything but a name annotated as a dictionary or list."""
    containers = {
        ast.unparse(node.target)
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign)
        and ast.unparse(node.annotation).startswith(("dict[", "list["))
    }
    writes = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if name.endswith("_") and not name.endswith("__"):
                writes.append(ast.unparse(node))
            writes += [ast.unparse(node) for word in node.keywords if word.arg == "out"]
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AugAssign):
            targets = [node.target]
        for target in targets:
            for part in ast.walk(target):
                if isinstance(part, ast.Subscript) and ast.unparse(part.value) not in containers:
                    writes.append(ast.unparse(node))
    return writes


def test_I2_one_module_writes_tensors_in_place() -> None:
    writers = {path.name for path in SOURCES if in_place_writes(ast.parse(path.read_text()))}
    assert writers == {"patch.py"}


@pytest.mark.parametrize(
    "source",
    ["x.copy_(y)", "x[0] = y", "x[0] += y", "torch.add(x, y, out=z)", "a, x[1] = y", "x.mul_(2)"],
)
def test_I2_the_search_for_writes_finds_them(source: str) -> None:
    assert in_place_writes(ast.parse(source))


@pytest.mark.parametrize("source", ["x = y", "x: dict[str, int] = {}\nx['a'] = 1", "x.__init__()"])
def test_I2_the_search_for_writes_finds_nothing_else(source: str) -> None:
    assert not in_place_writes(ast.parse(source))


def stored_by(kernel: ast.FunctionDef, others: dict[str, ast.FunctionDef]) -> set[str]:
    """Names of the arguments that a Triton kernel stores into, itself or by another function,
    whatever it calls their addresses.
    """
    names = [argument.arg for argument in kernel.args.args]
    stands_for = {name: {name} for name in names}

    def addressed(node: ast.AST) -> set[str]:
        if isinstance(node, ast.Name):
            return stands_for.get(node.id, set())
        if isinstance(node, ast.Call):  # what is loaded, or an index
            return set()
        return set().union(*map(addressed, ast.iter_child_nodes(node)))

    for node in ast.walk(kernel):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            stands_for[name] = stands_for.get(name, set()) | addressed(node.value)
    stored = set()
    for node in ast.walk(kernel):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.startswith(("tl.store", "tl.atomic")):
                stored |= addressed(node.args[0])
            elif called in others:
                inner = others[called]
                written = stored_by(inner, others)
                for argument, passed in zip(inner.args.args, node.args, strict=False):
                    if argument.arg in written:
                        stored |= addressed(passed)
    return stored


def functions_of(*sources: str) -> dict[str, ast.FunctionDef]:
    found = [node for source in sources for node in ast.parse(source).body]
    return {node.name: node for node in found if isinstance(node, ast.FunctionDef)}


def test_I2_one_kernel_stores_into_the_memory() -> None:
    """The patch's, into all of it. An argument that is the memory's has its name."""
    memory = {*State._fields, *(f"cursor_{name}" for name in Cursor._fields)}
    kernels = functions_of(
        *(path.read_text() for path in SOURCES if path.name.endswith("_kernels.py"))
    )
    storing = {name: stored_by(kernel, kernels) & memory for name, kernel in kernels.items()}
    assert {name: stored for name, stored in storing.items() if stored} == {"carry_out": memory}


@pytest.mark.parametrize(
    ("body", "stored"),
    [
        ("tl.store(keys + i, 0)", {"keys"}),
        ("to = keys + i * 3\n to = to + 1\n tl.store(to + 4, 0)", {"keys"}),
        ("k = tl.load(keys + i)\n tl.store(out + k, k)", {"out"}),
        ("inner(out, keys + i)", {"keys"}),
        ("tl.atomic_add(keys, 1)", {"keys"}),
        ("i = tl.load(keys)", set()),
    ],
)
def test_I2_the_search_for_stores_finds_them(body: str, stored: set[str]) -> None:
    kernels = functions_of(
        f"def outer(keys, out):\n {body}", "def inner(a, b):\n tl.store(b, tl.load(a))"
    )
    assert stored_by(kernels["outer"], kernels) == stored


def test_I2_brain_writes_no_state_tensor() -> None:
    """``brain/`` builds tensors of its own, but never writes into a state or a cursor."""
    for path in sorted(Path(inspect.getfile(brain)).parent.rglob("*.py")):
        for write in in_place_writes(ast.parse(path.read_text())):
            written = write.split("=")[0].split("_(")[0]
            assert "state." not in written, (path.name, write)
            assert "cursor." not in written, (path.name, write)


NEW = ("propose", "step T=4 bucket=96", "patch tick W=4")


@pytest.mark.parametrize("name", NEW)
def test_I2_only_the_patch_writes(name: str, warm_parrot: Brain) -> None:
    b = warm_parrot
    module = b.graphs.captured[name].modules[0]
    written = mutated_inputs(module)
    if name.startswith("patch"):
        everything = {f"L_arguments_0_{field}" for field in b.state._fields}
        assert written == everything | {f"L_arguments_1_{field}" for field in b.cursor._fields}
    else:
        assert written == set()
        assert aliased_inputs(module) == 0
