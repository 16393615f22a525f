"""A benchmark: every method on every case, each by what is known of it, kept as it is done.

    found = bench(cases, METHODS, folder="runs/bench")
    found.summary()                 # a row for each method: means over cases, with intervals
    found.tests(baseline="RELP")    # which differ by more than the choice of pairs
    found.table()                   # a row for each case, method and measure

A case is a model with a task. Where its circuit is known (planted circuits), scores of edges are
judged by how well they find it; on every case, scores of nodes are judged by exact effects, and
scores of edges by the faithfulness of their best edges on other pairs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from circuits.judge.agreement import by_pair
from circuits.judge.cost import floor, seconds
from circuits.judge.entries import AGREEMENT, Bench, Entry
from circuits.judge.evaluation import evaluate
from circuits.judge.known import edge_labels
from circuits.judge.methods import METHODS, Method
from relp import EdgeScores, ModelLike, Scores, TaskLike, written_whole
from relp.bridge import Sites

__all__ = ["Case", "Loaded", "bench"]

EFFECTS = "effects.safetensors"


@dataclass(frozen=True)
class Loaded:
    """What a case is made of."""

    model: ModelLike
    task: TaskLike
    others: TaskLike
    """Other pairs of the same task, on which circuits are judged."""
    direction: str = "denoise"
    edges: frozenset[str] | None = None
    """The true circuit as names `writer->reader`, if it is known."""
    hidden: frozenset[str] = frozenset()
    """Edges that are neither true nor false: they act only while others are cut."""


@dataclass(frozen=True)
class Case:
    """A model with a task, loaded when it is needed."""

    name: str
    group: str
    """What it is averaged with."""
    load: Callable[[], Loaded]
    large: bool = False
    """Whether exact effects are measured of a sample of nodes, and of no edges."""


def bench(
    cases: Sequence[Case],
    methods: Mapping[str, Method] = METHODS,
    *,
    folder: str | Path,
    options: Mapping[str, object] | None = None,
    progress: bool = True,
) -> Bench:
    """Judges every method on every case, and keeps what is done.

    >>> from circuits.judge.bench import Case, Loaded, bench
    >>> from circuits.judge.methods import METHODS
    >>> case = Case("mine", "trained", lambda: Loaded(model, task, others=task))
    >>> found = bench([case], {"RELP": METHODS["RELP"]}, folder="runs/mine")

    Args:
        cases: what the methods are judged on.
        methods: by name; a method that measures every edge is left out where the model is large.
        folder: where each entry is kept as a file; what is there is not done again. A method of
            one's own is, when its file has changed.
        options: what the cases were made with; a folder holds entries of one set of options.
        progress: show a bar over the entries that are to do.

    Raises:
        ValueError: the folder holds entries of other options, or a method gives other scores than
            it was asked for.
        OSError: the folder cannot be written.
    """
    home = Path(folder)
    _must_be_ours(home, dict(options or {}))
    todo = {
        case.name: [
            m for m in methods.values()
            if not (m.measures and case.large) and not _file(home, case, m).exists()
        ]
        for case in cases
    }  # fmt: skip
    with tqdm(total=sum(map(len, todo.values())), unit="entry", disable=not progress) as bar:
        for case in cases:
            if todo[case.name]:
                bar.set_description(case.name)
                _fill(home, case, todo[case.name], bar)
    entries = [
        Entry(**json.loads(_file(home, case, method).read_text(encoding="utf-8")))
        for case in cases
        for method in methods.values()
        if _file(home, case, method).exists()
    ]
    return Bench(tuple(entries))


def _fill(home: Path, case: Case, methods: Sequence[Method], bar: Any) -> None:
    """The entries of one case: all scores first, as the sample of effects depends on them."""
    it = case.load()
    _folder(home, case).mkdir(parents=True, exist_ok=True)
    it.model(
        it.task.select([0]).clean.to(Sites.of(it.model).device)
    )  # the first run of a model sets it up
    least = floor(it.model, it.task)
    nodes = {m.name: _scored(m, it, "node") for m in methods if m.nodes}
    effect = _effects(_folder(home, case) / EFFECTS, case, it, [s for s, _ in nodes.values()])
    for method in methods:
        edges, took = _scored(method, it, "edge")
        cost = {"edge cost": took / least}
        agreement: dict[str, list[float]] = {}
        if method.name in nodes:
            scores, of_nodes = nodes[method.name]
            cost["node cost"] = of_nodes / least
            agreement = _agreement(scores, effect)
        found = evaluate(it.model, it.others, edges, random=0, progress=False)
        entry = Entry(
            case.name, case.group, method.name, cost, *_known(method, it, edges), agreement,
            list(found.sizes), found.metric[0].tolist(), found.clean.tolist(),
            found.corrupt.tolist(),
        )  # fmt: skip
        with written_whole(_file(home, case, method)) as temporary:
            temporary.write_text(json.dumps(asdict(entry)), encoding="utf-8")
        bar.update()


def _scored(method: Method, it: Loaded, level: str) -> tuple[Scores, float]:
    """What a method gives, and the seconds it takes."""
    found, took = seconds(lambda: method.scores(it.model, it.task, level, it.direction))
    if not isinstance(found, Scores) or found.level != level:
        raise ValueError(
            f"a method must give Scores of the level that it is asked for; {method.name!r} gave "
            f"{type(found).__name__} for {level!r}; return attribute(model, task, level=level, …)"
        )
    return found, took


def _effects(path: Path, case: Case, it: Loaded, scores: Sequence[Scores]) -> Scores | None:
    """The exact effects of nodes, of a sample of them in a large model; kept in a file."""
    if not scores:
        return None
    if path.exists():
        return Scores.load(path)
    from circuits.exact.patch import patch
    from circuits.exact.verify import verify

    if case.large:
        effect: Scores = verify(it.model, it.task, scores, progress=False)
    else:
        effect = patch(it.model, it.task, direction=it.direction, progress=False)
    effect.save(path)
    return effect


def _agreement(scores: Scores, effect: Scores | None) -> dict[str, list[float]]:
    """The measures of each pair, mean over kinds of components; the embedding has one effect."""
    if effect is None:
        return {}
    kinds = [of for kind, of in by_pair(scores, effect).items() if kind != "embed"]
    return {name: _mean([of[name] for of in kinds]).tolist() for name in AGREEMENT}


def _known(method: Method, it: Loaded, scores: Scores) -> tuple[list[list[float]], list[bool]]:
    """The scores of each pair by itself, and which edges are true; nothing if that is not known."""
    if it.edges is None:
        return [], []
    each = [scores]
    if method.averages:
        each = [
            method.scores(it.model, it.task.select([i]), "edge", it.direction)
            for i in range(len(it.task))
        ]
    edges = [s.resolved() for s in each if isinstance(s, EdgeScores)]
    found = [edge_labels(s, it.edges) for s in edges]
    ranked = ~edge_labels(edges[0], it.hidden).inside
    return [of.score[ranked].tolist() for of in found], found[0].inside[ranked].tolist()


def _mean(values: Sequence[np.ndarray]) -> np.ndarray:
    """Over kinds that have it; NaN where none has."""
    table = np.stack(values)
    known = ~np.isnan(table)
    many = known.sum(0)
    return np.where(many, np.nansum(table, axis=0) / np.maximum(many, 1), np.nan)


# -- the folder ------------------------------------------------------------------------------------


def _folder(home: Path, case: Case) -> Path:
    return home / _plain(case.name)


def _file(home: Path, case: Case, method: Method) -> Path:
    name = "-".join(filter(None, (_plain(method.name), method.version)))
    return _folder(home, case) / f"{name}.json"


def _plain(name: str) -> str:
    """A name that every file system takes."""
    return re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_")


def _must_be_ours(home: Path, options: Mapping[str, object]) -> None:
    kept = home / "bench.json"
    if kept.exists():
        theirs = json.loads(kept.read_text(encoding="utf-8"))
        if theirs != options:
            differ = ", ".join(
                f"{k} {theirs.get(k)!r} there and {options.get(k)!r} now"
                for k in sorted({*theirs, *options})
                if theirs.get(k) != options.get(k)
            )
            raise ValueError(
                f"`folder` must hold entries of the same options; {str(home)!r} has {differ}; give "
                "the options of then, another folder, or delete it"
            )
        return
    home.mkdir(parents=True, exist_ok=True)
    with written_whole(kept) as temporary:
        temporary.write_text(json.dumps(options), encoding="utf-8")
