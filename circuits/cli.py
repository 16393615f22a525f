"""The `relp` command: discover a circuit, compare rules, list operations, convert files."""

from __future__ import annotations

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
from tasks import zoo

TASKS: dict[str, Callable[..., tasks.Task]] = {"ioi": tasks.ioi}
SHOWN = ("GRADIENT", "RELP", "CP_LRP", "DEEPLIFT")
"""The presets that `discover` compares."""

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
    rules: Annotated[str, typer.Option(help="Rules that the circuit is found with.")] = "RELP",
    edges: Annotated[int, typer.Option(min=1, help="Edges that the circuit may have.")] = 100,
    pairs: Pairs = 32,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the circuit's files; if not given, runs/MODEL.")
    ] = None,
) -> None:
    """Find the circuit of a task, check it against exact patching, draw it."""
    from circuits import assemble, faithfulness, patch, save, top
    from circuits.graph import size
    from relp import PRESETS, attribute, preset

    started = perf_counter()
    with _one_line_errors():
        chosen = preset(rules)
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
        graph = assemble(attribute(bridge, prompts, rules=chosen, level="edge"))
        circuit = top(graph, edges=edges)
        if size(circuit) == 0:
            raise ValueError(
                f"`--edges` must be enough to connect the embedding to the logits; {edges} of the "
                f"best edges by {chosen.name} do not; ask for more"
            )
        console.print(_agreement_table(scores, patch(bridge, prompts)))
        kept = faithfulness(bridge, prompts, circuit)
        share = size(circuit) / size(graph)
        summary = (
            f"{size(circuit)} of {size(graph)} edges ({share:.1%}), "
            f"{circuit.number_of_nodes()} nodes, faithfulness {kept:.3f}"
        )
        _say(f"circuit by {chosen.name}: [bold]{summary}[/]")
        title = f"{task} circuit of {name} · {chosen.name} · {summary}"
        for suffix in ("html", "svg", "json"):
            written = save(circuit, folder / f"{task}.{suffix}", title=title)
            _say(f"wrote {escape(str(written))}")
    _say(f"done in {perf_counter() - started:.0f} s")


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
    source: Annotated[Path, typer.Argument(help="A circuit that `relp discover` wrote.")],
    target: Annotated[
        Path, typer.Argument(help="File to write: .html .svg .json .graphml .gexf .dot .mmd")
    ],
) -> None:
    """Convert a circuit from one file format to another."""
    from circuits import load, save

    with _one_line_errors():
        _say(f"wrote {escape(str(save(load(source), target)))}")


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
            f"{'–' if rows.loc[r, 'pairs'] == 0 else format(rows.loc[r, 'pearson'], '.3f')} "
            f"({rows.loc[r, 'relative_error']:.2f})"
            for r in (s.rules for s in scores)
        )
        table.add_row(kind, *cells)
    return table
