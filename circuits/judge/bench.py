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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from circuits.engines.local import Engine
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
    engine: Engine | None = None,
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
        engine: who does the cases, such as a `circuits.engines.RayEngine` without a recipe: each
            worker does a case at a time, whose entries are kept when all of them are done. Costs
            are ratios of its own times. This process if None.
        progress: show a bar over the entries that are to do.

    Raises:
        ValueError: the folder holds entries of other options, or a method gives other scores than
            it was asked for. With an engine also what that refuses.
        OSError: the folder cannot be written.
    """
    home = Path(folder)
    _must_be_ours(home, dict(options or {}))
    todo = [one for case in cases if (one := _Todo.of(home, case, methods)).methods]
    total = sum(len(one.methods) for one in todo)
    with tqdm(total=total, unit="entry", disable=not progress) as bar:
        if engine is None:
            for one in todo:
                bar.set_description(str(one))
                _keep(home, one, _judged(one), bar)
        else:
            with engine.working(_judging) as answers:
                for (one,), found in answers([one] for one in todo):
                    bar.set_description(str(one))
                    _keep(home, one, found, bar)
    entries = [
        Entry(**json.loads(_file(home, case, method).read_text(encoding="utf-8")))
        for case in cases
        for method in methods.values()
        if _file(home, case, method).exists()
    ]
    return Bench(tuple(entries))


class _Todo(NamedTuple):
    """What is to do of a case."""

    case: Case
    methods: tuple[Method, ...]
    effect: Scores | None
    """The exact effects of its nodes, if they are known."""

    @classmethod
    def of(cls, home: Path, case: Case, methods: Mapping[str, Method]) -> _Todo:
        """What the folder does not hold."""
        missing = tuple(
            m
            for m in methods.values()
            if not (m.measures and case.large) and not _file(home, case, m).exists()
        )
        known = _folder(home, case) / EFFECTS
        return cls(case, missing, Scores.load(known) if missing and known.exists() else None)

    def __str__(self) -> str:
        return self.case.name


def _keep(home: Path, one: _Todo, found: Iterable[Scores | Entry], bar: Any) -> None:
    """Writes what comes of a case, as it comes."""
    _folder(home, one.case).mkdir(parents=True, exist_ok=True)
    for what in found:
        if isinstance(what, Scores):
            what.save(_folder(home, one.case) / EFFECTS)
            continue
        file = _file(home, one.case, next(m for m in one.methods if m.name == what.method))
        with written_whole(file) as temporary:
            temporary.write_text(json.dumps(asdict(what)), encoding="utf-8")
        bar.update()


def _judging(_: object, __: object) -> Callable[[list[_Todo]], list[Scores | Entry]]:
    """What judges the methods on a case in a worker."""
    return lambda piece: list(_judged(*piece))


def _judged(todo: _Todo) -> Iterator[Scores | Entry]:
    """The exact effects of nodes, if they are new, and the entries of one case.

    All scores come first, as the sample of effects depends on them.
    """
    case, methods, effect = todo
    it = case.load()
    it.model(it.task.select([0]).clean.to(Sites.of(it.model).device))  # the first sets it up
    least = floor(it.model, it.task)
    nodes = {m.name: _scored(m, it, "node") for m in methods if m.nodes}
    if effect is None and nodes:
        effect = _effects(case, it, [scores for scores, _ in nodes.values()])
        yield effect
    for method in methods:
        edges, took = _scored(method, it, "edge")
        cost = {"edge cost": took / least}
        agreement: dict[str, list[float]] = {}
        if method.name in nodes:
            scores, of_nodes = nodes[method.name]
            cost["node cost"] = of_nodes / least
            agreement = _agreement(scores, effect)
        found = evaluate(it.model, it.others, edges, random=0, progress=False)
        yield Entry(
            case.name, case.group, method.name, cost, *_known(method, it, edges), agreement,
            list(found.sizes), found.metric[0].tolist(), found.clean.tolist(),
            found.corrupt.tolist(),
        )  # fmt: skip


def _scored(method: Method, it: Loaded, level: str) -> tuple[Scores, float]:
    """What a method gives, and the seconds it takes."""
    found, took = seconds(lambda: method.scores(it.model, it.task, level, it.direction))
    if not isinstance(found, Scores) or found.level != level:
        raise ValueError(
            f"a method must give Scores of the level that it is asked for; {method.name!r} gave "
            f"{type(found).__name__} for {level!r}; return attribute(model, task, level=level, …)"
        )
    return found, took


def _effects(case: Case, it: Loaded, scores: Sequence[Scores]) -> Scores:
    """The exact effects of nodes, of a sample of them in a large model."""
    from circuits.exact.patch import patch
    from circuits.exact.verify import verify

    if case.large:
        return verify(it.model, it.task, scores, progress=False)
    return patch(it.model, it.task, direction=it.direction, progress=False)


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
