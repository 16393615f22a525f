"""How time and memory of `attribute` grow, and how much memory was predicted.

python tests/benchmarks/growth.py                                # a table
python tests/benchmarks/growth.py --figure docs/growth.png       # and the same as a figure
python tests/benchmarks/growth.py --axis heads

Predicted: what `relp.plan` says of a model of which there is the configuration alone. Measured: how
far the memory of a process of its own rises in one call, in which freed memory goes back at once.
Both are without the weights. Times are of another call, in which memory is kept as usual.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from ctypes import CDLL
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from time import process_time
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
import typer
from gpu import Shape, llama
from transformers import GPT2Config

from circuits.draw.template import BENEATH, CATEGORIES, SHAPES, framed, panels
from relp import DEEPLIFT, RELP, Rules, attribute, plan
from relp.bridge import Room
from relp.bridge.memory import Plan
from tasks.zoo.outline import outline

CALLS: dict[str, tuple[str, Rules]] = {
    "edges, RELP": ("edge", RELP),
    "edges, DEEPLIFT": ("edge", DEEPLIFT),
    "nodes, RELP": ("node", RELP),
}
MACHINE = Room(16 * 10**9, paced=True)
"""What is left where it is measured; more than any of it takes."""
RIGHT = 0.2
"""Predictions within this are right."""
MB = 1e6
LIBC = CDLL("libc.so.6")
TRIM, MMAP = -1, -3
"""glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD: up to what it keeps freed memory for itself."""


@dataclass(frozen=True)
class Run:
    """A point on one of the axes."""

    axis: str
    shape: Shape
    pairs: int = 8
    positions: int = 16
    room: Room = MACHINE

    @property
    def about(self) -> dict[str, Any]:
        """What a row says of it."""
        config = self.shape.config
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        return {"varies": self.axis, "model": self.shape.name,
                "pairs x positions x layers x heads":
                f"{self.pairs} x {self.positions} x {layers} x {heads}"}  # fmt: skip

    def at(self, size: float) -> float:
        """Where it is on its axis."""
        config = self.shape.config
        places = {"pairs": self.pairs, "positions": self.positions, "size": size,
                  "layers": config.num_hidden_layers,
                  "heads": config.num_attention_heads}  # fmt: skip
        return places[self.axis]


def smollm2(layers: int = 8, heads: int = 9) -> Shape:
    """SmolLM2's width, with other layers or heads; a third as many keys and values."""
    config = llama(576, 1536, layers, heads, heads // 3, 49152, tied=True)
    return Shape(f"SmolLM2, {layers} layers", config, "ioi-llama")


GPT2 = Shape("GPT-2 small", GPT2Config(), "ioi-gpt2")
ONE_B = Shape("Llama-3.2-1B", llama(2048, 8192, 16, 32, 8, 128256, tied=True), "ioi-llama")
EIGHT_B = Shape(
    "Llama-3.1-8B, bfloat16", llama(4096, 14336, 32, 32, 8, 128256, tied=False), "ioi-llama",
    torch.bfloat16,
)  # fmt: skip
RUNS = (
    *(Run("pairs", smollm2(), pairs=n) for n in (8, 16, 32, 64)),
    *(Run("positions", smollm2(), 2, n) for n in (16, 64, 256, 512)),
    *(Run("layers", smollm2(layers=n)) for n in (4, 8, 16, 30)),
    *(Run("heads", smollm2(heads=n)) for n in (9, 18, 36)),
    *(Run("size", shape, 2) for shape in (smollm2(), GPT2, smollm2(layers=30), ONE_B)),
)
AHEAD = (
    Run("CPU, 64 GB left", EIGHT_B, 8, 64, Room(64 * 10**9, paced=True)),
    Run("GPU, 64 GB left", EIGHT_B, 8, 64, Room(64 * 10**9, paced=False)),
    Run("CPU, 64 GB left", EIGHT_B, 1, 2048, Room(64 * 10**9, paced=True)),
    Run("CPU, 32 GB left", EIGHT_B, 1, 2048, Room(32 * 10**9, paced=True)),
    Run("GPU, 64 GB left", EIGHT_B, 1, 2048, Room(64 * 10**9, paced=False)),
    Run("GPU, 8 GB left", EIGHT_B, 1, 2048, Room(8 * 10**9, paced=False)),
)
"""What is predicted alone."""


def main(axis: str = "", figure: Path | None = None) -> None:
    """Prints the table, and what is predicted where nothing is measured.

    `axis`: one of them alone; `figure`: where to write one, as .png.
    """
    runs = [run for run in RUNS if axis in ("", run.axis)]
    # forked from a process that has read no model, and once for each
    with get_context("fork").Pool(1, maxtasksperchild=1) as processes:
        plans = processes.map(predicted, runs, 1)
        rows = [row for some in processes.imap(measured, zip(runs, plans, strict=True), 1)
                for row in told(some)]  # fmt: skip
        ahead = processes.map(predicted, AHEAD, 1) if not axis else []
    table = pd.DataFrame(rows)
    print(f"\nmeasured\n{shown(table)}")
    right = table["predicted / measured"].between(1 - RIGHT, 1 + RIGHT)
    print(f"\nwithin {RIGHT:.0%}: {right.sum()} of {len(table)} rows, {right.mean():.0%}")
    if ahead:
        far = [{"call": call} | run.about | {"note": how.note}
               for run, plans in zip(AHEAD, ahead, strict=True)
               for call, how in zip(CALLS, plans, strict=True)]  # fmt: skip
        print(f"\npredicted alone\n{shown(pd.DataFrame(far))}")
    if figure is not None:
        drawn(table).write_image(figure, width=1000, scale=2)


def told(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same, said as soon as they are there."""
    for row in rows:
        print(*(f"{v:.3g}" if isinstance(v, float) else v for v in row.values()), flush=True)
    return rows


def shown(table: pd.DataFrame) -> str:
    return table.drop(columns="at", errors="ignore").to_string(
        index=False, float_format=lambda v: f"{v:.2f}" if v < 100 else f"{v:,.0f}"
    )


def predicted(run: Run) -> list[Plan]:
    """How each call would run, from the configuration."""
    with tempfile.TemporaryDirectory() as folder:
        run.shape.config.save_pretrained(folder)
        model = outline(folder, dtype=str(run.shape.dtype).removeprefix("torch."))
    task = run.shape.task(run.pairs, run.positions)
    return [plan(model, task, rules=rules, level=level, room=run.room)
            for level, rules in CALLS.values()]  # fmt: skip


def measured(asked: tuple[Run, list[Plan]]) -> list[dict[str, Any]]:
    """Time and memory of each call, beside what was predicted; for a process of its own."""
    run, plans = asked
    model = run.shape.bridge(run.shape.plain("cpu"), "cpu")
    weights = sum(p.numel() for p in model.original_model.parameters())
    task, tiny = run.shape.task(run.pairs, run.positions), run.shape.task(2, 4)

    def call(number: int, *, some: Any = task) -> None:
        level, rules = list(CALLS.values())[number]
        attribute(model, some, rules=rules, level=level, batch_size=plans[number].pairs,
                  progress=False)  # fmt: skip

    for number in range(len(plans)):
        call(number, some=tiny)  # what comes with the first call is there then
    keep_freed(0, 1 << 16)
    peaks = [risen(partial(call, number)) for number in range(len(plans))]
    keep_freed(1 << 26, 1 << 25)  # what a process comes to that has run for a while
    rows = []
    for number, (name, how, peak) in enumerate(zip(CALLS, plans, peaks, strict=True)):
        begin = process_time()
        call(number)
        rows.append(
            {"call": name}
            | run.about
            | {"batches": -(-run.pairs // how.pairs), "CPU s": process_time() - begin,
               "predicted MB": how.bytes / MB, "measured MB": peak / MB,
               "predicted / measured": how.bytes / peak, "at": run.at(weights / MB)}
        )  # fmt: skip
    return rows


def keep_freed(trim: int, mmap: int) -> None:
    """Freed memory of up to this many bytes is kept, of pieces smaller than `mmap`."""
    assert LIBC.mallopt(TRIM, trim) and LIBC.mallopt(MMAP, mmap)


def risen(work: Callable[[], None]) -> int:
    """By how many bytes the memory of this process rises in a call."""
    gc.collect()
    LIBC.malloc_trim(0)  # or the call would fill gaps that are counted already
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is what is there now
    before = held("VmRSS")
    work()
    return held("VmHWM") - before


def held(name: str) -> int:
    """Bytes of this process: VmRSS are those now, VmHWM the most there were."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


# -- the figure ------------------------------------------------------------------------------------

AXES = {"pairs": "pairs", "positions": "positions", "layers": "layers",
        "heads": "heads in a layer", "size": "million parameters"}  # fmt: skip
FIXED = {"pairs": "16 positions, 8 layers", "positions": "2 pairs, 8 layers",
         "layers": "8 pairs of 16", "heads": "8 pairs of 16, 8 layers",
         "size": "2 pairs of 16"}  # fmt: skip


def drawn(table: pd.DataFrame) -> go.Figure:
    """Time above, memory below, against each axis."""
    axes = list(dict.fromkeys(table["varies"]))
    titles = [[f"{what} by {a}", FIXED[a]] for what in ("CPU s", "MB") for a in axes]
    figure, plot, above = panels(titles, len(axes), plot=190, between=50, gap=0.045)
    for (axis, call), rows in table.groupby(["varies", "call"], sort=False):
        at = {"col": axes.index(axis) + 1}
        rows = rows.sort_values("at")
        for trace in traces(rows, list(CALLS).index(call), named=axis == axes[0]):
            figure.add_trace(trace[0], row=trace[1], **at)
    for column, axis in enumerate(axes, 1):
        figure.update_xaxes(title=AXES[axis], row=2, col=column)
        figure.update_xaxes(rangemode="tozero", col=column)
        if axis == "size":  # up to a billion
            figure.update_xaxes(type="log", dtick=1, col=column)
    figure.update_yaxes(rangemode="tozero")
    return framed(
        figure, "Time and memory of attribute, and the memory that was predicted",
        "Beside the weights, one thread. Lines: predicted. Marks: measured.",
        plot=plot, above=above, below=84,
    ).update_layout(legend={**BENEATH, "entrywidth": 0.33})  # fmt: skip


def traces(rows: pd.DataFrame, number: int, *, named: bool) -> list[tuple[go.Scatter, int]]:
    """Of one call on one axis, with the row of panels that each is in."""
    look = {"color": CATEGORIES[number]}
    marks = {"mode": "markers", "marker": look | {"symbol": SHAPES[number], "size": 8}}
    line = {"mode": "lines", "line": look | {"width": 1.5}, "showlegend": False}
    name = list(CALLS)[number]
    return [
        (go.Scatter(x=rows["at"], y=rows["CPU s"], name=name, showlegend=named, **marks), 1),
        (go.Scatter(x=rows["at"], y=rows["predicted MB"], **line), 2),
        (go.Scatter(x=rows["at"], y=rows["measured MB"], showlegend=False, **marks), 2),
    ]


if __name__ == "__main__":
    typer.run(main)
