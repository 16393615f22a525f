"""Times and memory in the shape of GPT-2 small, side by side with the floor and with budgets.

python tests/benchmarks/budget.py            # what each call costs, and its budget
python tests/benchmarks/budget.py --peers    # and what TransformerLens takes for the same
python tests/benchmarks/budget.py --growth   # time and memory by pairs, positions and layers
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import pandas as pd
import torch
import typer
from floor import bridge, floor, forward_and_backward, in_turn, plain_model, random_task, seconds
from transformer_lens import patching
from transformer_lens.tools.analysis.attribution_patching import (
    EdgeAttributionConfig,
    attribution_patch,
)

from circuits import evaluate, patch
from relp import DEEPLIFT, GRADIENT, PRESETS, RELP, Rules, attribute, preset, propagate
from tasks import Task

SHAPE = {"pairs": 8, "positions": 16, "layers": 12}
GROWTH = {"pairs": (16, 32), "positions": (32, 64), "layers": (6, 24)}
SWEPT = (0, 6, 11)
"""Layers of the patching sweep: cells cost less the later they start, and these are their mean."""
SWEEP_SPEEDUP = 5.0
PEAK_GB = 1.5
TWO_BACKWARDS = {"node": 1.7, "edge": 4.5}
"""Of PARTWAY; for edges half of what EAP-IG takes with five steps."""


def main(rounds: int = 3, peers: bool = False, growth: bool = False) -> None:
    """Prints the tables; `rounds` is how often each time is taken."""
    # first, while this process is small: a child's peak starts at what its parent held
    shapes = [SHAPE] + [SHAPE | {k: v} for k, vs in GROWTH.items() for v in vs if growth]
    runs = [(r, level, shape) for r in (RELP, DEEPLIFT) for level in ("node", "edge")
            for shape in shapes if growth or level == "edge"]  # fmt: skip
    with get_context("fork").Pool(1, maxtasksperchild=1) as processes:
        cells = pd.DataFrame(processes.starmap(cell, [(r.name, *rest) for r, *rest in runs], 1))
    show(f"first run in a process of its own; budget of edges: {PEAK_GB} GB", cells)
    if growth:
        return
    model, plain, task = bridge(), plain_model(), random_task()
    base = floor(plain, task)
    show("multiples of the floor: attribution", attribution(model, task, base, rounds))
    show("multiples of the floor: ten circuits, each", circuits(model, task, base, rounds))
    show("multiples of forward and backward: propagate", overhead(plain, task, rounds))
    if peers:
        show("TransformerLens, multiples of the floor", transformer_lens(model, plain, task))
        show("patching heads by position", sweep(model, task))


def show(title: str, table: pd.DataFrame) -> None:
    """One table on the terminal."""
    print(f"\n{title}\n{table.to_string(float_format='{:.2f}'.format)}", flush=True)


def cell(rules: str, level: str, shape: dict[str, int]) -> dict[str, Any]:
    """Time and peak memory of one attribution; for a process of its own."""
    model, task = bridge(shape["layers"]), random_task(shape["pairs"], shape["positions"])
    weights = sum(p.numel() * p.element_size() for p in model.original_model.parameters())
    cpu, _ = seconds(attribution_of(model, task, preset(rules), level))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    return {"rules": rules, "level": level, **shape, "CPU s": cpu, "peak GB": peak,
            "weights GB": weights / 2**30}  # fmt: skip


def attribution_of(model: Any, task: Task, rules: Rules, level: str) -> Callable[[], Any]:
    return lambda: attribute(model, task, rules=rules, level=level, progress=False)


def attribution(model: Any, task: Task, base: Any, rounds: int) -> pd.DataFrame:
    """Nodes and edges under each preset."""
    calls, budgets = {}, {}
    for level, budget in (("node", 1.15), ("edge", 1.5)):
        for rules in PRESETS.values():
            calls[f"{level}s {rules.name}"] = attribution_of(model, task, rules, level)
            two = TWO_BACKWARDS[level] if rules.partway else 2.0
            budgets[f"{level}s {rules.name}"] = two if rules.needs_reference else budget
    return judged(in_turn(base, calls, rounds=rounds), budgets)


def circuits(model: Any, task: Task, base: Any, rounds: int) -> pd.DataFrame:
    """The grid of ten sizes for one set of scores."""
    scores = attribute(model, task, rules=GRADIENT, level="edge")
    grid = {"evaluate": lambda: evaluate(model, task, scores, random=0, progress=False)}
    return judged(in_turn(base, grid, rounds=rounds) / 10, {"evaluate": 1.5})


def overhead(plain: Any, task: Task, rounds: int) -> pd.DataFrame:
    """The same run of the plain model inside `propagate` and outside."""

    def inside(rules: Rules) -> None:
        x = plain.get_input_embeddings()(task.corrupt).detach().requires_grad_()
        with propagate(rules, root=plain) as report:
            metric = task.metric(plain(inputs_embeds=x).logits)
        if rules.needs_reference:
            with report.reference():
                task.metric(plain(inputs_embeds=plain.get_input_embeddings()(task.clean)).logits)
        torch.autograd.grad(metric.sum(), x)

    one_run = in_turn(
        lambda: forward_and_backward(plain, task), {"RELP": lambda: inside(RELP)}, rounds=rounds
    )
    two_runs = in_turn(floor(plain, task), {"DEEPLIFT": lambda: inside(DEEPLIFT)}, rounds=rounds)
    return judged(pd.concat([one_run, two_runs]), {"RELP": 1.15, "DEEPLIFT": 1.5})


def judged(table: pd.DataFrame, budgets: dict[str, float]) -> pd.DataFrame:
    """Adds each row's budget and whether it holds."""
    budget = pd.Series(budgets)
    return table.assign(budget=budget, holds=table["CPU ratio"] <= budget)


def transformer_lens(model: Any, plain: Any, task: Task) -> pd.DataFrame:
    """Its attribution of one pair (it runs them one by one), against the floor of the batch."""
    one = task.select(torch.tensor([0]))

    def theirs(level: str) -> None:
        attribution_patch(
            model, one.clean, one.corrupt, lambda logits: one.metric(logits)[0],
            EdgeAttributionConfig(granularity=level),  # type: ignore[arg-type]
        )  # fmt: skip

    calls = {f"{level}s": lambda level=level: theirs(level) for level in ("node", "edge")}
    table = in_turn(floor(plain, task), calls, rounds=1)
    return (table * len(task)).rename(index="{}, 1 pair timed, all scaled".format)


def sweep(model: Any, task: Task) -> pd.DataFrame:
    """Seconds per cell, and that both give the same numbers."""
    names = [f"L{layer}H{head}" for layer in SWEPT for head in range(12)]
    positions = task.clean.shape[1]
    sample = [(layer, pos, 3) for layer in SWEPT for pos in (0, positions // 2, positions - 1)]
    found: dict[str, Any] = {}

    def ours() -> None:
        found["ours"] = patch(model, task, components=names, progress=False)

    @torch.no_grad()
    def theirs() -> None:
        _, cache = model.run_with_cache(task.clean, names_filter=lambda n: n.endswith("hook_z"))
        found["theirs"] = patching.generic_activation_patch(
            model, task.corrupt, cache, lambda logits: task.metric(logits).mean(),
            patching.layer_pos_head_vector_patch_setter, "z",
            index_df=pd.DataFrame(sample, columns=["layer", "pos", "head_index"]),
        )  # fmt: skip

    per_cell = [seconds(theirs)[0] / len(sample), seconds(ours)[0] / (len(names) * positions)]
    effects = found["ours"]
    rows = [effects.components.index(f"L{layer}H{head}") for layer, _, head in sample]
    same = effects.nodes.mean(0)[rows, [pos for _, pos, _ in sample]] + effects.corrupt.mean()
    difference = float((same - found["theirs"]).abs().max())
    assert difference < 1e-5, difference
    table = pd.DataFrame({"cells": [len(sample), len(names) * positions],
                          "CPU ms per cell": [1e3 * s for s in per_cell]},
                         ["TransformerLens", "circuits.patch"])  # fmt: skip
    faster = per_cell[0] / per_cell[1]
    return table.assign(**{"times faster": [1.0, faster], "budget": [float("nan"), SWEEP_SPEEDUP],
                           "largest difference": f"{difference:.0e}"})  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
