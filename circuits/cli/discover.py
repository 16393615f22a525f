"""`relp discover`: find the circuit of a task, check it, draw it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer
from rich.markup import escape

from circuits.choices import check_tau
from circuits.cli.estimates import SHOWN, measured, print_agreement, ready
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
    result_name,
    rule_names,
)
from circuits.cli.outputs import check_folder, written
from circuits.cli.screen import answering, records, say
from circuits.cli.source import source_of
from relp import Preset
from tasks import zoo
from tasks.zoo.boot import check_model
from tasks.zoo.placement import Placement

__all__ = ["discover"]

EDGES = 100
SEARCHES = ("top", "greedy", "acdc")


def discover(
    task: TaskName = "ioi",
    model: Model = "ioi-gpt2",
    rules: Annotated[
        str | None,
        typer.Option(
            autocompletion=rule_names,
            help="top, greedy: rules that score the edges; RELP if not given.",
        ),
    ] = None,
    search: Annotated[
        str,
        typer.Option(
            autocompletion=lambda: list(SEARCHES),
            help="How edges are chosen: top, greedy or acdc.",
        ),
    ] = "top",
    edges: Annotated[
        int | None,
        typer.Option(min=1, help="top, greedy: edges that the circuit may have; 100 if not given."),
    ] = None,
    tau: Annotated[
        float | None,
        typer.Option(help="acdc (exact, slow): what the cut of an edge that stays must cost."),
    ] = None,
    pairs: PairsBySize = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the circuit's files; if not given, runs/MODEL. Those of an earlier "
            "run are replaced."
        ),
    ] = None,
    exact: Exact = False,
    filter_correct: FilterCorrect = False,
    device: Device = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    as_json: Json = False,
) -> None:
    """Find the circuit of a task, check it against exact patching, draw it.

    An interrupted acdc goes on when run again.
    """
    started = perf_counter()
    with answering(as_json) as answer:
        chosen = Preset(rules or Preset.RELP)
        if search == "acdc" and rules is not None:
            raise ValueError(
                "`--rules` must go with a search that ranks scores; --search acdc measures each "
                f"edge; got --rules {chosen}; leave it out, or give --search top"
            )
        folder = out or Path("runs") / result_name(model)
        source = source_of(task)
        many = "" if pairs is None else f" --pairs {pairs}"
        kept = " --filter-correct" * filter_correct
        precise = "" if dtype is None else f" --dtype {dtype}"
        asked = f"{source.identity} --model {model}{precise}{many} --seed {seed}{kept}"
        find = _search(search, edges, tau, folder / f"{source.name}.part.json", asked)
        placement = Placement(device, dtype, device_map)
        check_model(model)
        check_folder(folder)

        from circuits import faithfulness, save
        from circuits.graph import size
        from relp import PRESETS, attribute

        bridge = zoo.load(model, **vars(placement))
        pairs = pairs or pairs_for(bridge, 32)
        prompts = ready(bridge, source, pairs, seed, filter_correct=filter_correct)
        with written(folder):
            folder.mkdir(parents=True, exist_ok=True)

        scores = [attribute(bridge, prompts, rules=PRESETS[r]) for r in SHOWN]
        circuit = find(bridge, prompts, PRESETS[chosen])
        if size(circuit) == 0:
            raise ValueError(
                f"the circuit must connect the embedding to the logits; what {search} found with "
                f"{f'--edges {edges or EDGES}' if tau is None else f'--tau {tau:g}'} does not; "
                f"{'give more edges' if tau is None else 'give a smaller cost'}"
            )
        # what took long and is small comes first: the rest can be made from it
        files = [folder / f"{source.name}.{suffix}" for suffix in ("json", "svg", "html")]
        with written(folder):
            say(f"wrote {escape(str(save(circuit, files[0])))}")
        table = print_agreement(scores, measured(bridge, prompts, scores, exact=exact))
        share = faithfulness(bridge, prompts, circuit)
        total = circuit.graph["total_edges"]
        summary = (
            f"{size(circuit)} of {total} edges ({size(circuit) / total:.1%}), "
            f"{circuit.number_of_nodes()} nodes, faithfulness {share:.3f}"
        )
        by = circuit.graph["rules"] + (", greedy" if search == "greedy" else "")
        say(f"circuit by {by}: [bold]{summary}[/]")
        title = f"{source.name} circuit of {label(bridge)} · {by} · {summary}"
        for file in files[1:]:
            with written(folder):
                save(circuit, file, title=title)
            say(f"wrote {escape(str(file))}")
        answer |= {
            **circuit.graph,
            "nodes": circuit.number_of_nodes(),
            "edges": size(circuit),
            "faithfulness": share,
            "agreement": records(table),
            "files": [str(file) for file in files],
        }
        say(f"done in {perf_counter() - started:.0f} s")


def _search(
    search: str, edges: int | None, tau: float | None, unfinished: Path, asked: str
) -> Callable[..., Any]:
    """How to find a circuit, given model, task and rules; acdc keeps in a file what it has."""
    if search not in SEARCHES:
        raise ValueError(
            f"`--search` must be one of {', '.join(SEARCHES)}; got {search!r}; top takes the edges "
            "with the largest scores"
        )
    if (search == "acdc") != (tau is not None) or None not in (edges, tau):
        raise ValueError(
            "`--search acdc` must get --tau, the least cost of a cut in units of the metric, and "
            f"the others may get --edges; got --search {search} with --edges {edges} and "
            f"--tau {tau}; for instance --search acdc --tau 0.1"
        )
    if tau is not None:
        check_tau(tau)
        asked += f" --tau {tau:g}"
        return lambda model, task, _: _acdc(model, task, tau, unfinished, asked)

    def ranked(model: Any, task: Any, rules: Any) -> Any:
        from circuits import greedy, top
        from relp import attribute

        choose = top if search == "top" else greedy
        scores = attribute(model, task, rules=rules, level="edge")
        return choose(scores, edges=edges or EDGES)

    return ranked


def _acdc(model: Any, task: Any, tau: float, unfinished: Path, asked: str) -> Any:
    """The circuit by exact search, which goes on from what an interrupted one left in the file."""
    from circuits import acdc, connect, load, save
    from circuits.graph import size
    from circuits.search.acdc import NEXT

    begun = load(unfinished) if unfinished.exists() else None
    if begun is not None and begun.graph.get("asked") != asked:
        raise ValueError(
            f"{str(unfinished)!r} must be what an interrupted search of the same options left; it "
            f"is of {begun.graph.get('asked')!r}, now {asked!r}; give the options of then, another "
            "`--out`, or delete the file"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "interrupted: ")  # said below, for the command line
        circuit = acdc(model, task, tau=tau, graph=begun)
    if NEXT in circuit.graph:
        circuit.graph["asked"] = asked
        with written(unfinished):
            save(circuit, unfinished)
        raise KeyboardInterrupt(
            f"the search so far, {size(circuit)} edges that are not cut, is kept in "
            f"{str(unfinished)!r}; run the same command again to go on, or delete that file to "
            "start anew"
        )
    unfinished.unlink(missing_ok=True)
    return connect(circuit)
