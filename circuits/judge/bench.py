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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from tqdm.auto import tqdm

from circuits.judge.agreement import by_pair
from circuits.judge.cost import floor, seconds
from circuits.judge.evaluation import Evaluation, evaluate
from circuits.judge.known import areas, edge_labels
from circuits.judge.measures import percentiles
from circuits.judge.methods import METHODS, Method
from circuits.judge.resampling import holm, p_value, random_swaps, resamples
from relp import EdgeScores, ModelLike, Scores, TaskLike, written_whole

__all__ = ["MEASURES", "Bench", "Case", "Loaded", "bench"]

Samples = Float[np.ndarray, " sample"]
AGREEMENT = ("pearson", "spearman", "signs", "relative_error")
KNOWN, CIRCUITS, COST = ("auroc", "average_precision"), ("CPR", "CMD"), ("node cost", "edge cost")
MEASURES = (*KNOWN, *AGREEMENT, *CIRCUITS, *COST)
"""What is measured: of true edges, of exact effects, of circuits, and of seconds."""
LOWER = ("relative_error", "CMD", "node cost", "edge cost")
"""The measures of which less is better."""
EFFECTS = "effects.safetensors"
DRAWS = 999
"""Samples of pairs for areas over edges, which are ranked anew in each."""


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


@dataclass(frozen=True, eq=False)
class Cell:
    """What is known of one method on one case; lists have an entry for each pair."""

    case: str
    group: str
    method: str
    cost: dict[str, float]
    """Seconds of scoring nodes and edges, as multiples of the floor."""
    scores: list[list[float]] = field(default_factory=list)
    """Of edges, where the true ones are known; a single row if the method knows no single pair."""
    true: list[bool] = field(default_factory=list)
    """Which of the edges are."""
    agreement: dict[str, list[float]] = field(default_factory=dict)
    sizes: list[float] = field(default_factory=list)
    metric: list[list[float]] = field(default_factory=list)
    clean: list[float] = field(default_factory=list)
    corrupt: list[float] = field(default_factory=list)

    def has(self, measure: str) -> bool:
        """Whether the measure was taken here."""
        if measure in KNOWN:
            return bool(self.true)
        if measure in CIRCUITS:
            return bool(self.metric)
        return measure in (self.cost if measure in COST else self.agreement)

    def samples(self, measure: str, seed: int) -> Samples:
        """The measure, and behind it what it is in bootstrap samples of the pairs."""
        if measure in COST:
            return np.array([self.cost[measure]])
        if measure in KNOWN:
            return _recovery(self, seed)[:, KNOWN.index(measure)]
        if measure in CIRCUITS:
            return self.evaluation.area_samples(seed)[:, 0, CIRCUITS.index(measure)]
        values = np.array(self.agreement[measure])
        values = values[~np.isnan(values)]
        if not len(values):
            return np.array([np.nan])
        return np.append(values.mean(), resamples(len(values), seed) @ values)

    def apart(self, other: Cell, measure: str, seed: int) -> Samples:
        """The difference from another method, and behind it what it is when pairs are swapped."""
        if measure in KNOWN:
            return _recovery_apart(self, other, seed)[:, KNOWN.index(measure)]
        if measure in CIRCUITS:
            both = self.evaluation.swapped_areas(other.evaluation, seed)
            return both[:, CIRCUITS.index(measure)]
        one, two = (np.array(cell.agreement[measure]) for cell in (self, other))
        differences = (one - two)[~np.isnan(one - two)]
        if not len(differences):
            return np.array([np.nan])
        signs = 1 - 2.0 * random_swaps(len(differences), seed)
        return signs @ differences / len(differences)

    @cached_property
    def evaluation(self) -> Evaluation:
        """The metric of its circuits, by size and pair."""
        return Evaluation(
            model=self.case, task=self.case, rules=(self.method,), sizes=tuple(self.sizes),
            edges=torch.zeros(1, len(self.sizes), dtype=torch.long),
            metric=torch.tensor(self.metric)[None], clean=torch.tensor(self.clean),
            corrupt=torch.tensor(self.corrupt), signed=False,
        )  # fmt: skip


@cache
def _recovery(cell: Cell, seed: int) -> Float[np.ndarray, "sample area"]:
    """Areas of the mean scores of all pairs, and of those of samples of pairs."""
    table = np.array(cell.scores)
    even = np.full((1, len(table)), 1 / len(table))
    return _areas(np.concatenate([even, resamples(len(table), seed)[:DRAWS]]) @ table, cell.true)


def _recovery_apart(one: Cell, other: Cell, seed: int) -> Float[np.ndarray, "swap area"]:
    """Differences of the areas, the two methods' scores swapped within random pairs.

    Scores of both are brought to one scale first, as methods differ in theirs.
    """
    tables = [np.array(cell.scores) / (abs(np.array(cell.scores)).mean() or 1)
              for cell in (one, other)]  # fmt: skip
    if len({table.shape for table in tables}) > 1:
        return np.full((1, len(KNOWN)), np.nan)
    swapped = random_swaps(len(tables[0]), seed)[: 1 + DRAWS].astype(float)
    moved = swapped @ (tables[1] - tables[0])
    first, second = (
        _areas(table.sum(0) + sign * moved, one.true)
        for table, sign in zip(tables, (1, -1), strict=True)
    )
    return first - second


def _areas(scores: Float[np.ndarray, "row edge"], true: Sequence[bool]) -> np.ndarray:
    inside = np.array(true)
    found = [areas(row, inside) for row in abs(scores)]
    return np.where(np.isnan(scores).any(1)[:, None], np.nan, found)


@dataclass(frozen=True, eq=False)
class Bench:
    """The cells of a grid of methods and cases."""

    cells: tuple[Cell, ...]

    @property
    def methods(self) -> list[str]:
        """In the order in which they ran."""
        return list(dict.fromkeys(cell.method for cell in self.cells))

    @property
    def groups(self) -> list[str]:
        """Of cases."""
        return list(dict.fromkeys(cell.group for cell in self.cells))

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per case, method and measure: its value and 95 % interval over pairs."""
        rows = []
        for cell in self.cells:
            for measure in filter(cell.has, MEASURES):
                samples = cell.samples(measure, seed)
                low, high = percentiles(samples[1:])
                rows.append((cell.group, cell.case, cell.method, measure, samples[0], low, high))
        columns = ["group", "case", "method", "measure", "value", "low", "high"]
        return pd.DataFrame(rows, columns=columns)

    def summary(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per group, method and measure: the mean over cases, with its 95 % interval.

        Pairs are drawn again in each case; the cases stay. Cases without the measure, or where a
        method has none, are left out: `cases` says how many there are.
        """
        rows = []
        for group, method, measure in self._grid():
            cells = self._cells(group, method, measure)
            each = [cell.samples(measure, seed + i) for i, cell in enumerate(cells)]
            each = [samples for samples in each if not np.isnan(samples[0])]
            if each:
                samples = _mean_over_cases(each)
                low, high = percentiles(samples[1:])
                rows.append((group, method, measure, samples[0], low, high, len(each)))
        columns = ["group", "method", "measure", "value", "low", "high", "cases"]
        return pd.DataFrame(rows, columns=columns)

    def tests(self, *, baseline: str = "GRADIENT", seed: int = 0) -> pd.DataFrame:
        """Whether methods differ from a baseline by more than the choice of pairs.

        One row per group, method and measure (cost has no pairs): `difference` of the means over
        the cases that both have, two-sided `p_value` of the permutation test that swaps the two
        within random pairs of every case (9,999 times), and `p_holm`, corrected by Holm's method
        for all tests of the table. The cases stay as they are.

        Raises:
            ValueError: the baseline is none of the methods.
        """
        if baseline not in self.methods:
            raise ValueError(
                f"`baseline` must be one of {self.methods}; got {baseline!r}; see `methods`"
            )
        rows = []
        for group, method, measure in self._grid():
            if method == baseline or measure in COST:
                continue
            theirs = {cell.case: cell for cell in self._cells(group, baseline, measure)}
            each = [
                cell.apart(theirs[cell.case], measure, seed + i)
                for i, cell in enumerate(self._cells(group, method, measure))
                if cell.case in theirs
            ]
            each = [apart for apart in each if not np.isnan(apart[0])]
            if each:
                apart = _mean_over_cases(each)
                p = float(p_value(apart[:, None])[0]) if len(apart) > 1 else np.nan
                rows.append((group, method, baseline, measure, apart[0], len(each), p))
        columns = ["group", "method", "baseline", "measure", "difference", "cases", "p_value"]
        found = pd.DataFrame(rows, columns=columns)
        found["p_holm"] = holm(found["p_value"].to_numpy(dtype=float))
        return found

    def overview(
        self, group: str, *, baseline: str = "GRADIENT", intervals: bool = False, seed: int = 0
    ) -> pd.DataFrame:
        """One row per method, one column per measure, as text; `-` where there is none.

        `+` marks what is better than the baseline, and `!` what is worse, at the level of 5 % for
        all tests of the table together; nothing is marked without the baseline.

        Raises:
            ValueError: there is no such group.
        """
        if group not in self.groups:
            raise ValueError(f"the group must be one of {self.groups}; got {group!r}")
        found = self.summary(seed=seed).query("group == @group")
        marks: dict[tuple[str, str], str] = {}
        if baseline in self.methods:
            sure = self.tests(baseline=baseline, seed=seed).query(
                "group == @group and p_holm < 0.05"
            )
            for row in sure.itertuples():
                better = (row.difference > 0) != (row.measure in LOWER)
                marks[row.method, row.measure] = "+" if better else "!"
        texts = {
            (row.method, row.measure): _text(row, intervals)
            + marks.get((row.method, row.measure), "")
            for row in found.itertuples()
        }
        measures = [m for m in MEASURES if m in set(found["measure"])]
        methods = [m for m in self.methods if m in set(found["method"])]
        return pd.DataFrame(
            [[texts.get((method, m), "-") for m in measures] for method in methods],
            index=pd.Index(methods, name="method"), columns=measures,
        )  # fmt: skip

    def to_markdown(self, *, baseline: str = "GRADIENT", seed: int = 0) -> str:
        """The tables of all groups, with intervals, and how the edges of each circuit are found."""
        parts = []
        for group in self.groups:
            cases = len({cell.case for cell in self.cells if cell.group == group})
            table = self.overview(group, baseline=baseline, intervals=True, seed=seed)
            parts.append(f"**{group}**, mean over {cases} cases\n\n{_markdown(table)}")
        if any(cell.true for cell in self.cells):
            wide = self.by_case("auroc").map(lambda v: "-" if np.isnan(v) else f"{v:.2f}")
            parts.append(f"**Area under the ROC curve of the true edges**\n\n{_markdown(wide)}")
        return "\n\n".join(parts) + "\n"

    def by_case(self, measure: str) -> pd.DataFrame:
        """One row per method, one column per case that has the measure.

        Raises:
            ValueError: there is no such measure.
        """
        if measure not in MEASURES:
            raise ValueError(
                f"the measure must be one of {', '.join(MEASURES)}; got {measure!r}; see `table`"
            )
        table = self.table().query("measure == @measure")
        wide = table.pivot(index="method", columns="case", values="value")
        cases = list(dict.fromkeys(table["case"]))
        return wide.reindex(index=[m for m in self.methods if m in wide.index], columns=cases)

    def _grid(self) -> Iterator[tuple[str, str, str]]:
        for group in self.groups:
            for measure in MEASURES:
                for method in self.methods:
                    yield group, method, measure

    def _cells(self, group: str, method: str, measure: str) -> list[Cell]:
        return [
            cell
            for cell in self.cells
            if (cell.group, cell.method) == (group, method) and cell.has(measure)
        ]


def _mean_over_cases(each: Sequence[Samples]) -> Samples:
    """As many samples as all have: one alone if some case has no more."""
    many = min(map(len, each))
    return np.mean([samples[:many] for samples in each], axis=0)


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
        folder: where each cell is kept as a file; what is there is not done again.
        options: what the cases were made with; a folder holds cells of one set of options.
        progress: show a bar over the cells that are to do.

    Raises:
        ValueError: the folder holds cells of other options, or a method gives other scores than it
            was asked for.
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
    with tqdm(total=sum(map(len, todo.values())), unit="cell", disable=not progress) as bar:
        for case in cases:
            if todo[case.name]:
                bar.set_description(case.name)
                _fill(home, case, todo[case.name], bar)
    cells = [
        Cell(**json.loads(_file(home, case, method).read_text(encoding="utf-8")))
        for case in cases
        for method in methods.values()
        if _file(home, case, method).exists()
    ]
    return Bench(tuple(cells))


def _fill(home: Path, case: Case, methods: Sequence[Method], bar: Any) -> None:
    """The cells of one case: all scores first, as the sample of effects depends on them."""
    it = case.load()
    (home / case.name).mkdir(parents=True, exist_ok=True)
    it.model(it.task.select([0]).clean)  # the first run of a model sets it up
    least = floor(it.model, it.task)
    nodes = {m.name: _scored(m, it, "node") for m in methods if m.nodes}
    effect = _effects(home / case.name / EFFECTS, case, it, [s for s, _ in nodes.values()])
    for method in methods:
        edges, took = _scored(method, it, "edge")
        cost = {"edge cost": took / least}
        agreement: dict[str, list[float]] = {}
        if method.name in nodes:
            scores, of_nodes = nodes[method.name]
            cost["node cost"] = of_nodes / least
            agreement = _agreement(scores, effect)
        found = evaluate(it.model, it.others, edges, random=0, progress=False)
        cell = Cell(
            case.name, case.group, method.name, cost, *_known(method, it, edges), agreement,
            list(found.sizes), found.metric[0].tolist(), found.clean.tolist(),
            found.corrupt.tolist(),
        )  # fmt: skip
        with written_whole(_file(home, case, method)) as temporary:
            temporary.write_text(json.dumps(asdict(cell)), encoding="utf-8")
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


# -- tables ----------------------------------------------------------------------------------------


def _text(row: Any, intervals: bool) -> str:
    text = f"{row.value:.1f}×" if row.measure in COST else f"{row.value:.2f}"
    return f"{text} [{row.low:.2f}, {row.high:.2f}]" if intervals and row.low == row.low else text


def _markdown(table: pd.DataFrame) -> str:
    lines = [[table.index.name or "", *table.columns], ["---"] * (1 + len(table.columns))]
    lines += [[str(name), *row] for name, row in zip(table.index, table.to_numpy(), strict=True)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# -- the folder ------------------------------------------------------------------------------------


def _file(home: Path, case: Case, method: Method) -> Path:
    name = "".join(c if c.isalnum() else "_" for c in method.name)
    return home / case.name / f"{name}.json"


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
                f"`folder` must hold cells of the same options; {str(home)!r} has {differ}; give "
                "the options of then, another folder, or delete it"
            )
        return
    home.mkdir(parents=True, exist_ok=True)
    with written_whole(kept) as temporary:
        temporary.write_text(json.dumps(options), encoding="utf-8")
