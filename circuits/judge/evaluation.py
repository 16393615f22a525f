"""How good scores are at finding circuits: the faithfulness of their best edges, by circuit size.

    found = evaluate(model, task, [attribute(model, task, rules=r, level="edge") for r in rules])
    found.areas()                      # CPR and CMD of every set of scores, and of random edges
    found.compare("RELP", "GRADIENT")  # is the difference more than the choice of pairs?

Intervals and tests are over pairs: they say how the numbers would vary with other prompts, the
circuits staying as they are. Judge circuits on other pairs than those they were found with. One
pair says nothing about others: intervals and p-values are NaN. A few say little: a bootstrap over
two pairs spans their two values, and the least p-value of n pairs is 2^(1-n), so that six pairs are
the fewest that can show a difference at the level of 5 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy.integrate import trapezoid
from torch import Tensor

from circuits.engines.local import Engine
from circuits.engines.masks import metrics_by
from circuits.judge.resampling import interval, p_value, random_swaps, resamples, swaps
from circuits.kept import circuit_edges, circuit_sites, kept_by_span
from circuits.masked import Kept, Runs, circuit_metrics, endpoints
from circuits.search.rank import edge_ranks
from relp import Direction, EdgeScores, ModelLike, Scores, TaskLike
from relp.bridge import Place, Sites, span_places, undisturbed

__all__ = ["SIZES", "Evaluation", "compare", "evaluate", "paired", "shares_of_gap"]

SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the model's edges: the grid of MIB, arXiv:2504.13151."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The metric of circuits of several sizes, for several sets of scores, on the same pairs."""

    model: str
    task: str
    rules: tuple[str, ...]
    """Which scores chose the edges; `random` for none."""
    sizes: tuple[float, ...]
    """Share of all edges that a circuit may have."""
    edges: Int[Tensor, "rules size"]
    """How many edges that is."""
    metric: Float[Tensor, "rules size pair"]
    """The task's metric with all other edges corrupt."""
    clean: Float[Tensor, " pair"]
    corrupt: Float[Tensor, " pair"]
    signed: bool
    """Edges were ranked by how much they help, not by |score|."""

    @property
    def faithfulness(self) -> Float[Tensor, "rules size"]:
        """Share of the clean-corrupt gap that each circuit recovers."""
        gap = self.clean.mean() - self.corrupt.mean()
        return (self.metric.mean(-1) - self.corrupt.mean()) / gap

    def to_dataframe(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per circuit: its faithfulness and the 95 % bootstrap interval over pairs.

        `low` and `high` are NaN for a single pair.
        """
        shares = shares_of_gap(
            self.metric, self.clean, self.corrupt, resamples(len(self.clean), seed)
        )
        low, high = interval(shares)
        return pd.DataFrame(
            {
                "rules": np.repeat(self.rules, len(self.sizes)),
                "size": np.tile(self.sizes, len(self.rules)),
                "edges": self.edges.flatten().tolist(),
                "faithfulness": self.faithfulness.flatten().tolist(),
                "low": low.ravel(),
                "high": high.ravel(),
            }
        )

    def areas(self, *, seed: int = 0) -> pd.DataFrame:
        """CPR and CMD of each set of scores, with 95 % bootstrap intervals over pairs.

        CPR, the circuit performance ratio, is the area under faithfulness by size: higher is
        better, and it can exceed 1. CMD, the circuit-model distance, is the area under |1 - f|: 0
        is best. Both by trapezoids from the smallest size to the largest, as MIB
        (arXiv:2504.13151), whose tables take CPR from signed and CMD from absolute ranking. The
        intervals are NaN for a single pair.
        """
        shares = shares_of_gap(
            self.metric, self.clean, self.corrupt, resamples(len(self.clean), seed)
        )
        found = self._areas(self.faithfulness.double().numpy())
        table = {"rules": list(self.rules)}
        for i, name in enumerate(("CPR", "CMD")):
            low, high = interval(self._areas(shares)[..., i])
            table[name] = found[..., i].tolist()
            table |= {f"{name}_low": low.tolist(), f"{name}_high": high.tolist()}
        return pd.DataFrame(table)

    def compare(self, one: str, other: str, *, seed: int = 0) -> pd.DataFrame:
        """Whether two sets of scores differ by more than chance: a paired test over pairs.

        One row for CPR, one for CMD and one for the faithfulness at each size: `difference` (one
        minus other), its 95 % bootstrap interval, and the two-sided `p_value` of the permutation
        test that swaps the two within random pairs. With n pairs it is at least 2^(1-n), as
        swapping all or none gives the same difference, and at least 1/10000, as 9999 draws are
        made; so 1/2 for two pairs, whatever they are. For a single pair all but the difference is
        NaN.

        Raises:
            ValueError: a name is not among `rules`.
        """
        for name in (one, other):
            if name not in self.rules:
                raise ValueError(
                    f"a set of scores must be one of {self.rules}; got {name!r}; see `rules`"
                )
        metrics = [self.metric[self.rules.index(name)] for name in (one, other)]

        def measures(shares: np.ndarray) -> np.ndarray:
            return np.concatenate([self._areas(shares), shares], -1)

        names = ["CPR", "CMD", *(f"faithfulness at {s:.1%}" for s in self.sizes)]
        table = paired(names, metrics, self.clean, self.corrupt, measures, seed)
        table.attrs["title"] = f"{one} − {other} · {self.model} · {self.task}"
        return table

    def area_samples(self, seed: int) -> Float[np.ndarray, "sample rules area"]:
        """CPR and CMD, and behind them what they are in bootstrap samples of the pairs."""
        pairs = len(self.clean)
        weights = np.concatenate([np.full((1, pairs), 1 / pairs), resamples(pairs, seed)])
        return self._areas(shares_of_gap(self.metric, self.clean, self.corrupt, weights))

    def swapped_areas(self, other: Evaluation, seed: int) -> Float[np.ndarray, "swap area"]:
        """What CPR and CMD of the first rules here are above those there, on the same pairs.

        Behind it what that is when the two are swapped within random pairs.
        """
        swapped = random_swaps(len(self.clean), seed)
        both = [self.metric[0], other.metric[0]]
        return _swapped(both, self.clean, self.corrupt, self._areas, swapped)

    def _areas(self, shares: np.ndarray) -> np.ndarray:
        """`[..., size]` -> `[..., 2]`: CPR and CMD."""
        return np.stack([trapezoid(y, self.sizes) for y in (shares, abs(1 - shares))], -1)

    def __repr__(self) -> str:
        ranked = "score" if self.signed else "|score|"
        return (
            f"Evaluation(faithfulness{list(self.edges.shape)} [rules, size] over "
            f"{len(self.clean)} pairs, model={self.model!r}, task={self.task!r}, "
            f"rules={self.rules!r}, ranked by {ranked})"
        )

    def _repr_html_(self) -> str:
        table = pd.DataFrame(
            self.faithfulness.tolist(), self.rules, [f"{s:.1%}" for s in self.sizes]
        )
        areas = self._areas(self.faithfulness.double().numpy())
        for i, name in enumerate(("CPR", "CMD")):
            table.insert(i, name, areas[:, i])
        return table.to_html(float_format="{:.3f}".format)


@undisturbed
def evaluate(
    model: ModelLike,
    task: TaskLike,
    scores: Scores | Sequence[Scores],
    *,
    sizes: Sequence[float] = SIZES,
    signed: bool = False,
    random: int = 1,
    seed: int = 0,
    engine: Engine | None = None,
    progress: bool = True,
) -> Evaluation:
    """The faithfulness of the best edges of each set of scores, for circuits of several sizes.

    >>> each = [attribute(model, task, rules=r, level="edge") for r in (RELP, GIM)]
    >>> evaluation = evaluate(model, task, each)
    >>> evaluation.areas()                        # CPR and CMD
    >>> evaluation.compare("RELP", "GIM")         # with p-values

    A circuit of size s holds the ⌊s · edges⌋ best edges, as in MIB (arXiv:2504.13151). Edges that
    lie on no path from the embedding to the logits are counted; they change no result.

    Args:
        model: the `TransformerBridge` that the scores are of. It is the same afterwards.
        task: a `tasks.Task`; better not the one that the scores were computed on.
        scores: edge scores, or several to compare on the same pairs; by span all or none of them.
        sizes: shares of the model's edges, ascending.
        signed: rank by how much an edge helps the clean behaviour, not by |score|.
        random: how many random rankings to add as baseline.
        seed: what the random rankings are drawn with.
        engine: who runs the circuits, such as a `circuits.engines.RayEngine`; this process if None.
        progress: show a bar.

    Warns:
        UserWarning: the model cannot do the task, as for `faithfulness`.

    Raises:
        ValueError: scores are of nodes, of another model, not finite or two of one name, or by span
            and the task has other spans; sizes are not ascending in (0, 1]; or as for
            `faithfulness`. With an engine also what that refuses.
    """
    many = _edge_scores([scores] if isinstance(scores, Scores) else scores, sizes)
    neurons = [writer.name for writer in many[0].layout.sources if writer.kind == "neuron"]
    sites = Sites.of(model).splitting(neurons)
    _check(sites, task, many)
    generator = torch.Generator().manual_seed(seed)
    for i in range(random):
        drawn = torch.rand(many[0].edges.shape, generator=generator)
        name = "random" if random == 1 else f"random {i + 1}"
        source = replace(many[0].provenance, rules=name, direction=Direction.DENOISE)
        many.append(replace(many[0], provenance=source, edges=drawn))
    runs: Runs = {}
    clean, corrupt = endpoints(sites, task, runs=runs)
    best = [circuit for s in many for circuit in _best(s, sizes, signed)]
    by_span = bool(many[0].places)
    with metrics_by(
        engine, partial(circuit_metrics, runs=runs), sites, task, by_span=by_span,
        progress=progress,
    ) as metrics:  # fmt: skip
        metric = metrics(best)
    return Evaluation(
        model=sites.model_name,
        task=task.name,
        rules=tuple(s.rules for s in many),
        sizes=tuple(float(s) for s in sizes),
        edges=torch.tensor([[_number(s, size) for size in sizes] for s in many]),
        metric=metric.unflatten(0, (len(many), len(sizes))),
        clean=clean,
        corrupt=corrupt,
        signed=signed,
    )


@undisturbed
def compare(
    model: ModelLike,
    task: TaskLike,
    one: nx.MultiDiGraph,
    other: nx.MultiDiGraph,
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Whether one circuit is more faithful than another by more than the choice of pairs.

    >>> compare(model, task, circuit, random(edges, edges=200))

    One row, as `Evaluation.compare` gives for each measure. Errors and warnings are those of
    `faithfulness`.
    """
    sites = circuit_sites(model, [one, other])
    runs: Runs = {}
    both = circuit_edges(sites, task, [one, other])
    clean, corrupt = endpoints(sites, task, runs=runs)
    by_span = kept_by_span([one, other])
    metrics = [m[None] for m in circuit_metrics(sites, task, both, by_span=by_span, runs=runs)]
    return paired(["faithfulness"], metrics, clean, corrupt, lambda shares: shares, seed)


def _edge_scores(scores: Sequence[Scores], sizes: Sequence[float]) -> list[EdgeScores]:
    """The scores, if circuits of these sizes can be chosen by all of them."""
    listed = isinstance(scores, Sequence)
    for one in scores if listed else [scores]:
        if not isinstance(one, Scores):
            raise TypeError(
                f"`scores` must be Scores, or a list of them; got {type(one).__name__}; call "
                "attribute(model, task, level='edge'); circuits are judged by faithfulness"
            )
    if not scores or list(sizes) != sorted({s for s in sizes if 0 < s <= 1}):
        raise ValueError(
            "evaluate needs one set of scores or more, and sizes that ascend in (0, 1]; got "
            f"{len(scores)} and {list(sizes)}; leave `sizes` out for those of MIB"
        )
    names = [s.rules for s in scores]
    if len(set(names)) < len(names):
        raise ValueError(
            f"every set of scores must have its own name; got {names}; rename one with "
            "scores.renamed('...')"
        )
    found = [s for s in scores if isinstance(s, EdgeScores) and bool(s.edges.isfinite().all())]
    for s in scores:
        if not any(s is one for one in found):
            raise ValueError(
                f"evaluate needs finite edge scores; those of {s.rules!r} are of nodes or hold "
                "NaN; call attribute(model, task, level='edge')"
            )
    return found


def _check(sites: Sites, task: TaskLike, scores: Sequence[EdgeScores]) -> None:
    for s in scores:
        if (s.writers, s.readers) != (sites.layout.writers, sites.layout.readers):
            raise ValueError(
                "scores must be of the model they are evaluated on, all with the same neurons "
                f"split off; those of {s.rules!r} are of {s.model!r}, have other neurons than the "
                f"first, or are not of {sites.model_name!r}; compute all on this model, with the "
                "same `neurons`"
            )
        if any(one.places for one in scores) and s.places != span_places(task.spans):
            raise ValueError(
                "scores by span must all be so, and be evaluated on a task with the same spans; "
                f"those of {s.rules!r} have {s.places or 'none'}, the task {tuple(task.spans)}; "
                "compute all with positions='spans' on such a task"
            )
        lengths = set(task.lengths.tolist())
        if s.edges.dim() == 3 and not s.places and lengths != {len(s.edges)}:
            raise ValueError(
                f"scores by position must be evaluated on prompts of their {len(s.edges)} "
                f"positions; the task has lengths {sorted(lengths)}; leave `positions` out"
            )


def _number(scores: EdgeScores, size: float) -> int:
    """How many edges a circuit of this size has."""
    positions = len(scores.edges) if scores.edges.dim() == 3 else 1
    return int(size * int(scores.layout.exists.sum()) * positions)


def _best(scores: EdgeScores, sizes: Sequence[float], signed: bool) -> list[Kept]:
    """Circuits of the best edges, ties broken by name as by `top`."""
    rank = edge_ranks(scores, signed=signed)

    def kept(edges: int, place: Place) -> Bool[Tensor, "pos heard column"]:
        return rank[:, place.heard, place.columns] <= edges

    return [partial(kept, _number(scores, size)) for size in sizes]


# -- statistics over pairs -------------------------------------------------------------------------


def shares_of_gap(
    metric: Tensor, clean: Tensor, corrupt: Tensor, weights: Float[np.ndarray, "resample pair"]
) -> np.ndarray:
    """`[..., pair]` -> `[resample, ...]`: faithfulness, the ratio of means, in each sample.

    NaN in a sample without a gap: then there is no interval either.
    """
    low, high = (weights @ m.double().numpy() for m in (corrupt, clean))
    means = np.tensordot(weights, metric.double().numpy(), (1, -1))
    shape = (-1, *[1] * (means.ndim - 1))
    gap = np.where(high == low, np.nan, high - low)
    return (means - low.reshape(shape)) / gap.reshape(shape)


def paired(
    names: Sequence[Any],
    metrics: Sequence[Float[Tensor, "circuit pair"]],
    clean: Tensor,
    corrupt: Tensor,
    measures: Any,
    seed: int,
) -> pd.DataFrame:
    """Difference of two in each measure of `[..., circuit]` shares, its interval and p-value.

    The test is that of `Evaluation.compare`.
    """
    pairs = len(clean)
    one, other = (lambda weights, m=m: shares_of_gap(m, clean, corrupt, weights) for m in metrics)
    weights = resamples(pairs, seed)
    low, high = interval(measures(one(weights)) - measures(other(weights)))
    chance = _swapped(metrics, clean, corrupt, measures, swaps(pairs, seed))
    return pd.DataFrame(
        {
            "measure": names,
            "difference": chance[0],
            "low": low,
            "high": high,
            "p_value": p_value(chance) if pairs > 1 else np.nan,
        }
    )


def _swapped(
    metrics: Sequence[Float[Tensor, "circuit pair"]],
    clean: Tensor,
    corrupt: Tensor,
    measures: Any,
    swapped: Bool[np.ndarray, "swap pair"],
) -> np.ndarray:
    """The difference of two in each measure, when some pairs' values are swapped.

    Under the null hypothesis it makes no difference which of the two a pair's value came from.
    """
    even = np.full((1, len(clean)), 1 / len(clean))
    one, other = (shares_of_gap(m, clean, corrupt, even) for m in metrics)
    gap = float(clean.double().mean() - corrupt.double().mean())
    moved = swapped @ (metrics[1] - metrics[0]).double().numpy().T / len(clean) / gap
    return measures(one + moved) - measures(other - moved)
