"""Times and memory in the shapes of two models, side by side with the floor and with budgets.

python tests/benchmarks/budget.py            # what each call costs, and its budget
python tests/benchmarks/budget.py --shape smollm2
python tests/benchmarks/budget.py --peers    # and what TransformerLens takes for the same
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from typing import Any

import pandas as pd
import torch
import typer
from floor import (
    SHAPES,
    bridge,
    floor,
    forward_and_backward,
    in_turn,
    plain_model,
    random_task,
    seconds,
)
from transformer_lens import patching
from transformer_lens.tools.analysis.attribution_patching import (
    EdgeAttributionConfig,
    attribution_patch,
)

from circuits import evaluate, patch
from circuits.judge.evaluation import SIZES
from relp import DEEPLIFT, GRADIENT, PRESETS, RELP, Rules, attribute, preset, propagate
from tasks import Task

BUDGETS = {"node": (1.0, 1.15, 1.7), "edge": (1.3, 1.6, 4.5)}
"""Rules of one run, of two, and PARTWAY; for its edges half of what EAP-IG takes with five steps.
"""
CIRCUIT, IN_GRID, CELL = 1.5, 0.7, 0.04
SWEEP_SPEEDUP = 7.0
PEAK_GB = 1.5
PER_LAYER = 2
"""Heads of a layer in the patching sweep."""


def main(shape: str = "", rounds: int = 3, peers: bool = False) -> None:
    """Prints the tables.

    `shape`: `gpt2` or `smollm2`, both if empty; `rounds`: how often each time is taken.
    """
    shapes = [shape] if shape else list(SHAPES)
    # first, while this process is small: a child's peak starts at what its parent held
    runs = [(rules.name, name) for name in shapes for rules in (RELP, DEEPLIFT)]
    with get_context("fork").Pool(1, maxtasksperchild=1) as processes:
        cells = pd.DataFrame(processes.starmap(cell, runs, 1))
    show(f"first run in a process of its own; budget of edges: {PEAK_GB} GB", cells)
    for name in shapes:
        model, plain, task = bridge(name), plain_model(name), random_task(name)
        base = floor(plain, task)
        tables = [attribution(model, task, base, rounds), exact(model, task, base, rounds)]
        show(f"{name}: multiples of the floor", pd.concat(tables))
        table = overhead(plain, task, rounds)
        show(f"{name}: propagate, multiples of the same without", table)
        if peers:
            table = transformer_lens(model, plain, task)
            show(f"{name}: TransformerLens, multiples of the floor", table)
            show(f"{name}: patching heads by position", sweep(model, task))


def show(title: str, table: pd.DataFrame) -> None:
    """One table on the terminal."""
    print(f"\n{title}\n{table.to_string(float_format='{:.2f}'.format)}", flush=True)


def cell(rules: str, shape: str) -> dict[str, Any]:
    """Time and peak memory of edge scores; for a process of its own."""
    model, task = bridge(shape), random_task(shape)
    weights = sum(p.numel() * p.element_size() for p in model.original_model.parameters())
    cpu, _ = seconds(attribution_of(model, task, preset(rules), "edge"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    return {"shape": shape, "rules": rules, "CPU s": cpu, "peak GB": peak,
            "weights GB": weights / 2**30}  # fmt: skip


def attribution_of(model: Any, task: Task, rules: Rules, level: str) -> Callable[[], Any]:
    return lambda: attribute(model, task, rules=rules, level=level, progress=False)


def attribution(model: Any, task: Task, base: Any, rounds: int) -> pd.DataFrame:
    """Nodes and edges under each preset."""
    calls, budgets = {}, {}
    for level, (one, two, partway) in BUDGETS.items():
        for rules in PRESETS.values():
            row = f"{level}s {rules.name}"
            calls[row] = attribution_of(model, task, rules, level)
            budgets[row] = partway if rules.partway else two if rules.needs_reference else one
    return judged(in_turn(base, calls, rounds=rounds), budgets)


def exact(model: Any, task: Task, base: Any, rounds: int) -> pd.DataFrame:
    """One cell of a sweep of heads by position; one circuit alone, and of a grid of ten."""
    scores = attribute(model, task, rules=GRADIENT, level="edge", progress=False)
    names = heads(model)

    def grid(sizes: tuple[float, ...]) -> pd.DataFrame:
        work = partial(evaluate, model, task, scores, sizes=sizes, random=0, progress=False)
        return in_turn(base, {f"a circuit, {len(sizes)} at once": work}, rounds=rounds) / len(sizes)

    cells = {"a cell": lambda: patch(model, task, components=names, progress=False)}
    count = len(names) * task.clean.shape[1]
    table = pd.concat([grid(SIZES[4:5]), grid(SIZES),
                       in_turn(base, cells, rounds=rounds) / count])  # fmt: skip
    return judged(table, dict(zip(table.index, (CIRCUIT, IN_GRID, CELL), strict=True)))


def heads(model: Any) -> list[str]:
    """Some in the first, the middle and the last layer: cells cost less the later they start."""
    last = len(model.blocks) - 1
    return [f"L{layer}H{head}" for layer in (0, last // 2 + 1, last) for head in range(PER_LAYER)]


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

    levels = ["node"]
    try:
        theirs("edge")
    except ValueError as error:  # keys and values that several heads share
        print(f"TransformerLens, edges: {error}")
    else:
        levels.append("edge")
    calls = {f"{level}s": lambda level=level: theirs(level) for level in levels}
    table = in_turn(floor(plain, task), calls, rounds=1)
    return (table * len(task)).rename(index="{}, 1 pair timed, all scaled".format)


def sweep(model: Any, task: Task) -> pd.DataFrame:
    """Seconds per cell, and that both give the same numbers."""
    names, positions = heads(model), task.clean.shape[1]
    firsts = [(int(layer[1:]), int(head)) for layer, head in (n.split("H") for n in names)]
    sample = [(layer, pos, head) for layer, head in firsts[::PER_LAYER]
              for pos in (0, positions // 2, positions - 1)]  # fmt: skip
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
