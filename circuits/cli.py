"""The `relp` command: discover a circuit, measure effects, compare rules, convert files."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

import tasks
from circuits.export import MIB, SUFFIXES
from tasks import zoo

TASKS: dict[str, Callable[..., tasks.Task]] = {"ioi": tasks.ioi}
SHOWN = ("GRADIENT", "RELP", "CP_LRP", "DEEPLIFT")
"""The presets that `discover` compares."""
EDGES = 100
SEARCHES = ("top", "greedy", "acdc")

app = typer.Typer(
    help="Find circuits in transformers with relevance patching, and check them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
console = Console()
errors = Console(stderr=True)

TaskName = Annotated[str, typer.Argument(help="The task; `relp tasks` lists them.")]
Model = Annotated[
    str,
    typer.Option(help="A shipped model, or any name or folder that TransformerBridge boots."),
]
Pairs = Annotated[int, typer.Option(min=1, help="Pairs of prompts.")]
Seed = Annotated[int, typer.Option(help="Which prompts are drawn.")]


@app.command()
def discover(
    task: TaskName = "ioi",
    model: Model = "ioi-gpt2",
    rules: Annotated[str, typer.Option(help="Rules that score the edges.")] = "RELP",
    search: Annotated[str, typer.Option(help="How edges are chosen: top, greedy or acdc.")] = "top",
    edges: Annotated[
        int | None,
        typer.Option(min=1, help="top, greedy: edges that the circuit may have; 100 if not given."),
    ] = None,
    tau: Annotated[
        float | None,
        typer.Option(help="acdc (exact, slow): what the cut of an edge that stays must cost."),
    ] = None,
    pairs: Pairs = 32,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the circuit's files; if not given, runs/MODEL.")
    ] = None,
) -> None:
    """Find the circuit of a task, check it against exact patching, draw it."""
    from circuits import faithfulness, patch, save
    from circuits.graph import size
    from relp import PRESETS, attribute, preset

    started = perf_counter()
    with _one_line_errors():
        chosen = preset(rules)
        find = _search(search, edges, tau)
        make = _task(task)
        bridge, name = _boot(model)
        prompts = make(bridge.tokenizer, pairs=pairs, seed=seed)
        folder = _writable(out or Path("runs") / name)
        _say(f"[bold]{escape(name)}[/] on {escape(repr(prompts))}")

        scores = [attribute(bridge, prompts, rules=PRESETS[r]) for r in SHOWN]
        clean, corrupt = scores[0].clean, scores[0].corrupt
        _say(
            f"{prompts.metric.name}: clean {clean.mean():.3f}, corrupt {corrupt.mean():.3f}; "
            f"the answer is preferred in {(clean > 0).float().mean():.1%} of the clean prompts"
        )
        circuit = find(bridge, prompts, chosen)
        if size(circuit) == 0:
            raise ValueError(
                f"the circuit must connect the embedding to the logits; what {search} found with "
                f"{f'--edges {edges or EDGES}' if tau is None else f'--tau {tau:g}'} does not; "
                f"{'give more edges' if tau is None else 'give a smaller cost'}"
            )
        console.print(_agreement_table(scores, patch(bridge, prompts)))
        kept = faithfulness(bridge, prompts, circuit)
        total = circuit.graph["total_edges"]
        summary = (
            f"{size(circuit)} of {total} edges ({size(circuit) / total:.1%}), "
            f"{circuit.number_of_nodes()} nodes, faithfulness {kept:.3f}"
        )
        by = circuit.graph["rules"] + (", greedy" if search == "greedy" else "")
        _say(f"circuit by {by}: [bold]{summary}[/]")
        title = f"{task} circuit of {name} · {by} · {summary}"
        for suffix in ("html", "svg", "json"):
            written = save(circuit, folder / f"{task}.{suffix}", title=title)
            _say(f"wrote {escape(str(written))}")
    _say(f"done in {perf_counter() - started:.0f} s")


@app.command(name="patch")
def measure(
    task: TaskName = "ioi",
    model: Model = "ioi-gpt2",
    level: Annotated[str, typer.Option(help="node or edge.")] = "node",
    direction: Annotated[str, typer.Option(help="denoise or noise.")] = "denoise",
    ablation: Annotated[
        str, typer.Option(help="patch, zero, mean or mean_per_position.")
    ] = "patch",
    pairs: Pairs = 32,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("effects.safetensors"),
) -> None:
    """Measure the exact effect of every node or edge. Interrupted, it goes on when run again."""
    from circuits import patch
    from circuits.draw import lined_up

    with _one_line_errors():
        if out.suffix != ".safetensors":
            raise ValueError(
                f"`--out` must be a .safetensors file; got {out.name!r}; change the suffix"
            )
        make = _task(task)
        bridge, name = _boot(model)
        prompts = make(bridge.tokenizer, pairs=pairs, seed=seed)
        _say(f"[bold]{escape(name)}[/] on {escape(repr(prompts))}")
        finished = out.with_suffix(".part.safetensors")
        effect = patch(bridge, prompts, level=level, direction=direction, ablation=ablation,
                       resume=finished)  # fmt: skip
        effect.save(out)
        finished.unlink()
        shown = lined_up(effect) if level == "node" else effect
        strongest = shown.top(10).drop(columns=["kind", "layer", "head", "slot"], errors="ignore")
        rest = "; other: the sum over all other positions" if shown.places else ""
        table = Table(*strongest.columns, title=f"strongest: {effect.rules}, {direction}{rest}")
        for row in strongest.itertuples(index=False):
            table.add_row(*(f"{v:.3f}" if isinstance(v, float) else escape(str(v)) for v in row))
        console.print(table)
        _say(f"wrote {escape(str(out))}")


@app.command()
def compare(
    task: TaskName = "ioi",
    model: Model = "ioi-gpt2",
    pairs: Pairs = 16,
    seed: Seed = 0,
) -> None:
    """Compare rules: agreement with exact patching, and faithfulness of circuits by size."""
    from circuits import evaluate, patch
    from relp import PRESETS, attribute

    with _one_line_errors():
        make = _task(task)
        bridge, name = _boot(model)
        prompts = make(bridge.tokenizer, pairs=pairs, seed=seed)
        others = make(bridge.tokenizer, pairs=pairs, seed=seed + 1)
        _say(f"[bold]{escape(name)}[/] on {escape(repr(prompts))}")
        scores = [attribute(bridge, prompts, rules=r) for r in PRESETS.values()]
        console.print(_agreement_table(scores, patch(bridge, prompts)))
        edges = [attribute(bridge, prompts, rules=r, level="edge") for r in PRESETS.values()]
        found = evaluate(bridge, others, edges)
        shown = [i for i, size in enumerate(found.sizes) if 0.002 <= size <= 0.05]
        table = Table(
            Column("rules", no_wrap=True), "CPR", "CMD", *(f"{found.sizes[i]:.1%}" for i in shown),
            title=f"faithfulness by share of edges, on the pairs of seed {seed + 1}",
        )  # fmt: skip
        areas = found.areas().set_index("rules")
        for rules, row in zip(found.rules, found.faithfulness.tolist(), strict=True):
            both = (f"{areas.loc[rules, name]:.3f}" for name in ("CPR", "CMD"))
            table.add_row(rules, *both, *(f"{round(row[i], 3) + 0.0:.3f}" for i in shown))
        console.print(table)


@app.command()
def coverage(
    model: Annotated[str, typer.Argument(help="A shipped model, or a name or folder.")] = (
        "ioi-gpt2"
    ),
    rules: Annotated[str, typer.Option(help="Rules to look at.")] = "RELP",
) -> None:
    """List the operations of a model that carry relevance, and the rule that each gets."""
    import torch

    from relp import coverage, preset

    with _one_line_errors():
        chosen = preset(rules)
        bridge, name = _boot(model)
        tokens = torch.randint(0, int(bridge.cfg.d_vocab), (1, 8))
        frame = coverage(bridge, tokens, rules=chosen)
    table = Table("operation", "kind", "rule", "modules", "times", title=f"{name} · {chosen.name}")
    for (operation, kind, rule), rows in frame.groupby(["operation", "kind", "rule"], sort=False):
        table.add_row(
            operation, kind, rule, str(rows["module"].nunique()), str(rows["count"].sum())
        )
    console.print(table)
    total = frame["count"].sum()
    covered = total - frame.query("kind in ('unknown', 'opaque')")["count"].sum()
    _say(
        f"{covered} of {total} operations that carry relevance have a rule ({covered / total:.1%})"
    )


@app.command(name="tasks")
def list_tasks() -> None:
    """List the tasks and the models that come with the package."""
    table = Table("name", "what it is")
    for name, make in TASKS.items():
        table.add_row(name, (make.__doc__ or "").strip().splitlines()[0])
    for name in zoo.names():
        table.add_row(name, "model that comes with the package")
    console.print(table)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A circuit's file, .mmd excepted.")],
    target: Annotated[
        Path,
        typer.Argument(
            help=f"File to write: {' '.join(SUFFIXES)}; .mmd takes at most 500 edges, {MIB} is for "
            "EAP-IG and MIB."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="For .mib.json: the model, whose shape it needs. Not given, writing takes the one "
            "that the circuit names, and reading makes each head's keys and values its own."
        ),
    ] = None,
    in_graph: Annotated[
        bool, typer.Option("--in-graph", help="From .mib.json: only the edges marked in_graph.")
    ] = False,
) -> None:
    """Convert a circuit from one file format to another, by the names of the files."""
    from circuits import from_mib, load, save

    with _one_line_errors():
        reads, writes = source.name.endswith(MIB), target.name.endswith(MIB)
        if (in_graph and not reads) or (model and not (reads or writes)):
            raise ValueError(
                f"`--in-graph` is for reading {MIB} and `--model` for reading or writing it; got "
                f"{source.name!r} and {target.name!r}; leave the option out"
            )
        bridge = _boot(model)[0] if model else None
        graph = from_mib(source, bridge, in_graph=in_graph) if reads else load(source)
        if writes and bridge is None:
            bridge = _boot(graph.graph["model"])[0]
        written = save(graph, target, model=bridge if writes else None)
        _say(f"wrote {escape(str(written))}")


# -- parts -----------------------------------------------------------------------------------------


def _say(line: str) -> None:
    """One line, however long: paths and numbers stay whole when the output is read by a program."""
    console.print(line, soft_wrap=True, highlight=False)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """What a user can mend is one sentence on stderr and exit code 1, not a traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        errors.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error


def _task(name: str) -> Callable[..., tasks.Task]:
    if name not in TASKS:
        raise ValueError(
            f"the task must be one of {', '.join(TASKS)}; got {name!r}; `relp tasks` lists them"
        )
    return TASKS[name]


def _search(search: str, edges: int | None, tau: float | None) -> Callable[..., Any]:
    """How to find a circuit, given model, task and rules."""
    from circuits import acdc, assemble, connect, greedy, top
    from relp import attribute

    if search not in SEARCHES:
        raise ValueError(
            f"`--search` must be one of {', '.join(SEARCHES)}; got {search!r}; top takes the edges "
            "with the largest scores"
        )
    if search == "acdc" and tau is not None and edges is None:
        return lambda model, task, _: connect(acdc(model, task, tau=tau))
    if search == "acdc" or tau is not None:
        raise ValueError(
            "`--search acdc` must get --tau, the least cost of a cut in units of the metric, and "
            f"the others may get --edges; got --search {search} with --edges {edges} and "
            f"--tau {tau}; for instance --search acdc --tau 0.1"
        )
    choose = top if search == "top" else greedy
    return lambda model, task, rules: choose(
        assemble(attribute(model, task, rules=rules, level="edge")), edges=edges or EDGES
    )


def _boot(name: str) -> tuple[Any, str]:
    """The model in eval mode, and the name that results carry."""
    if name in zoo.names():
        return zoo.load(name), name
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise ValueError(
            f"the model must be one of {', '.join(zoo.names())}, or a name or folder that "
            f"TransformerBridge can boot; there is no folder {name!r}; check the path"
        )
    from transformer_lens.model_bridge import TransformerBridge

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = TransformerBridge.boot_transformers(name)
    except Exception as error:  # the hub, configs and adapters each raise their own kind
        reason = next(
            (line for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise ValueError(
            f"the model must be one of {', '.join(zoo.names())}, or a name or folder that "
            f"TransformerBridge can boot; {name!r} could not be booted ({reason}); check the "
            "spelling, or that the folder has config.json, weights and a saved tokenizer"
        ) from error
    if model.tokenizer is None:
        raise ValueError(
            f"the model must have a tokenizer to build a task; {name!r} has none; save one into "
            "its folder with tokenizer.save_pretrained"
        )
    return model.eval(), Path(name).name or name


def _writable(folder: Path) -> Path:
    """The output folder, made before the work starts, so that an hour is not lost to a typo."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"`--out` must be a folder that can be written; {str(folder)!r} cannot be made "
            f"({error.strerror}); choose another"
        ) from error
    if not os.access(folder, os.W_OK):
        raise OSError(
            f"`--out` must be a folder that can be written; {str(folder)!r} is read-only; "
            "choose another"
        )
    return folder


def _agreement_table(scores: Sequence[Any], effect: Any) -> Table:
    from circuits import agreement

    frame = agreement(scores, effect)
    table = Table(
        "kind",
        *(s.rules for s in scores),
        title="agreement with exact patching: Pearson r per pair (relative error)",
    )
    for kind in dict.fromkeys(frame["kind"]):
        rows = frame[frame["kind"] == kind].set_index("rules")
        cells = (
            f"{_or_dash(rows.loc[r, 'pearson'], '.3f')} "
            f"({_or_dash(rows.loc[r, 'relative_error'], '.2f')})"
            for r in (s.rules for s in scores)
        )
        table.add_row(kind, *cells)
    return table


def _or_dash(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)
