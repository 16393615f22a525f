"""The `relp` command: discover a circuit, measure effects, compare rules, convert files.

What an option cannot be is said at once: torch and TransformerLens take seconds to import, so they
are where they are used, behind the checks.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer
from rich.markup import escape

from circuits.choices import MIB, SUFFIXES, check_ablation, check_tau
from circuits.screen import console, one_line_errors, or_dash, print_table, say
from circuits.source import source_of
from relp import Direction, Level, Preset
from tasks import able, planted, zoo
from tasks.registry import TASKS, about
from tasks.zoo import shelf
from tasks.zoo.boot import check_model

SHOWN = ("GRADIENT", "RELP", "CP_LRP", "DEEPLIFT", "PARTWAY")
"""The presets that `discover` compares."""
EDGES = 100
SEARCHES = ("top", "greedy", "acdc")
FEW = 8
"""Pairs of prompts for large models, if nobody says how many."""
SHORT = {
    "auroc": "AUC", "average_precision": "AP", "pearson": "r", "spearman": "ρ",
    "relative_error": "error", "node cost": "nodes", "edge cost": "edges",
}  # fmt: skip
"""Measures of a benchmark as the heads of its table."""
WIDE = 116
"""Columns of a screen on which there is room to say what each task is."""
READY = 16
"""Pairs per run that asks what the model does on them."""
STEPS = 10
"""Of the integrated gradients that `compare` shows beside the presets."""

app = typer.Typer(
    help="Find circuits in transformers with relevance patching, and check them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

TaskName = Annotated[
    str,
    typer.Argument(
        help="The task; `relp tasks` lists them. Or a .csv or .jsonl file with the columns clean, "
        "corrupt, answer and foil; results are called by its name."
    ),
]
Model = Annotated[
    str,
    typer.Option(
        help="A model that `relp models` lists, a folder or GGUF file, or a name on the Hugging "
        "Face hub."
    ),
]
Pairs = Annotated[
    int, typer.Option(min=1, help="Pairs of prompts; of a file, no more than it has.")
]
PairsBySize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Pairs of prompts; of a file, no more than it has. If not given, fewer for large "
        "models.",
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        help="Which prompts are drawn; of a file, 0 takes the first rows, another number shuffles "
        "them before."
    ),
]
Exact = Annotated[
    bool,
    typer.Option("--exact", help="Patch everything, however long it takes, not a sample of it."),
]
FilterCorrect = Annotated[
    bool,
    typer.Option("--filter-correct", help="Keep the pairs whose clean prompt is answered rightly."),
]


@app.command()
def discover(
    task: TaskName = "ioi",
    model: Model = "ioi-gpt2",
    rules: Annotated[
        str | None,
        typer.Option(help="top, greedy: rules that score the edges; RELP if not given."),
    ] = None,
    search: Annotated[str, typer.Option(help="How edges are chosen: top, greedy or acdc.")] = "top",
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
) -> None:
    """Find the circuit of a task, check it against exact patching, draw it.

    An interrupted acdc goes on when run again.
    """
    started = perf_counter()
    with one_line_errors():
        chosen = Preset(rules or Preset.RELP)
        if search == "acdc" and rules is not None:
            raise ValueError(
                "`--rules` must go with a search that ranks scores; --search acdc measures each "
                f"edge; got --rules {chosen}; leave it out, or give --search top"
            )
        folder = out or Path("runs") / _called(model)
        source = source_of(task)
        many = "" if pairs is None else f" --pairs {pairs}"
        kept = " --filter-correct" * filter_correct
        asked = f"{source.identity} --model {model}{many} --seed {seed}{kept}"
        find = _search(search, edges, tau, folder / f"{source.name}.part.json", asked)
        check_model(model)
        _check_folder(folder)

        from circuits import faithfulness, save
        from circuits.graph import size
        from relp import PRESETS, attribute

        bridge = zoo.load(model)
        prompts = source.draw(bridge.tokenizer, pairs or _many(bridge, 32), seed)
        with _written(folder):
            folder.mkdir(parents=True, exist_ok=True)
        say(f"[bold]{escape(_shown(bridge))}[/] on {escape(repr(prompts))}")

        prompts = _ready(bridge, prompts, filter_correct=filter_correct)
        scores = [attribute(bridge, prompts, rules=PRESETS[r]) for r in SHOWN]
        circuit = find(bridge, prompts, PRESETS[chosen])
        if size(circuit) == 0:
            raise ValueError(
                f"the circuit must connect the embedding to the logits; what {search} found with "
                f"{f'--edges {edges or EDGES}' if tau is None else f'--tau {tau:g}'} does not; "
                f"{'give more edges' if tau is None else 'give a smaller cost'}"
            )
        # what took long and is small comes first: the rest can be made from it
        with _written(folder):
            say(f"wrote {escape(str(save(circuit, folder / f'{source.name}.json')))}")
        _print_agreement(scores, _measured(bridge, prompts, scores, exact=exact))
        share = faithfulness(bridge, prompts, circuit)
        total = circuit.graph["total_edges"]
        summary = (
            f"{size(circuit)} of {total} edges ({size(circuit) / total:.1%}), "
            f"{circuit.number_of_nodes()} nodes, faithfulness {share:.3f}"
        )
        by = circuit.graph["rules"] + (", greedy" if search == "greedy" else "")
        say(f"circuit by {by}: [bold]{summary}[/]")
        title = f"{source.name} circuit of {_shown(bridge)} · {by} · {summary}"
        for suffix in ("svg", "html"):
            with _written(folder):
                written = save(circuit, folder / f"{source.name}.{suffix}", title=title)
            say(f"wrote {escape(str(written))}")
    say(f"done in {perf_counter() - started:.0f} s")


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
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Measure anew, and replace a file that is there.")
    ] = False,
    filter_correct: FilterCorrect = False,
) -> None:
    """Measure the exact effect of every node or edge. Interrupted, it goes on when run again."""
    with one_line_errors():
        Level(level)
        Direction(direction)
        check_ablation(ablation)
        source = source_of(task)
        check_model(model)
        with _claimed(out, overwrite=overwrite) as finished, _going_on(out, finished):
            from circuits import patch
            from circuits.draw.heatmaps import lined_up
            from relp import NodeScores

            bridge = zoo.load(model)
            prompts = source.draw(bridge.tokenizer, pairs, seed)
            say(f"[bold]{escape(_shown(bridge))}[/] on {escape(repr(prompts))}")
            prompts = _ready(bridge, prompts, filter_correct=filter_correct)
            effect = patch(bridge, prompts, level=level, direction=direction, ablation=ablation,
                           resume=finished)  # fmt: skip
            effect.save(out)
            finished.unlink()
        shown = lined_up(effect) if isinstance(effect, NodeScores) else effect
        strongest = shown.top(10).drop(columns=["kind", "layer", "head", "slot"], errors="ignore")
        rest = "; other: the sum over all other positions" if shown.places else ""
        print_table(
            f"strongest: {effect.rules}, {direction}{rest}",
            list(strongest.columns),
            [
                [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row]
                for row in strongest.itertuples(index=False)
            ],
        )
        say(f"wrote {escape(str(out))}")


@app.command()
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
    out: Annotated[Path | None, typer.Option(help="Folder for compare.html, a figure.")] = None,
) -> None:
    """Compare rules: agreement with exact patching, and faithfulness of circuits by size."""
    started = perf_counter()
    with one_line_errors():
        source = source_of(task)
        check_model(model)
        if out is not None:
            _check_folder(out)

        from circuits import draw
        from circuits.grid import is_large
        from relp import written_whole

        bridge = zoo.load(model)
        pairs = pairs or _many(bridge, 16)
        prompts = source.draw(bridge.tokenizer, pairs, seed)
        say(f"[bold]{escape(_shown(bridge))}[/] on {escape(repr(prompts))}")
        prompts = _ready(bridge, prompts, filter_correct=filter_correct)
        scores, seconds = _every_estimate(bridge, prompts)
        effect = _measured(bridge, prompts, scores, exact=exact)
        frame = _print_agreement(scores, effect)
        took = ", ".join(f"{rules} {s:.1f}" for rules, s in seconds.items())
        say(f"seconds for the scores of all nodes: {took}")
        if out is not None:
            called = f"{_shown(bridge)} · {source.name}"
            title = f"{called} · agreement with exact effects, {len(prompts)} pairs"
            figure = draw(frame, title=title)
            page = out / "compare.html"
            with _written(out):
                out.mkdir(parents=True, exist_ok=True)
                with written_whole(page) as temporary:
                    figure.write_html(temporary, include_plotlyjs=True)
            say(f"wrote {escape(str(page))}")
        if circuits or (circuits is None and not is_large(bridge)):
            others, which = source.others(bridge.tokenizer, pairs, seed)
            if others is None:
                say(f"no circuits: {which}")
            else:
                if filter_correct:
                    others = others.filter_correct(bridge)
                    which += f", the {len(others)} that are answered rightly"
                _print_circuits(bridge, prompts, others, which)
    say(f"done in {perf_counter() - started:.0f} s")


@app.command()
def coverage(
    model: Annotated[str, typer.Argument(help="As `--model` of the other commands.")] = "ioi-gpt2",
    rules: Annotated[str, typer.Option(help="Rules to look at.")] = "RELP",
) -> None:
    """List the operations of a model that carry relevance, and the rule that each gets."""
    with one_line_errors():
        chosen = Preset(rules)
        check_model(model)

        import torch

        from relp import PRESETS, coverage

        bridge = zoo.load(model)
        tokens = torch.randint(0, int(bridge.cfg.d_vocab), (1, 8))
        frame = coverage(bridge, tokens, rules=PRESETS[chosen])
        groups = frame.groupby(["operation", "kind", "rule"], sort=False)
        print_table(
            f"{_shown(bridge)} · {chosen}",
            ["operation", "kind", "rule", "modules", "times"],
            [[*key, str(g["module"].nunique()), str(g["count"].sum())] for key, g in groups],
        )
        total = frame["count"].sum()
        covered = total - frame.query("kind in ('unknown', 'opaque')")["count"].sum()
        say(
            f"{covered} of {total} operations that carry relevance have a rule "
            f"({covered / total:.1%})"
        )


@app.command(name="bench")
def judge(
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
        typer.Option(help="Only this planted circuit, or task on all models; may be given again."),
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
) -> None:
    """Judge all methods by planted circuits, exact effects and circuits; tables and a figure.

    Interrupted, it goes on when run again. `--method mine:scores` adds the function `scores(model,
    task, level, direction)` of mine.py, which returns Scores.
    """
    started = perf_counter()
    with one_line_errors():
        for name in model or ():
            check_model(name)
        for name in case or ():
            if name not in (*TASKS, *planted.names()):
                raise ValueError(
                    f"`--case` must be a task or one of {', '.join(planted.names())}; got "
                    f"{name!r}; `relp tasks` lists the tasks"
                )
        _check_folder(out)

        from circuits import draw
        from circuits.grid import planted_cases, trained_cases
        from circuits.judge.bench import bench
        from circuits.masked import UNABLE
        from relp import written_whole
        from relp.bridge import versions

        chosen = _methods(method or [])
        models = dict.fromkeys([*shelf.shipped(), *(model or [])])
        cases = [*planted_cases(case, pairs, seed, noise, distractors)]
        cases += [of for name in models for of in trained_cases(name, case, pairs, seed)]
        options = {"pairs": pairs, "seed": seed, "noise": noise, "distractors": distractors}
        try:
            with _written(out), warnings.catch_warnings():
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
        with _written(out):
            with written_whole(out / "bench.csv") as temporary:
                found.table().to_csv(temporary, index=False)
            with written_whole(out / "bench.md") as temporary:
                temporary.write_text(found.to_markdown(), encoding="utf-8")
            with written_whole(out / "bench.html") as temporary:
                figure.write_html(temporary, include_plotlyjs=True)
        for suffix in ("csv", "md", "html"):
            say(f"wrote {escape(str(out / f'bench.{suffix}'))}")
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


@app.command(name="tasks")
def list_tasks(
    model: Annotated[
        str | None,
        typer.Option(help="Ask this model now, any that `--model` takes elsewhere."),
    ] = None,
) -> None:
    """List the tasks, and how often models prefer the right answer."""
    with one_line_errors():
        if model is None:
            shares = able.recorded()
            said = "as measured before (--model NAME: now)"
        else:
            check_model(model)
            shares = {_called(model): able.measured(zoo.load(model))}
            said = "measured now"
        told = console.width >= WIDE
        rows = [
            [name, *[about(name)] * told, *(or_dash(of[name], ".0%") for of in shares.values())]
            for name in TASKS
        ]
        print_table("tasks", ["name", *["what it is"] * told, *shares], rows)
        say(
            f"share of {able.PAIRS} clean prompts on which the answer is preferred to the foil, "
            f"{said}; –: the tokenizer has not the words"
        )


@app.command(name="models")
def list_models(
    remove: Annotated[
        str | None, typer.Option(metavar="NAME", help="Take a fetched model out of the cache.")
    ] = None,
) -> None:
    """List the models known by name: those that come with the package, and those to fetch."""
    with one_line_errors():
        if remove is not None:
            say(f"removed {escape(str(shelf.remove(remove)))}")
            return
        rows = [
            [m.name, f"{m.parameters / 1e6:,.1f} M", f"{m.size / 1e6:,.1f} MB", m.state, m.licence]
            for m in shelf.models()
        ]
        print_table(
            f"models; those to fetch are kept in {shelf.cache()}",
            ["name", "parameters", "on disk", "where", "licence"],
            rows,
        )


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

    with one_line_errors():
        reads, writes = source.name.endswith(MIB), target.name.endswith(MIB)
        if (in_graph and not reads) or (model and not (reads or writes)):
            raise ValueError(
                f"`--in-graph` is for reading {MIB} and `--model` for reading or writing it; got "
                f"{source.name!r} and {target.name!r}; leave the option out"
            )
        bridge = zoo.load(model) if model else None
        graph = from_mib(source, bridge, in_graph=in_graph) if reads else load(source)
        if writes and bridge is None:
            bridge = zoo.load(graph.graph["model"])
        written = save(graph, target, model=bridge if writes else None)
        say(f"wrote {escape(str(written))}")


# -- what is printed -------------------------------------------------------------------------------


def _every_estimate(bridge: Any, prompts: Any) -> tuple[list[Any], dict[str, float]]:
    """Node scores by each of the rules, and by integrated gradients; the seconds that each took."""
    from relp import GRADIENT, PRESETS, attribute

    ways = [(rules, 1) for rules in PRESETS.values()] + [(GRADIENT, STEPS)]
    scores, seconds = [], {}
    attribute(bridge, prompts.select([0]), rules=GRADIENT)  # the first run of a model sets it up
    for rules, steps in ways:
        begun = perf_counter()
        scores.append(attribute(bridge, prompts, rules=rules, steps=steps))
        seconds[scores[-1].rules] = perf_counter() - begun
    return scores, seconds


def _print_circuits(bridge: Any, prompts: Any, others: Any, which: str) -> None:
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


def _ready(bridge: Any, prompts: Any, *, filter_correct: bool) -> Any:
    """The pairs, after what the model does on them is said: it may be unable to do the task."""
    import torch

    from circuits.masked import UNABLE, doubt
    from relp.bridge import Sites, observe

    sites = Sites.of(bridge)
    prompts.must_fit(bridge.cfg, sites.model_name)
    if filter_correct:
        every = len(prompts)
        prompts = prompts.filter_correct(bridge)
        say(f"{len(prompts)} of {every} pairs are kept, on which the answer is preferred")
    clean: list[float] = []
    corrupt: list[float] = []
    for side, values in (("clean", clean), ("corrupt", corrupt)):
        for _, batch in prompts.buckets(READY):
            values += observe(sites, batch, (), side=side)[1].float().tolist()
    means = ", ".join(f"{side} {sum(v) / len(v):.3f}" for side, v in
                      (("clean", clean), ("corrupt", corrupt)))  # fmt: skip
    right = sum(value > 0 for value in clean) / len(clean)
    preferred = f"; the answer is preferred in {right:.1%} of the clean prompts"
    say(f"{prompts.metric.name}: {means}{preferred if prompts.metric.compares_answers else ''}")
    if said := doubt(prompts, torch.tensor(clean), torch.tensor(corrupt)):
        warnings.warn(said, stacklevel=2)
        warnings.filterwarnings("ignore", UNABLE)  # once is enough
    return prompts


def _many(bridge: Any, pairs: int) -> int:
    """Pairs of prompts, if nobody says how many."""
    from circuits.grid import is_large

    return FEW if is_large(bridge) else pairs


def _measured(bridge: Any, prompts: Any, scores: Sequence[Any], *, exact: bool) -> Any:
    """Exact effects; of large models only some, and how much the others may hold is said."""
    from circuits import missed, patch, verify
    from circuits.exact.verify import BUDGET
    from circuits.grid import is_large

    if exact or scores[0].nodes[0].numel() <= BUDGET or not is_large(bridge):
        return patch(bridge, prompts)
    effect = verify(bridge, prompts, scores, budget=BUDGET)
    if effect.strata is None:
        return effect
    some = effect.rules.removeprefix("exact (").removesuffix(")")
    say(
        f"measured {some} that change anything: for each kind half of them the strongest by any of "
        "the rules, half drawn from the rest (--exact: all)"
    )
    rows = missed(effect).query("at_most > 0").itertuples()
    few = ", ".join(f"{r.at_most:,} of {r.cells - r.measured:,} {r.kind} cells" for r in rows)
    if few:
        say(f"not measured, but perhaps as large as the tenth largest (95 %): at most {few}")
    return effect


def _print_agreement(scores: Sequence[Any], effect: Any) -> Any:
    """Prints the table, and gives it."""
    from circuits import agreement

    frame = agreement(scores, effect).sort_values("kind", key=_as_met, kind="stable")
    # of a sample nobody knows the largest (of one effect there is no choice)
    overlaps = bool(frame["overlap"][frame["pearson"].notna()].notna().any())
    rows = [
        [
            *(row.kind, row.rules),
            or_dash(row.pearson, ".3f") + "*" * int(row.hangs),
            or_dash(row.pearson_rest, ".3f"),
            *(or_dash(v, ".2f") for v in (row.spearman, row.signs, row.relative_error)),
            *([or_dash(row.overlap, ".2f")] if overlaps else []),
            f"{row.cells:,}",
        ]
        for row in frame.itertuples()
    ]
    title = "agreement with exact patching, mean over pairs"
    headers = ["kind", "rules", "r", "r rest", "ρ", "signs", "error"]
    headers += ["overlap"] * overlaps + ["cells"]
    print_table(title, headers, rows, blocks=True)
    say(
        "r: Pearson's, over all cells; r rest: without the one of the largest effect; ρ "
        "(Spearman's) and share of right signs: over effects above rounding and 1 % of the gap"
    )
    if frame["hangs"].any():
        say(
            "*: one cell decides r: it has more than half of the squared effects, or r moves by "
            "more than 0.1 without it"
        )
    return frame


def _as_met(kinds: Any) -> Any:
    """Sorts rows of the same kind together, in the order in which kinds first come."""
    order = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
    return kinds.map(order)


# -- options ---------------------------------------------------------------------------------------


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
        with _written(unfinished):
            save(circuit, unfinished)
        raise KeyboardInterrupt(
            f"the search so far, {size(circuit)} edges that are not cut, is kept in "
            f"{str(unfinished)!r}; run the same command again to go on, or delete that file to "
            "start anew"
        )
    unfinished.unlink(missing_ok=True)
    return connect(circuit)


def _called(model: str) -> str:
    """The name of a model that results carry."""
    return Path(model).name or model


def _shown(model: Any) -> str:
    """A booted model's name, and how its weights were stored if they were quantised."""
    from relp.bridge import quantization

    return ", ".join(filter(None, (_called(model.cfg.model_name), quantization(model))))


# -- files -----------------------------------------------------------------------------------------


def _check_folder(folder: Path) -> None:
    """Refuses an output folder that could not be made or written, before the work starts."""
    there = next(p for p in (folder, *folder.parents, Path("/")) if p.exists())
    reason = ""
    if not there.is_dir():
        reason = os.strerror(errno.EEXIST if there == folder else errno.ENOTDIR)
    elif not os.access(there, os.W_OK):
        reason = f"{str(there)!r} is read-only"
    if reason:
        raise OSError(
            f"`--out` must be a folder that can be written; {str(folder)!r} cannot ({reason}); "
            "choose another"
        )


@contextmanager
def _written(out: Path) -> Iterator[None]:
    """What the system says against writing, as a sentence that names the output."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # a sentence of our own
            raise
        raise OSError(
            f"`--out` must be a place that can be written; {str(out)!r} cannot "
            f"({os.strerror(error.errno)}); make room there, or choose another"
        ) from error


@contextmanager
def _claimed(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """The output of a sweep is this run's alone; gives the file that keeps what is measured."""
    from filelock import FileLock, Timeout

    if out.suffix != ".safetensors":
        raise ValueError(
            f"`--out` must be a .safetensors file; got {out.name!r}; change the suffix"
        )
    if not out.parent.is_dir():
        raise OSError(
            f"`--out` must lie in an existing folder; {str(out.parent)!r} is none; create it first"
        )
    finished = out.with_suffix(".part.safetensors")
    lock = FileLock(finished.with_suffix(".lock"))
    with _written(out):
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"`--out` must be a file that no other run writes; one is at work on {str(out)!r}; "
                "wait for it, or give another --out"
            ) from error
    try:
        if out.exists() and not overwrite:
            raise FileExistsError(
                f"`--out` must be a new file; {str(out)!r} exists already; give another --out, or "
                "--overwrite"
            )
        yield finished
    finally:
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


@contextmanager
def _going_on(out: Path, finished: Path) -> Iterator[None]:
    """What stops a sweep is told in words of the command line, with what is kept of it."""
    try:
        with _written(out):
            yield
    except ValueError as error:
        if not str(error).startswith("`resume`"):
            raise
        reason = str(error).split("; ", 1)[1].rpartition("; ")[0]
        raise ValueError(
            f"{str(finished)!r} must be what an interrupted run of the same options left; it is "
            f"not ({reason}); give the options of then, another `--out`, or delete the file"
        ) from error
    except KeyboardInterrupt as stop:
        if not finished.exists():
            raise KeyboardInterrupt(
                "nothing was measured yet; run the same command again"
            ) from stop
        from safetensors import safe_open

        with safe_open(finished, framework="np") as file:
            effects = file.get_tensor("effects")
        raise KeyboardInterrupt(
            f"{(effects == effects).mean():.0%} of the effects are measured and kept in "
            f"{str(finished)!r}; run the same command again to go on"
        ) from stop
