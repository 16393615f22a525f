"""What a benchmark found: an entry for each method and case, tables of them, and statistics.

Intervals are over pairs, drawn again in each case; tests swap two methods within random pairs of
every case. The cases stay as they are: nothing is said of other models or tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from circuits.judge.areas import areas
from circuits.judge.evaluation import Evaluation
from circuits.judge.measures import percentiles
from circuits.judge.resampling import holm, p_value, random_swaps, resamples
from circuits.judge.tables import markdown

__all__ = ["AGREEMENT", "MEASURES", "Bench", "Entry", "by_case"]

Samples = Float[np.ndarray, " sample"]
AGREEMENT = ("pearson", "spearman", "signs", "relative_error")
KNOWN, CIRCUITS, COST = ("auroc", "average_precision"), ("CPR", "CMD"), ("node cost", "edge cost")
MEASURES = (*KNOWN, *AGREEMENT, *CIRCUITS, *COST)
"""What is measured: of true edges, of exact effects, of circuits, and of seconds."""
LOWER = ("relative_error", "CMD", "node cost", "edge cost")
"""The measures of which less is better."""


@dataclass(frozen=True, eq=False)
class Entry:
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

    def apart(self, other: Entry, measure: str, seed: int) -> Samples:
        """The difference from another method, and behind it what it is when pairs are swapped."""
        if measure in KNOWN:
            return _recovery_apart(self, other, seed)[:, KNOWN.index(measure)]
        if measure in CIRCUITS:
            both = self.evaluation.swapped_areas(other.evaluation, seed)
            return both[:, CIRCUITS.index(measure)]
        one, two = (np.array(entry.agreement[measure]) for entry in (self, other))
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
def _recovery(entry: Entry, seed: int) -> Float[np.ndarray, "sample area"]:
    """Areas of the mean scores of all pairs, and of those of samples of pairs."""
    table = np.array(entry.scores)
    weights = np.full((1, len(table)), 1 / len(table))
    if len(table) > 1:
        weights = np.concatenate([weights, resamples(len(table), seed)])
    return areas(abs(weights @ table), np.array(entry.true))


@cache
def _recovery_apart(one: Entry, other: Entry, seed: int) -> Float[np.ndarray, "swap area"]:
    """Differences of the areas, the two methods' scores swapped within random pairs.

    Scores of both are brought to one scale first, as methods differ in theirs.
    """
    tables = [np.array(entry.scores) / (abs(np.array(entry.scores)).mean() or 1)
              for entry in (one, other)]  # fmt: skip
    if len({table.shape for table in tables}) > 1:
        return np.full((1, len(KNOWN)), np.nan)
    swapped = random_swaps(len(tables[0]), seed).astype(float)
    moved = swapped @ (tables[1] - tables[0])
    first, second = (
        areas(abs(table.sum(0) + sign * moved), np.array(one.true))
        for table, sign in zip(tables, (1, -1), strict=True)
    )
    return first - second


@dataclass(frozen=True, eq=False)
class Bench:
    """The entries of a grid of methods and cases."""

    entries: tuple[Entry, ...]

    @property
    def methods(self) -> list[str]:
        """In the order in which they ran."""
        return list(dict.fromkeys(entry.method for entry in self.entries))

    @property
    def groups(self) -> list[str]:
        """Of cases."""
        return list(dict.fromkeys(entry.group for entry in self.entries))

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per case, method and measure: its value and 95 % interval over pairs."""
        rows = []
        for entry in self.entries:
            for measure in filter(entry.has, MEASURES):
                samples = entry.samples(measure, seed)
                low, high = percentiles(samples[1:])
                rows.append((entry.group, entry.case, entry.method, measure, samples[0], low, high))
        columns = ["group", "case", "method", "measure", "value", "low", "high"]
        return pd.DataFrame(rows, columns=columns)

    def summary(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per group, method and measure: the mean over cases, with its 95 % interval.

        Pairs are drawn again in each case; the cases stay. Cases without the measure, or where a
        method has none, are left out: `cases` says how many there are.
        """
        return _summary(self, seed).copy()

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
        return _tests(self, baseline, seed).copy()

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
            raise ValueError(f"the group must be one of {self.groups}; got {group!r}; see `groups`")
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
            cases = len({entry.case for entry in self.entries if entry.group == group})
            table = self.overview(group, baseline=baseline, intervals=True, seed=seed)
            parts.append(f"**{group}**, mean over {cases} cases\n\n{markdown(table.reset_index())}")
        if any(entry.true for entry in self.entries):
            wide = self.by_case("auroc").map(lambda v: "-" if np.isnan(v) else f"{v:.2f}")
            whole = markdown(wide.reset_index())
            parts.append(f"**Area under the ROC curve of the true edges**\n\n{whole}")
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
        return by_case(self.table().query("measure == @measure"))

    def grid(self) -> Iterator[tuple[str, str, str]]:
        """Every group, method and measure."""
        for group in self.groups:
            for measure in MEASURES:
                for method in self.methods:
                    yield group, method, measure

    def of(self, group: str, method: str, measure: str) -> list[Entry]:
        """The entries of a group and a method that have a measure."""
        return [
            entry
            for entry in self.entries
            if (entry.group, entry.method) == (group, method) and entry.has(measure)
        ]


@cache
def _summary(found: Bench, seed: int) -> pd.DataFrame:
    rows = []
    for group, method, measure in found.grid():
        entries = found.of(group, method, measure)
        each = [entry.samples(measure, seed + i) for i, entry in enumerate(entries)]
        each = [samples for samples in each if not np.isnan(samples[0])]
        if each:
            samples = _mean_over_cases(each)
            low, high = percentiles(samples[1:])
            rows.append((group, method, measure, samples[0], low, high, len(each)))
    columns = ["group", "method", "measure", "value", "low", "high", "cases"]
    return pd.DataFrame(rows, columns=columns)


@cache
def _tests(found: Bench, baseline: str, seed: int) -> pd.DataFrame:
    rows = []
    for group, method, measure in found.grid():
        if method == baseline or measure in COST:
            continue
        theirs = {entry.case: entry for entry in found.of(group, baseline, measure)}
        each = [
            entry.apart(theirs[entry.case], measure, seed + i)
            for i, entry in enumerate(found.of(group, method, measure))
            if entry.case in theirs
        ]
        each = [apart for apart in each if not np.isnan(apart[0])]
        if each:
            apart = _mean_over_cases(each)
            p = float(p_value(apart[:, None])[0]) if len(apart) > 1 else np.nan
            rows.append((group, method, baseline, measure, apart[0], len(each), p))
    columns = ["group", "method", "baseline", "measure", "difference", "cases", "p_value"]
    table = pd.DataFrame(rows, columns=columns)
    table["p_holm"] = holm(table["p_value"].to_numpy(dtype=float))
    return table


def _mean_over_cases(each: Sequence[Samples]) -> Samples:
    """As many samples as all have: one alone if some case has no more."""
    many = min(map(len, each))
    return np.mean([samples[:many] for samples in each], axis=0)


def by_case(table: pd.DataFrame) -> pd.DataFrame:
    """Of some rows of `Bench.table`, one measure's: a row per method, a column per case."""
    wide = table.pivot(index="method", columns="case", values="value")
    methods, cases = (list(dict.fromkeys(table[name])) for name in ("method", "case"))
    return wide.reindex(index=methods, columns=cases)


# -- tables ----------------------------------------------------------------------------------------


def _text(row: Any, intervals: bool) -> str:
    text = f"{row.value:.1f}×" if row.measure in COST else f"{row.value:.2f}"
    return f"{text} [{row.low:.2f}, {row.high:.2f}]" if intervals and row.low == row.low else text
