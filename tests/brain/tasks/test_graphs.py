"""``task=graphs`` compiles every graph and gives an account of it."""

from pathlib import Path

from processes import call


def test_graphs_prints_an_account_that_comes_out(tmp_path: Path, tiny_folder: Path) -> None:
    done = call(tmp_path, tiny_folder, "task=graphs", "capacity=16", "engine.widths=[1,4]")
    assert done.stdout.splitlines()[-1] == "6 graphs, 6 compilations, 6 expected"
