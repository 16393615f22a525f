"""Circuits of features: what a model does with some features of dictionaries alone.

The run is the clean one. At each site with a dictionary the features of the circuit keep the value
that they have in the run as it is by then; the others, and what the features leave over (the
errors, with features that no scores name) unless it is kept, get the value of an ablation. Source:
Marks et al. 2024, arXiv:2403.19647, where errors are nodes too; here they are kept everywhere or
nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.choices import check_ablation
from circuits.exact.runs import ablation_means
from circuits.graph import check_circuit
from circuits.judge.evaluation import paired, shares_of_gap
from circuits.judge.resampling import interval, resamples
from circuits.masked import doubt
from relp import Component, ModelLike, NodeScores, TaskLike
from relp.bridge import (
    Edit,
    Features,
    Sites,
    answers_only,
    as_fits,
    divisions,
    editing,
    features_of,
    observe,
    precise_logits,
    prompts_per_run,
    undisturbed,
    warn_caller,
)

__all__ = ["evaluate_features"]

SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


@undisturbed
def evaluate_features(
    model: ModelLike,
    task: TaskLike,
    scores: NodeScores | nx.MultiDiGraph | Sequence[NodeScores | nx.MultiDiGraph],
    *,
    features: Mapping[str, Any],
    sizes: Sequence[int] = SIZES,
    ablation: str = "patch",
    random: int = 1,
    against: str = "",
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Faithfulness and completeness of the features with the largest |score|, by their number.

    >>> scores = attribute(model, task, features=dictionaries, components="feature")
    >>> table = evaluate_features(model, task, scores, features=dictionaries, sizes=(5, 20))
    >>> faithfulness = table[["rules", "features", "errors", "faithfulness", "low", "high"]]

    A feature's score is summed over positions and averaged over pairs; it is kept at all positions.
    Faithfulness is (m(C) - m(∅)) / (m(full) - m(∅)): `m` is the task's metric averaged over pairs,
    full the clean run, ∅ the run in which all features and errors are ablated. Completeness is that
    of all others without the circuit: near 0 if it holds all that does the task.

    Args:
        model: the `TransformerBridge` that the scores are of. It is the same afterwards.
        task: the task that circuits are judged on; other pairs than those of the scores.
        scores: node scores with features, or circuits of features (which keep the features that
            are nodes of theirs), one or several of the same dictionaries. If there are circuits,
            all features of the dictionaries are ablated that are not kept, and the errors are those
            of the whole dictionaries.
        features: the dictionaries by site, as for `attribute`.
        sizes: how many features are kept; those that exceed what there is are left out, and all
            are kept once. Circuits have their own.
        ablation: what replaces a value: that of the corrupt run (`"patch"`), zero (`"zero"`), or
            its mean over the corrupt runs of all pairs, at all positions (`"mean"`) or at the same
            one (`"mean_per_position"`).
        random: random orders of the features to compare with.
        against: the name of one set of scores, with which the others are compared by a paired test.
        seed: of those, and of the bootstrap over pairs.
        progress: show a bar.

    Returns:
        A row for each set of scores, size and `errors` (`"in"` and `"out"`): `faithfulness` and
        `completeness` with 95 % bootstrap intervals over pairs, `low` to `high` and
        `completeness_low` to `completeness_high`. With `against` also the `difference` in
        faithfulness to that of the same size and errors, its interval and `p_value` (as
        `Evaluation.compare` gives them), NaN where there is none to compare with.

    Warns:
        UserWarning: the model cannot do the task, or ablating all changes the metric by noise.

    Raises:
        ValueError: scores or circuits hold no features, or are of other dictionaries than the
            rest, or have one name; an argument is wrong; or the metric does not differ between the
            clean run and the one in which all is ablated.
    """
    check_ablation(ablation)
    listed = [scores] if isinstance(scores, NodeScores | nx.Graph) else list(scores)
    sites = Sites.of(model)
    task.must_fit(sites.model.cfg, sites.model_name)
    own = _names(listed)
    names = own
    if any(isinstance(one, nx.Graph) for one in listed):
        names = tuple(f.name(n) for f in features_of(sites, features)
                      for n in range(f.dictionary.features))  # fmt: skip
    ranked = [s for s in listed if isinstance(s, NodeScores)]
    graphs = {g.graph["rules"]: _numbers(g, names) for g in listed if isinstance(g, nx.Graph)}
    orders = {s.rules: _order(s, names) for s in ranked}
    if len(orders.keys() | graphs.keys()) < len(listed):
        raise ValueError(
            "what is evaluated together must have names of its own, which tell rows apart; "
            f"got {', '.join([*orders, *graphs])} for {len(listed)}; see Scores.renamed"
        )
    draw = np.random.default_rng(seed)
    orders |= {f"random {i + 1}" if random > 1 else "random": draw.permutation(len(names))
               for i in range(random)}  # fmt: skip
    if against and against not in {*orders, *graphs}:
        raise ValueError(
            f"`against` must be one of {', '.join([*orders, *graphs])}; got {against!r}; leave it "
            "out for no comparison"
        )
    counts = {min(int(size), len(names)) for size in sizes} | {len(names)} if ranked else set()
    counts |= {len(chosen) for chosen in graphs.values()}
    some = list(graphs.items())
    some += [(rules, order[:n]) for rules, order in orders.items() for n in sorted(counts)]
    circuits = [_Circuit(rules, len(chosen), errors, names, chosen)
                for rules, chosen in some for errors in (True, False)]  # fmt: skip
    run = _Runs(sites, task, divisions(sites, features, names), ablation)
    full, none = _Kept(names, True), _Kept((), False)
    wanted = [full, none, *(kept for c in circuits for kept in (c.kept, c.others))]
    clean, empty, *rest = run.metrics(wanted, progress=progress)
    _must_differ(clean, empty)
    if said := doubt(task, clean, empty, ablated=True):
        warn_caller(said)
    weights = np.concatenate([np.full((1, len(task)), 1 / len(task)),
                              resamples(len(task), seed)])  # fmt: skip
    found = shares_of_gap(torch.stack(rest), clean, empty, weights)
    low, high = interval(found[1:])
    faithful, complete = slice(0, None, 2), slice(1, None, 2)  # circuits, and what they are not
    table = pd.DataFrame(
        {
            "rules": [c.rules for c in circuits],
            "features": [c.count for c in circuits],
            "errors": ["in" if c.errors else "out" for c in circuits],
            "faithfulness": found[0, faithful],
            "low": low[faithful],
            "high": high[faithful],
            "completeness": found[0, complete],
            "completeness_low": low[complete],
            "completeness_high": high[complete],
        }
    )
    if not against:
        return table
    metric = torch.stack(rest[faithful])
    return table.join(_compared(table, against, metric, clean, empty, seed))


def _compared(
    table: pd.DataFrame,
    against: str,
    metric: Float[Tensor, "circuit pair"],
    clean: Float[Tensor, " pair"],
    empty: Float[Tensor, " pair"],
    seed: int,
) -> pd.DataFrame:
    """How far circuits are above those of one set of scores that have the same size and errors."""
    keys = list(zip(table.features, table.errors, strict=True))
    at = {key: i for i, key in enumerate(keys) if table.rules[i] == against}
    mine = [i for i, key in enumerate(keys) if key in at and at[key] != i]
    both = [metric[mine], metric[[at[keys[i]] for i in mine]]]
    found = paired(mine, both, clean, empty, lambda shares: shares, seed)
    return found.set_index("measure").rename(
        columns={"low": "difference_low", "high": "difference_high"}
    )


@dataclass(frozen=True)
class _Kept:
    """What keeps its running value."""

    features: tuple[str, ...]
    errors: bool


@dataclass(frozen=True, eq=False)
class _Circuit:
    """The first of a ranking, with or without errors."""

    rules: str
    count: int
    errors: bool
    names: tuple[str, ...]
    chosen: np.ndarray

    @property
    def kept(self) -> _Kept:
        return _Kept(tuple(self.names[i] for i in self.chosen), self.errors)

    @property
    def others(self) -> _Kept:
        """All that the circuit is not."""
        mine = set(self.chosen.tolist())
        rest = tuple(name for i, name in enumerate(self.names) if i not in mine)
        return _Kept(rest, not self.errors)


def _names(scores: Sequence[NodeScores | nx.MultiDiGraph]) -> tuple[str, ...]:
    """The features that scores and circuits are of."""
    found: dict[str, None] = {}
    of = ""
    for s in scores:
        if not isinstance(s, NodeScores | nx.Graph):
            raise ValueError(
                "`scores` must be node scores with features, or circuits of them; got "
                f"{type(s).__name__}; compute them with attribute(model, task, features=...)"
            )
        if isinstance(s, NodeScores):
            parts, rules, said = s.components, s.rules, s.provenance.dictionaries
        else:
            parts = tuple(check_circuit(s))
            rules, said = s.graph["rules"], s.graph["dictionaries"]
        kinds = {n: Component.parse(n).kind for n in parts}
        own = [name for name, kind in kinds.items() if kind == "feature"]
        if not own:
            raise ValueError(
                f"`scores` must hold features; those of {rules!r} are of "
                f"{', '.join(dict.fromkeys(kinds.values())) or 'nothing'}; compute them with "
                "attribute(model, task, features=...)"
            )
        if said != (of := of or said):
            raise ValueError(
                f"all must be of the same dictionaries; got {of!r} and {said!r}; judge them apart"
            )
        found |= dict.fromkeys(own)
    if not scores:
        raise ValueError("`scores` must be one set or more; got none; call attribute first")
    return tuple(found)


def _numbers(graph: nx.MultiDiGraph, names: Sequence[str]) -> np.ndarray:
    """The numbers of the features that are nodes of a circuit."""
    return np.array([i for i, name in enumerate(names) if name in graph], dtype=int)


def _order(scores: NodeScores, names: Sequence[str]) -> np.ndarray:
    """The numbers of the features, the largest |score| first; those without one are last."""
    sizes = dict(zip(*scores.by_component(), strict=True))
    values = [abs(float(sizes[name])) if name in sizes else 0.0 for name in names]
    return np.argsort(-np.array(values), kind="stable")


def _must_differ(clean: Float[Tensor, " pair"], empty: Float[Tensor, " pair"]) -> None:
    if abs(float(clean.mean() - empty.mean())) < 1e-6:
        raise ValueError(
            "faithfulness needs a metric that differs between the clean run and the one without "
            f"features; both average {float(clean.mean()):.4g}; ablate otherwise, or give "
            "dictionaries of sites that the task goes through"
        )


@dataclass(frozen=True, eq=False)
class _Runs:
    """Clean runs in which features keep their values, or do not."""

    sites: Sites
    task: TaskLike
    features: tuple[Features, ...]
    ablation: str

    def metrics(self, wanted: Sequence[_Kept], *, progress: bool) -> list[Float[Tensor, " pair"]]:
        """The task's metric of each."""
        sites, task = self.sites, self.task
        held = tuple(dict.fromkeys(n for f in self.features for n in (f.site, f.reads)))
        found = [torch.full((len(task),), torch.nan) for _ in wanted]
        means: Mapping[str, Tensor] | None = None
        size = prompts_per_run(sites, task)
        if self.ablation != "patch":
            means = ablation_means(sites, task, held, "corrupt", self.ablation, size, self.features)
        with tqdm(total=len(wanted) * len(task), desc="features", unit="run", disable=not progress,
                  leave=False) as bar:  # fmt: skip

            def run(rows: int) -> None:
                for index, pairs in task.buckets(rows):
                    instead = self._instead(pairs, held, means)
                    for kept, metric in zip(wanted, found, strict=True):
                        if bool(metric[index].isnan().any()):
                            metric[index] = self._metric(pairs, instead, kept).float().cpu()
                            bar.update(len(index))

            as_fits(run, size, emptied=lambda: None)
        return found

    def _instead(
        self, pairs: TaskLike, held: tuple[str, ...], means: Mapping[str, Tensor] | None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Values of the features, and of what they leave over, that replace those of a run."""
        if means is None:
            values = observe(self.sites, pairs, held, side="corrupt")[0]
            return {f.site: f.divided(values) for f in self.features}
        zero = torch.zeros(1, 1)
        length = int(pairs.lengths[0])
        return {
            f.site: (means.get(f.all, zero)[None, :length], means.get(f.rest, zero)[None, :length])
            for f in self.features
        }

    def _metric(
        self, pairs: TaskLike, instead: Mapping[str, tuple[Tensor, Tensor]], kept: _Kept
    ) -> Float[Tensor, " pair"]:
        """The metric of a clean run with these features, and errors or not."""
        running: dict[str, Tensor] = {}
        edits: dict[str, Edit] = answers_only(self.sites, pairs)

        def see(site: str, value: Tensor) -> Tensor:
            running[site] = value
            return value

        names = set(kept.features)
        for features in self.features:
            if features.reads != features.site:
                edits[features.reads] = partial(see, features.reads)
        for features in self.features:
            mine = torch.tensor([features.name(n) in names for n in features.kept])
            edits[features.site] = partial(
                _mixed, features, running, mine, kept.errors, instead[features.site]
            )
        with torch.no_grad(), precise_logits(self.sites), editing(self.sites, edits):
            return pairs.metric(self.sites.model(pairs.clean.to(self.sites.device)))


def _mixed(
    features: Features,
    running: Mapping[str, Tensor],
    kept: Bool[Tensor, " feature"],
    errors: bool,
    instead: tuple[Tensor, Tensor],
    value: Tensor,
) -> Float[Tensor, "pair pos d"]:
    """What a site holds if only some of its features, and perhaps its errors, are as they were."""
    if errors and bool(kept.all()):
        return value
    values, rest = features.divided({**running, features.site: value})
    other, other_rest = (t.to(values) for t in instead)
    mixed = torch.where(kept.to(values.device), values, other)
    numbers = torch.tensor(features.kept, dtype=torch.long)
    whole = mixed @ features.directions(numbers).to(values) + (rest if errors else other_rest)
    return whole.to(value.dtype)
