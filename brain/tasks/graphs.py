"""``task=graphs``: capture every graph and print how often each was compiled."""

import dataclasses
import json
from pathlib import Path

from brain.errors import Refused
from brain.opening import open_brain
from brain.terminal import capture_graphs, note
from conf.schema import Conf


def run(conf: Conf, run_dir: Path) -> None:
    """Prints every graph with its number of compilations; writes ``graphs.json``. Uses the compiled
    engine, whatever ``engine`` is. Raises Refused if not every graph was compiled exactly once.
    """
    engine = dataclasses.replace(conf.engine, captured=True, native=conf.engine.native is not False)
    note(f"loading {conf.model.name} …")
    brain = open_brain(dataclasses.replace(conf, engine=engine))
    capture_graphs(brain.graphs)
    rows = [
        {
            "name": graph.name,
            "compilations": graph.compilations,
            "seconds": round(graph.seconds, 2),
            "nodes": sum(len(module.graph.nodes) for module in graph.modules),
        }
        for graph in brain.graphs.captured.values()
    ]
    print(f"{'graph':<28} {'compilations':>12} {'seconds':>8} {'nodes':>6}")
    for row in rows:
        print(f"{row['name']:<28} {row['compilations']:>12} {row['seconds']:>8} {row['nodes']:>6}")
    expected = brain.graphs.expected()
    total = sum(graph.compilations for graph in brain.graphs.captured.values())
    print(f"{len(rows)} graphs, {total} compilations, {len(expected)} expected")
    (run_dir / "graphs.json").write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
    if {row["name"] for row in rows} != set(expected) or total != len(expected):
        raise Refused(f"{total} compilations of {len(rows)} graphs, expected {len(expected)}")
