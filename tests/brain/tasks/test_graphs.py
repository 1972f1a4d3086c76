"""``task=graphs`` compiles every graph and gives an account of it."""

from pathlib import Path

from fixture_types import CommandLine
from processes import command


def test_graphs_prints_an_account_that_comes_out(
    command_line: CommandLine, tiny_folder: Path
) -> None:
    # In this process, where importing the compiler is done.
    arguments = command(tiny_folder, "task=graphs", "capacity=16", "engine.widths=[1,4]")[3:]
    status, out, _ = command_line(*arguments)
    assert status == 0
    assert out.splitlines()[-1] == "6 graphs, 6 compilations, 6 expected"
