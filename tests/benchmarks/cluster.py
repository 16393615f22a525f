"""What a cluster costs: the same work by one process, and by two workers on the same machine.

python tests/benchmarks/cluster.py                       # ioi-gpt2
python tests/benchmarks/cluster.py --model smollm2-135m --pairs 8
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

import pandas as pd
import torch
import typer

from circuits import acdc, evaluate, patch, top
from circuits.engines import RayEngine
from circuits.exact import Cell, measure
from relp import GRADIENT, RELP, attribute
from tasks import ioi, zoo

torch.set_num_threads(1)
QUIET: dict[str, Any] = {"progress": False}


def main(model: str = "ioi-gpt2", pairs: int = 48, workers: int = 2, edges: int = 200) -> None:
    """Prints the table; CPU seconds are those of all processes that work."""
    bridge = zoo.load(model)
    task = ioi(bridge.tokenizer, pairs=pairs, seed=0)
    scores = [attribute(bridge, task, rules=r, level="edge", **QUIET) for r in (RELP, GRADIENT)]
    graph, tau = top(scores[0], edges=edges), 0.01 * float(scores[0].gap.mean())
    layers = range(0, len(bridge.blocks), max(1, len(bridge.blocks) // 4))
    heads = [f"L{layer}.{kind}" for layer in layers for kind in ("attn", "mlp")]
    work: dict[str, Callable[[Any], Any]] = {
        "patch": lambda engine: patch(bridge, task, components=heads if len(bridge.blocks) > 8 else
                                      None, engine=engine, **QUIET),
        "evaluate": lambda engine: evaluate(bridge, task, scores, engine=engine, **QUIET),
        "acdc": lambda engine: acdc(bridge, task, tau=tau, graph=graph, engine=engine, **QUIET),
    }  # fmt: skip
    with TemporaryDirectory() as folder:

        def recipe() -> Any:
            (Path(folder) / str(os.getpid())).touch()
            return zoo.load(model)

        def cpu() -> float:
            """Of this process and the workers."""
            ticks = os.sysconf("SC_CLK_TCK")
            stats = [Path(f"/proc/{p.name}/stat").read_text() for p in Path(folder).iterdir()]
            fields = [stat.rpartition(")")[2].split() for stat in stats]
            return process_time() + sum(int(f[11]) + int(f[12]) for f in fields) / ticks

        with RayEngine(recipe, workers=workers, threads=1) as engine:
            begun = perf_counter()
            measure(bridge, task.select([0, 1]), [Cell("L0.mlp")], engine=engine, **QUIET)
            started = perf_counter() - begun
            rows = []
            for name, run in work.items():
                row: dict[str, Any] = {"": name}
                for who, by in (("one process", None), (f"{workers} workers", engine)):
                    wall, spent = perf_counter(), cpu()
                    run(by)
                    row |= {f"{who}, s": perf_counter() - wall, f"{who}, CPU s": cpu() - spent}
                rows.append(row)
    print(f"{bridge.cfg.model_name}, {pairs} pairs, {os.cpu_count()} cores; start {started:.0f} s")
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.1f}".format))


if __name__ == "__main__":
    typer.run(main)
