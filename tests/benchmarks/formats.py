"""What each file format costs: seconds to save and to load a circuit of a real model, and its size.

    python tests/benchmarks/formats.py [MODEL] [EDGES]

The circuit is the strongest edges of two IOI pairs, as RELP scores them; by position for
attribution graphs, which are for those. `dot` and images need Graphviz, kaleido and a browser: what
is not installed is left out. A last table is of the whole graph, all edges of the model. Each
number is of one call; it says how busy the machine is, as those of a busy one are too large.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import networkx as nx

from circuits import assemble, load, save, top
from circuits.choices import GRAPH, MIB, SUFFIXES
from circuits.graph import size
from relp import RELP, attribute
from tasks import ioi, zoo

IMAGES = (".pdf", ".png")
DRAWN = (".svg", ".html", ".tex", ".mmd", *IMAGES, GRAPH)
"""What is for circuits: a whole model cannot be drawn, or not by position."""


def table(circuit: nx.MultiDiGraph, by_position: nx.MultiDiGraph, model: Any, folder: Path) -> None:
    """A row for each format, and their sum."""
    busy = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(f"{size(circuit):,} edges of {circuit.graph['model']}, {busy}")
    print("suffix        save s  load s        kB")
    spent = 0.0
    for suffix in SUFFIXES:
        if (suffix in IMAGES and find_spec("kaleido") is None) or (
            suffix in DRAWN and size(circuit) > 2000
        ):
            continue
        path, told = folder / f"c{suffix}", {"model": model} if suffix == MIB else {}
        begun = perf_counter()
        save(by_position if suffix == GRAPH else circuit, path, **told)
        saved = perf_counter() - begun
        try:
            begun = perf_counter()
            load(path)
            loaded = f"{perf_counter() - begun:7.2f}"
        except ValueError:  # it can only be written
            loaded = 7 * " "
        spent += saved
        print(f"{suffix:12}{saved:8.2f} {loaded} {path.stat().st_size / 1000:9,.0f}")
        if suffix == ".dot" and size(circuit) <= 2000 and shutil.which("dot"):
            begun = perf_counter()
            drawn = ["dot", "-Tsvg", str(path), "-o", str(folder / "dot.svg")]
            said = subprocess.run(drawn, check=True, capture_output=True, text=True).stderr
            print(
                f"  dot -Tsvg {perf_counter() - begun:8.2f}  it says: {said.strip() or 'nothing'}"
            )
    print(f"all         {spent:8.2f}\n")


def main(name: str = "smollm2-135m", edges: str = "200") -> None:
    """Scores the edges, then saves and loads."""
    model = zoo.load(name)
    task = ioi(model.tokenizer, pairs=2, seed=0)
    scores = attribute(model, task, rules=RELP, level="edge")
    placed = attribute(model, task, rules=RELP, level="edge", positions=True)
    with tempfile.TemporaryDirectory() as folder:
        circuit, by_position = (top(s, edges=int(edges)) for s in (scores, placed))
        table(circuit, by_position, model, Path(folder))
        table(assemble(scores), by_position, model, Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
