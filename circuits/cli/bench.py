"""`relp bench`: all methods on known circuits and real tasks."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer
from rich.markup import escape

from circuits.cli.options import FEW, Device, DeviceMap, Dtype, Json, Seed
from circuits.cli.outputs import check_folder, written
from circuits.cli.screen import answering, print_table, records, say
from tasks import planted
from tasks.registry import TASKS
from tasks.zoo import shelf
from tasks.zoo.boot import check_model
from tasks.zoo.placement import Placement

__all__ = ["bench"]

SHORT = {
    "auroc": "AUC", "average_precision": "AP", "pearson": "r", "spearman": "ρ",
    "relative_error": "error", "node cost": "nodes", "edge cost": "edges",
}  # fmt: skip
"""Measures of a benchmark as the heads of its table."""


def bench(
    model: Annotated[
        list[str] | None,
        typer.Option(help="A further model, on all tasks that it can do; may be given again."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="A further method, module:function; or, of those that are there, only this. May "
            "be given again."
        ),
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(
            autocompletion=lambda: [*planted.names(), *TASKS],
            help="Only this planted circuit, or task on all models; may be given again.",
        ),
    ] = None,
    pairs: Annotated[int, typer.Option(min=2, help="Pairs of prompts of each case.")] = FEW,
    seed: Seed = 0,
    noise: Annotated[
        float, typer.Option(min=0, help="Of the planted circuits: noise on their weights.")
    ] = 0.0,
    distractors: Annotated[
        int, typer.Option(min=0, help="Of the planted circuits: further heads.")
    ] = 8,
    out: Annotated[
        Path, typer.Option(help="Folder of the results; what is done there is not done again.")
    ] = Path("runs/bench"),
    device: Device = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    as_json: Json = False,
) -> None:
    """Judge all methods by planted circuits, exact effects and circuits; tables and a figure.

    Interrupted, it goes on when run again. `--method mine:scores` adds the function `scores(model,
    task, level, direction)` of mine.py, which returns Scores.
    """
    started = perf_counter()
    with answering(as_json) as answer:
        placement = Placement(device, dtype, device_map)
        for name in model or ():
            check_model(name)
        for name in case or ():
            if name not in (*TASKS, *planted.names()):
                raise ValueError(
                    f"`--case` must be a task or one of {', '.join(planted.names())}; got "
                    f"{name!r}; `relp tasks` lists the tasks"
                )
        check_folder(out)

        from circuits import draw, save
        from circuits.cli.cases import planted_cases, trained_cases
        from circuits.judge.bench import bench
        from circuits.masked import UNABLE
        from relp import written_whole
        from relp.bridge import versions

        chosen = _methods(method or [])
        models = dict.fromkeys([*shelf.shipped(), *(model or [])])
        cases = [*planted_cases(case, pairs, seed, noise, distractors)]
        cases += [of for name in models for of in trained_cases(name, case, pairs, seed, placement)]
        options: dict[str, Any] = {
            "pairs": pairs, "seed": seed, "noise": noise, "distractors": distractors
        }  # fmt: skip
        if dtype is not None:  # or folders of before would be of other options
            options["dtype"] = dtype
        try:
            with written(out), warnings.catch_warnings():
                warnings.filterwarnings("ignore", UNABLE)  # the cases are those that it can do
                found = bench(cases, chosen, folder=out, options=options | {"versions": versions()})
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(
                f"the entries that are done are kept in {str(out)!r}; run the same command again "
                "to go on"
            ) from stop
        for group in found.groups:
            table = found.overview(group)
            count = len({entry.case for entry in found.entries if entry.group == group})
            rows = [
                [str(name), *row] for name, row in zip(table.index, table.to_numpy(), strict=True)
            ]
            print_table(
                f"{group}: mean over {count} cases",
                ["method", *(SHORT.get(c, c) for c in table.columns)],
                rows,
            )
        say("AUC, AP: of true edges; r, ρ, signs, error: of nodes; nodes, edges: cost in floors")
        if "GRADIENT" in found.methods:
            say("+ better, ! worse than GRADIENT: permutation tests over pairs, Holm's correction")
        figure = draw(found.table(), title=f"relp bench · {pairs} pairs, seed {seed}")
        with written(out):
            with written_whole(out / "bench.csv") as temporary:
                found.table().to_csv(temporary, index=False)
            with written_whole(out / "bench.md") as temporary:
                temporary.write_text(found.to_markdown(), encoding="utf-8")
            save(figure, out / "bench.html")
        files = [str(out / f"bench.{suffix}") for suffix in ("csv", "md", "html")]
        for file in files:
            say(f"wrote {escape(file)}")
        answer |= {"table": records(found.table()), "files": files}
        say(f"done in {perf_counter() - started:.0f} s")


def _methods(names: Sequence[str]) -> Any:
    """The methods of a benchmark: all, with those of the user's own; or only some."""
    import sys

    from circuits.judge.methods import METHODS, from_name

    sys.path.insert(0, os.getcwd())  # as `python -m` would, for modules beside the user
    asked = [from_name(name) for name in names]
    own = {m.name: m for m in asked if m.name not in METHODS}
    ours = {m.name: m for m in asked if m.name in METHODS} or METHODS
    return {**ours, **own}
