"""`relp coverage`, `relp tasks`, `relp models`: what there is."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape

from circuits.cli import screen
from circuits.cli.options import (
    Device,
    DeviceMap,
    Dtype,
    Json,
    label,
    model_names,
    result_name,
    rule_names,
)
from circuits.cli.screen import answering, or_dash, or_none, print_table, records, say
from relp import Preset
from tasks import able, zoo
from tasks.registry import TASKS, about
from tasks.zoo import shelf
from tasks.zoo.boot import check_model
from tasks.zoo.placement import Placement

__all__ = ["coverage", "models", "tasks"]

WIDE = 116
"""Columns of a screen on which there is room to say what each task is."""


def coverage(
    model: Annotated[
        str,
        typer.Argument(autocompletion=model_names, help="As `--model` of the other commands."),
    ] = "ioi-gpt2",
    rules: Annotated[
        str, typer.Option(autocompletion=rule_names, help="Rules to look at.")
    ] = "RELP",
    device: Device = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    as_json: Json = False,
) -> None:
    """List the operations of a model that carry relevance, and the rule that each gets."""
    with answering(as_json) as answer:
        chosen = Preset(rules)
        placement = Placement(device, dtype, device_map)
        check_model(model)

        import torch

        from relp import PRESETS, coverage
        from tasks.metrics import where_taken

        bridge = zoo.load(model, **vars(placement))
        tokens = where_taken(bridge, torch.randint(0, int(bridge.cfg.d_vocab), (1, 8)))
        frame = coverage(bridge, tokens, rules=PRESETS[chosen])
        groups = frame.groupby(["operation", "kind", "rule"], sort=False)
        print_table(
            f"{label(bridge)} · {chosen}",
            ["operation", "kind", "rule", "modules", "times"],
            [[*key, str(g["module"].nunique()), str(g["count"].sum())] for key, g in groups],
        )
        total = frame["count"].sum()
        covered = total - frame.query("kind in ('unknown', 'opaque')")["count"].sum()
        say(
            f"{covered} of {total} operations that carry relevance have a rule "
            f"({covered / total:.1%})"
        )
        answer |= {"operations": records(frame), "covered": int(covered), "total": int(total)}


def tasks(
    model: Annotated[
        str | None,
        typer.Option(help="Ask this model now, any that `--model` takes elsewhere."),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    as_json: Json = False,
) -> None:
    """List the tasks, and how often models prefer the right answer."""
    with answering(as_json) as answer:
        placement = Placement(device, dtype, device_map)
        if model is None and placement != Placement():
            raise ValueError(
                "`--device`, `--dtype` and `--device-map` must go with a model that is asked now; "
                "got no `--model`; give one"
            )
        if model is None:
            shares = able.recorded()
            said = "as measured before (--model NAME: now)"
        else:
            check_model(model)
            shares = {result_name(model): able.measured(zoo.load(model, **vars(placement)))}
            said = "measured now"
        told = screen.console.width >= WIDE
        rows = [
            [name, *[about(name)] * told, *(or_dash(of[name], ".0%") for of in shares.values())]
            for name in TASKS
        ]
        print_table("tasks", ["name", *["what it is"] * told, *shares], rows)
        say(
            f"share of {able.PAIRS} clean prompts on which the answer is preferred to the foil, "
            f"{said}; –: the tokenizer has not the words"
        )
        answer["tasks"] = [
            {"name": name, "about": about(name)}
            | {"preferred": {of: or_none(share[name]) for of, share in shares.items()}}
            for name in TASKS
        ]


def models(
    remove: Annotated[
        str | None, typer.Option(metavar="NAME", help="Take a fetched model out of the cache.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the models known by name: those that come with the package, and those to fetch."""
    with answering(as_json) as answer:
        if remove is not None:
            answer["removed"] = str(shelf.remove(remove))
            say(f"removed {escape(answer['removed'])}")
            return
        known = shelf.models()
        rows = [
            [m.name, f"{m.parameters / 1e6:,.1f} M", f"{m.size / 1e6:,.1f} MB", m.state, m.licence]
            for m in known
        ]
        print_table(
            f"models; those to fetch are kept in {shelf.cache()}",
            ["name", "parameters", "on disk", "where", "licence"],
            rows,
        )
        answer["models"] = [asdict(model) for model in known]
