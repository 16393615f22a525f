"""`relp export`, `relp draw`, `relp explore`: circuits and scores from file to file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from circuits.choices import FIGURES, MIB, SUFFIXES
from circuits.cli.options import Json
from circuits.cli.outputs import written
from circuits.cli.screen import answering, say
from tasks import zoo

__all__ = ["draw", "explore", "export"]

SCORES = ".safetensors"

Title = Annotated[str | None, typer.Option(help="In place of model, task and rules.")]
Edges = Annotated[
    int | None,
    typer.Option(min=1, help="Only the circuit of that many edges with the largest |score|."),
]


def export(
    source: Annotated[Path, typer.Argument(help="A circuit's file.")],
    target: Annotated[Path, typer.Argument(help=f"File to write: {' '.join(SUFFIXES)}.")],
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
    title: Title = None,
    as_json: Json = False,
) -> None:
    """Convert a circuit from one file format to another, by the names of the files."""
    with answering(as_json) as answer:
        _check(source, target, SUFFIXES)
        reads, writes = source.name.endswith(MIB), target.name.endswith(MIB)
        if (in_graph and not reads) or (model and not (reads or writes)):
            raise ValueError(
                f"`--in-graph` is for reading {MIB} and `--model` for reading or writing it; got "
                f"{source.name!r} and {target.name!r}; leave the option out"
            )
        from circuits import from_mib, load, save

        bridge = zoo.load(model) if model else None
        graph = from_mib(source, bridge, in_graph=in_graph) if reads else load(source)
        if writes and bridge is None:
            bridge = zoo.load(graph.graph["model"])
        with written(target):
            save(graph, target, title=title, model=bridge if writes else None)
        _wrote(answer, target)


def draw(
    sources: Annotated[
        list[Path],
        typer.Argument(help="Files of scores or effects (.safetensors), or one of a circuit."),
    ],
    against: Annotated[
        Path | None, typer.Option(help="Effects (.safetensors) to compare the scores with.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="Of scores of nodes: resid, head, mlp …; of edges: q, k, v, in, layer or "
            "distribution."
        ),
    ] = None,
    edges: Edges = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write: .html, .svg, .png, .pdf …; if not given, .svg of a circuit and "
            ".html of scores, beside the source."
        ),
    ] = None,
    title: Title = None,
    as_json: Json = False,
) -> None:
    """Draw a circuit, scores, or scores against measured effects."""
    with answering(as_json) as answer:
        is_circuit = edges is not None or not sources[0].name.endswith(SCORES)
        if is_circuit and (len(sources) > 1 or against or kind):
            raise ValueError(
                "a circuit must be drawn by itself; got more files, --against or --kind; draw "
                "scores (.safetensors) without --edges, or leave these out"
            )
        target = out or sources[0].with_suffix(".svg" if is_circuit else ".html")
        for source in (*sources, *([against] if against else [])):
            _check(source, target, SUFFIXES if is_circuit else FIGURES)

        from circuits import draw, save

        read = [_read(source) for source in sources]
        if is_circuit:
            what = _strongest(read[0], edges)
        else:
            effects = None if against is None else _read(against)
            what = draw(read[0] if len(read) == 1 else read, effects, kind=kind)
        with written(target):
            save(what, target, title=title)
        _wrote(answer, target)


def explore(
    source: Annotated[
        Path, typer.Argument(help="A circuit's file, or scores of edges (.safetensors).")
    ],
    edges: Edges = None,
    out: Annotated[
        Path | None, typer.Option(help="The page; if not given, .html beside the source.")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    title: Title = None,
    as_json: Json = False,
) -> None:
    """Write the page on which a circuit is explored; it needs no network."""
    with answering(as_json) as answer:
        target = out or source.with_suffix(".html")
        _check(source, target, (".html",))
        if source.name.endswith(SCORES) and edges is None:
            raise ValueError(
                "of scores `--edges` must say how many of the strongest make the circuit; got "
                "none; for instance --edges 100"
            )
        from circuits import save

        circuit = _strongest(_read(source), edges)
        with written(target):
            save(circuit, target, title=title)
        _wrote(answer, target)
        if show:
            typer.launch(str(target))


def _read(path: Path) -> Any:
    """What is in a file: scores, effects or a circuit."""
    from circuits import load
    from relp import Scores

    return Scores.load(path) if path.name.endswith(SCORES) else load(path)


def _strongest(what: Any, edges: int | None) -> Any:
    """A circuit of the strongest edges; all that there are if nobody says how many."""
    from circuits import top

    return what if edges is None else top(what, edges=edges)


def _check(source: Path, target: Path, known: Sequence[str]) -> None:
    """Refuses what cannot be read or written, before anything is imported for it."""
    if not source.is_file():
        raise FileNotFoundError(
            f"what is read must be a file; there is no file {str(source)!r}; check the name"
        )
    if not target.name.endswith(tuple(known)):
        raise ValueError(
            f"the file to write must end in one of {' '.join(known)}; got {target.name!r}; choose "
            "another name"
        )
    if target.resolve() == source.resolve():
        raise ValueError(
            f"the file to write must be another than what is read; got {str(target)!r}; give "
            "another name"
        )
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"the file to write must lie in an existing folder; {str(target.parent)!r} is none; "
            "create it first"
        )


def _wrote(answer: dict[str, Any], path: Path) -> None:
    answer.setdefault("files", []).append(str(path))
    say(f"wrote {escape(str(path))}")
