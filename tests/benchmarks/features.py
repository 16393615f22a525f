"""What scores of features are worth: against exact effects, and as circuits, by method.

python tests/benchmarks/features.py                                   # the models that ship, ioi
python tests/benchmarks/features.py --task subject_verb_simple --model smollm2-135m
python tests/benchmarks/features.py --figure docs/features.png        # and the curves as a figure

Dictionaries: `tasks.zoo.dictionaries(model)`, which `python -m tasks.zoo.dictionaries` has trained.
Tables for each model. Single features: agreement of scores with `patch`, feature by feature and
position by position (r, Spearman's rho, share of right signs, relative error; the features with the
largest score of any method). Circuits: features of one half of the pairs by |score|, judged on the
other half, with the errors of the dictionaries kept and ablated, by two ablations; and how far each
method is from IG there, with the p-value of a paired test over pairs. Time: CPU time as a
multiple of two forward passes and one backward of the plain model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
import typer
from floor import floor

from circuits import agreement, evaluate_features, patch
from circuits.draw.template import BENEATH, CATEGORIES, framed, panels
from relp import GRADIENT, PRESETS, NodeScores, attribute
from relp.dictionaries import load_dictionary
from tasks import registry, zoo
from tasks.zoo.shelf import shipped

torch.set_num_threads(1)

STEPS = 10
METHODS: dict[str, dict[str, Any]] = {
    "GRADIENT": {"rules": GRADIENT},
    f"IG-{STEPS} of each site": {"rules": GRADIENT, "steps": STEPS, "path": "site"},
} | {name: {"rules": rules} for name, rules in PRESETS.items() if rules is not GRADIENT}
DRAWN = ("GRADIENT", f"IG-{STEPS} of each site", "RELP", "DEEPLIFT", "PARTWAY", "random")
"""What the figure shows; more lines could not be told apart."""
SIZES = (20, 50, 100, 150, 200, 300, 400, 500, 700, 1000)
ABLATIONS = ("patch", "mean")
BASELINE = f"IG-{STEPS} of each site"
FEW = 8
"""Features of a site that are patched one by one."""


def main(
    model: str = "",
    task: str = "ioi",
    pairs: int = 16,
    figure: Path | None = None,
) -> None:
    """Prints the tables. `model`: the shipped ones if empty."""
    warnings.filterwarnings("ignore", message=".*hangs on.*")
    curves = {}
    for name in [model] if model else shipped():
        curves |= {(name, kind): table for kind, table in measured(name, task, pairs).items()}
    if figure is not None:
        drawn(curves, task).write_image(figure, width=1000, scale=2)


def measured(name: str, task: str, pairs: int) -> dict[str, pd.DataFrame]:
    """Prints the tables of one model, and gives its curves by ablation."""
    model = zoo.load(name)
    features = {site: load_dictionary(path) for site, path in zoo.dictionaries(name).items()}
    make = registry.builder(task)
    found_on, judged_on = (make(model.tokenizer, pairs=pairs, seed=seed) for seed in (0, 1))
    print(f"\n{name}, {task}, {pairs} + {pairs} pairs, dictionaries of {', '.join(features)}")
    unit = seconds(floor(model.original_model, found_on))
    scores, times = {}, {}
    for label, options in METHODS.items():
        begin = process_time()
        scores[label] = of_features(model, found_on, features, **options).renamed(label)
        times[f"features, {label}"] = (process_time() - begin) / unit
    show("single features", singles(model, found_on, features, scores))
    curves = {}
    for ablation in ABLATIONS:
        table = evaluate_features(model, judged_on, list(scores.values()), features=features,
                                  sizes=SIZES, ablation=ablation, against=BASELINE,
                                  progress=False)  # fmt: skip
        curves[ablation] = table
        for measure in ("faithfulness", "completeness"):
            show(f"circuits, {ablation} ablation: {measure}", pivoted(table, measure))
        title = f"circuits, {ablation} ablation: faithfulness above that of {BASELINE} (p)"
        show(title, differences(table))
    edges = partial(attribute, model, found_on, level="edge", features=features, keep=FEW,
                    progress=False)  # fmt: skip
    times[f"edges between {FEW} of each site, RELP"] = seconds(edges) / unit
    show("time, multiples of the floor", pd.Series(times).to_frame("CPU"))
    return curves


def of_features(model: Any, task: Any, features: Any, **options: Any) -> NodeScores:
    return attribute(model, task, features=features, components="feature", progress=False,
                     **options)  # fmt: skip


def singles(model: Any, task: Any, features: Any, scores: dict[str, NodeScores]) -> pd.DataFrame:
    """Agreement of each method with exact effects, of the features that any has among the first."""
    chosen = list(dict.fromkeys(name for s in scores.values() for name in strongest(s)))
    some = task.select(range(min(4, len(task))))
    again = [of_features(model, some, features, **options).renamed(label)
             for label, options in METHODS.items()]  # fmt: skip
    chosen = [name for name in chosen if all(name in s.components for s in again)]
    effect = patch(model, some, components=chosen, features=features, progress=False)
    table = agreement([parts(s, chosen) for s in again], effect)
    columns = ["pearson", "spearman", "signs", "relative_error", "hangs", "cells"]
    return table[table.kind == "feature"].set_index("rules")[columns]


def strongest(scores: NodeScores) -> Iterator[str]:
    """The first of each site by |score|."""
    names, sizes = scores.by_component()
    table = pd.DataFrame({"name": names, "size": abs(sizes.numpy())})
    table = table[table.name.str.contains("/f")]
    table["site"] = table.name.str.partition("/")[0]
    yield from table.sort_values("size", ascending=False).groupby("site").head(FEW).name


def parts(scores: NodeScores, names: list[str]) -> NodeScores:
    """The scores of some components alone."""
    at = [scores.components.index(name) for name in names]
    return replace(scores, components=tuple(scores.components[i] for i in at),
                   nodes=scores.nodes[:, at])  # fmt: skip


def pivoted(table: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Methods by number of features, with and without errors; in brackets the 95 % interval."""
    low, high = {"faithfulness": ("low", "high")}.get(
        measure, (f"{measure}_low", f"{measure}_high")
    )
    text = [f"{a:.2f} ({b:.2f} to {c:.2f})"
            for a, b, c in zip(table[measure], table[low], table[high], strict=True)]  # fmt: skip
    shown = table.assign(text=text)
    return shown.pivot(index=["errors", "features"], columns="rules", values="text")


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """As `pivoted`: how far methods are from `BASELINE`, and in brackets how likely by chance."""
    pairs = zip(table.difference, table.p_value, strict=True)
    shown = table.assign(text=[f"{d:+.2f} ({p:.4f})" for d, p in pairs])
    shown = shown[shown.rules != BASELINE]
    return shown.pivot(index=["errors", "features"], columns="rules", values="text")


def seconds(work: Callable[[], Any]) -> float:
    begin = process_time()
    work()
    return process_time() - begin


def show(title: str, table: pd.DataFrame) -> None:
    print(f"\n{title}\n{table.to_string(float_format='{:.2f}'.format)}", flush=True)


def drawn(curves: dict[tuple[str, str], pd.DataFrame], task: str) -> go.Figure:
    """Faithfulness by number of features: a column for each model and ablation."""
    titles = [[name, f"{ablation} ablation, errors {errors}"]
              for errors in ("in", "out") for name, ablation in curves]  # fmt: skip
    figure, plot, above = panels(titles, len(curves), plot=190, between=60, gap=0.05)
    for column, table in enumerate(curves.values(), 1):
        for row, errors in enumerate(("in", "out"), 1):
            part = table[table.errors == errors]
            for number, rules in enumerate(DRAWN):
                line = part[part.rules == rules]
                color = CATEGORIES[number % len(CATEGORIES)]
                figure.add_trace(
                    go.Scatter(x=line.features, y=line.faithfulness, name=rules, mode="lines",
                               line={"color": color}, showlegend=row == column == 1),
                    row=row, col=column,
                )  # fmt: skip
            figure.update_xaxes(rangemode="tozero", row=row, col=column)
    figure.update_xaxes(title="features kept", row=2)
    return framed(
        figure, f"Faithfulness of circuits of features: {task}",
        "By |score| on other pairs than those that judge.", plot=plot, above=above, below=84,
    ).update_layout(legend={**BENEATH, "entrywidth": 0.25})  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
