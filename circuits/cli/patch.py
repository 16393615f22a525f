"""`relp patch`, `relp verify`: exact effects, of all cells or within a budget; `relp merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from circuits.choices import check_ablation, check_shard
from circuits.cli.estimates import SHOWN, print_agreement, print_missed, ready
from circuits.cli.options import (
    Device,
    DeviceMap,
    Dtype,
    FilterCorrect,
    Json,
    Model,
    Pairs,
    PairsBySize,
    Seed,
    TaskName,
    pairs_for,
)
from circuits.cli.outputs import claimed, going_on, written
from circuits.cli.screen import answering, print_table, records, say
from circuits.cli.source import source_of
from relp import Direction, Level
from tasks import zoo
from tasks.zoo.boot import check_model
from tasks.zoo.placement import Placement

__all__ = ["merge", "patch", "verify"]

LevelName = Annotated[str, typer.Option(help="node or edge.")]
Way = Annotated[str, typer.Option(help="denoise or noise.")]
Out = Annotated[Path, typer.Option(help="File to write, .safetensors.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Measure anew, and replace a file that is there.")
]
Shard = Annotated[
    str | None,
    typer.Option(help="3/16: the third of sixteen parts of the cells; `relp merge` joins all."),
]


def patch(
    task: TaskName = "ioi",
    model: Model = "ioi-gpt2",
    level: LevelName = "node",
    direction: Way = "denoise",
    ablation: Annotated[
        str, typer.Option(help="patch, zero, mean or mean_per_position.")
    ] = "patch",
    pairs: Pairs = 32,
    seed: Seed = 0,
    shard: Shard = None,
    out: Out = Path("effects.safetensors"),
    overwrite: Overwrite = False,
    filter_correct: FilterCorrect = False,
    device: Device = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    as_json: Json = False,
) -> None:
    """Measure the exact effect of every node or edge. Interrupted, it goes on when run again."""
    with answering(as_json) as answer:
        Level(level)
        Direction(direction)
        check_ablation(ablation)
        _check(shard)
        source = source_of(task)
        placement = Placement(device, dtype, device_map)
        check_model(model)
        with claimed(out, overwrite=overwrite) as finished, going_on(out, finished):
            from circuits import patch

            bridge = zoo.load(model, **vars(placement))
            prompts = ready(bridge, source, pairs, seed, filter_correct=filter_correct)
            effect = patch(bridge, prompts, level=level, direction=direction, ablation=ablation,
                           shard=shard, resume=finished)  # fmt: skip
            effect.save(out)
            finished.unlink()
        _tell(answer, effect, out)


def verify(
    task: TaskName = "ioi",
    model: Model = "ioi-gpt2",
    budget: Annotated[
        int | None, typer.Option(min=1, help="Cells to measure on every pair; 600 if not given.")
    ] = None,
    level: LevelName = "node",
    direction: Way = "denoise",
    pairs: PairsBySize = None,
    seed: Seed = 0,
    shard: Shard = None,
    out: Out = Path("sample.safetensors"),
    overwrite: Overwrite = False,
    filter_correct: FilterCorrect = False,
    device: Device = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    as_json: Json = False,
) -> None:
    """Measure the exact effects of the strongest nodes or edges, and of a sample of the rest.

    Half of the budget goes to those that any of five presets scores highest, half is drawn from the
    others, which makes agreement with all of them an estimate without favour. Interrupted, it goes
    on when run again.
    """
    with answering(as_json) as answer:
        Level(level)
        Direction(direction)
        _check(shard)
        source = source_of(task)
        placement = Placement(device, dtype, device_map)
        check_model(model)
        with claimed(out, overwrite=overwrite) as finished, going_on(out, finished):
            from circuits import missed, verify
            from circuits.exact.verify import BUDGET
            from relp import PRESETS, attribute

            bridge = zoo.load(model, **vars(placement))
            pairs = pairs or pairs_for(bridge, 16)
            prompts = ready(bridge, source, pairs, seed, filter_correct=filter_correct)
            scores = [
                attribute(bridge, prompts, rules=PRESETS[r], level=level, direction=direction)
                for r in SHOWN
            ]
            effect = verify(bridge, prompts, scores, budget=budget or BUDGET, seed=seed,
                            shard=shard, resume=finished)  # fmt: skip
            effect.save(out)
            finished.unlink()
        if shard is None:  # a part stands for nothing by itself
            answer["agreement"] = records(print_agreement(scores, effect))
        if shard is None and effect.strata is not None:
            print_missed(effect)
            answer["missed"] = records(missed(effect))
        _tell(answer, effect, out)


def merge(
    parts: Annotated[
        list[Path],
        typer.Argument(help="What `relp patch --shard` or `relp verify --shard` wrote: all parts."),
    ],
    out: Out = Path("effects.safetensors"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that is there.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Join the effects of all shards into the file that one machine would have written."""
    with answering(as_json) as answer:
        if missing := next((part for part in parts if not part.is_file()), None):
            raise FileNotFoundError(
                f"every part must be a file; {str(missing)!r} is none; name those that are there"
            )
        if left := next((p for p in parts if p.name.endswith(".part.safetensors")), None):
            raise ValueError(
                f"every part must be finished; {str(left)!r} is what an interrupted run keeps; run "
                "that shard again, to its end"
            )
        with claimed(out, overwrite=overwrite), written(out):
            from circuits.exact import merge_effects

            effect = merge_effects(*parts, into=out)
        _tell(answer, effect, out)


def _check(shard: str | None) -> None:
    """Refuses what is no shard, before anything is imported."""
    if shard is not None:
        check_shard(shard)


def _tell(answer: dict[str, Any], effect: Any, out: Path) -> None:
    """The strongest of the effects, and where they are all."""
    from circuits.draw.heatmaps import lined_up
    from relp import NodeScores

    shown = lined_up(effect) if isinstance(effect, NodeScores) else effect
    strongest = shown.top(10).dropna()
    answer |= {"strongest": records(strongest), "files": [str(out)]}
    strongest = strongest.drop(columns=["kind", "layer", "head", "slot"], errors="ignore")
    rest = f"; {shown.places[-1]}: the sum over all other positions" if shown.places else ""
    print_table(
        f"strongest: {effect.rules}, {effect.direction}{rest}",
        list(strongest.columns),
        [
            [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row]
            for row in strongest.itertuples(index=False)
        ],
    )
    say(f"wrote {escape(str(out))}")
