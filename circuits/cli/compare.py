"""`relp compare`: how well estimates agree with exact effects, and which circuits they give."""

from __future__ import annotations

import warnings
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer
from rich.markup import escape

from circuits.cli.estimates import every_estimate, measured, print_agreement, ready
from circuits.cli.options import (
    Device,
    DeviceMap,
    Dtype,
    Exact,
    FilterCorrect,
    Json,
    Model,
    PairsBySize,
    Seed,
    TaskName,
    label,
    pairs_for,
)
from circuits.cli.outputs import check_folder, written
from circuits.cli.screen import answering, print_table, records, say
from circuits.cli.source import source_of
from tasks import zoo
from tasks.zoo.boot import check_model
from tasks.zoo.placement import Placement

__all__ = ["compare"]


def compare(
    task: TaskName = "ioi",
    model: Model = "ioi-gpt2",
    pairs: PairsBySize = None,
    seed: Seed = 0,
    exact: Exact = False,
    filter_correct: FilterCorrect = False,
    circuits: Annotated[
        bool | None,
        typer.Option(
            "--circuits/--no-circuits",
            help="Whether to judge the circuits of each, too; if not given, of small models.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the results: compare.html, a figure, and the table as compare.csv, "
            "compare.md and compare.tex."
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    as_json: Json = False,
) -> None:
    """Compare rules: agreement with exact patching, and faithfulness of circuits by size."""
    started = perf_counter()
    with answering(as_json) as answer:
        source = source_of(task)
        placement = Placement(device, dtype, device_map)
        check_model(model)
        if out is not None:
            check_folder(out)

        from circuits.cli.cases import is_large

        bridge = zoo.load(model, **vars(placement))
        pairs = pairs or pairs_for(bridge, 16)
        prompts = ready(bridge, source, pairs, seed, filter_correct=filter_correct)
        scores, seconds = every_estimate(bridge, prompts)
        effect = measured(bridge, prompts, scores, exact=exact)
        frame = print_agreement(scores, effect)
        took = ", ".join(f"{rules} {s:.1f}" for rules, s in seconds.items())
        say(f"seconds for the scores of all nodes: {took}")
        answer |= {"agreement": records(frame), "seconds": seconds}
        if out is not None:
            title = (
                f"{label(bridge)} · {source.name} · agreement with exact effects, "
                f"{len(prompts)} pairs"
            )
            answer["files"] = _write(frame, title, out)
        if circuits or (circuits is None and not is_large(bridge)):
            others, which = source.others(bridge.tokenizer, pairs, seed)
            if others is None:
                say(f"no circuits: {which}")
            else:
                if filter_correct:
                    others = others.filter_correct(bridge)
                    which += f", the {len(others)} that are answered rightly"
                answer["circuits"] = _print_circuits(bridge, prompts, others, which)
        say(f"done in {perf_counter() - started:.0f} s")


def _write(frame: Any, title: str, out: Path) -> list[str]:
    """The table, and its figure, into a folder."""
    from circuits import draw, save, to_latex, to_markdown
    from relp import written_whole

    texts = {
        "csv": frame.to_csv(index=False), "md": to_markdown(frame), "tex": to_latex(frame)
    }  # fmt: skip
    files = [out / f"compare.{suffix}" for suffix in ("html", *texts)]
    with written(out):
        out.mkdir(parents=True, exist_ok=True)
        save(draw(frame, title=title), files[0])
        for file, text in zip(files[1:], texts.values(), strict=True):
            with written_whole(file) as temporary:
                temporary.write_text(text, encoding="utf-8")
    for file in files:
        say(f"wrote {escape(str(file))}")
    return [str(file) for file in files]


def _print_circuits(bridge: Any, prompts: Any, others: Any, which: str) -> list[dict[str, Any]]:
    """How faithful the best edges of each are, on other pairs than they were scored on."""
    from circuits import evaluate
    from circuits.masked import UNABLE
    from relp import PRESETS, attribute

    edges = [attribute(bridge, prompts, rules=r, level="edge") for r in PRESETS.values()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", UNABLE)  # said above
        found = evaluate(bridge, others, edges)
    shown = [i for i, size in enumerate(found.sizes) if 0.002 <= size <= 0.05]
    areas = found.areas().set_index("rules")
    rows = []
    for rules, row in zip(found.rules, found.faithfulness.tolist(), strict=True):
        both = (f"{areas.loc[rules, name]:.3f}" for name in ("CPR", "CMD"))
        rows.append([rules, *both, *(f"{round(row[i], 3) + 0.0:.3f}" for i in shown)])
    print_table(
        f"faithfulness by share of edges, on {which}",
        ["rules", "CPR", "CMD", *(f"{found.sizes[i]:.1%}" for i in shown)],
        rows,
    )
    return records(found.to_dataframe().merge(found.areas(), on="rules"))
