"""The sentence that joins it all: prompts in, labelled scores out.

`score = (other - own) · c`, with `c` the coefficients of the own run. `direction="denoise"`: own
is the corrupt run, and a positive score means that patching the clean value in raises the metric
(as TransformerLens' `attribution_patch` and the RelP demo). `"noise"`: own is the clean run
(as EAP-IG and MIB).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from relp.bars import tqdm
from relp.bridge.capture import Capture
from relp.bridge.captures import captures, needed
from relp.bridge.cuts import cut_run
from relp.bridge.features import NO_FEATURES, divisions, features_of, fingerprints
from relp.bridge.memory import Plan, attribution_plan, in_batches
from relp.bridge.room import Room, as_fits
from relp.bridge.run import undisturbed
from relp.bridge.sites import Sites
from relp.bridge.source import pairs_of, provenance
from relp.choices import Direction, Level
from relp.edges import EdgeSums
from relp.feature_edges import FeatureEdges
from relp.nodes import NodeSums
from relp.protocols import ModelLike, TaskLike
from relp.rulebook import RELP, Rules
from relp.scores import EdgeScores, NodeScores

__all__ = ["attribute", "plan"]

KEPT = 32
"""Features of a site that have edges, if nobody says how many."""
PATHS = ("inputs", "activations", "site")


@undisturbed
def attribute(
    model: ModelLike,
    task: TaskLike,
    *,
    rules: Rules = RELP,
    level: str = "node",
    components: Sequence[str] | None = None,
    neurons: Sequence[str] = (),
    features: Mapping[str, Any] = NO_FEATURES,
    keep: int | None = None,
    direction: str = "denoise",
    steps: int = 1,
    path: str = "inputs",
    positions: bool | str = False,
    batch_size: int | None = None,
    strict: bool = True,
    progress: bool = True,
) -> NodeScores | EdgeScores:
    """Estimates what patching every component or edge would do to the task's metric.

    >>> scores = attribute(model, task, rules=RELP)               # nodes [pair, component, pos]
    >>> edges = attribute(model, task, rules=RELP, level="edge")  # edges [writer, reader]
    >>> scores = attribute(model, task, components=["neuron", "L3.mlp"])
    >>> edges = attribute(model, task, level="edge", neurons=["L3N17", "L5N4"])

    Two forward passes and one backward per batch. With `rules=GRADIENT` this is attribution
    patching (node) and EAP (edge, arXiv:2310.10348); with `RELP`, relevance patching
    (arXiv:2508.21258); with `DEEPLIFT` the scores over any cut sum to the metric gap.

    Args:
        model: a `TransformerBridge` in eval mode. It is the same afterwards.
        task: a `tasks.Task`, or anything that has its fields and methods.
        rules: the coefficients to use.
        level: `"node"` or `"edge"`.
        components: at node level, names (`L3H1`, neurons `L3N17`) or kinds (`resid`, `attn`, `mlp`,
            `head`, `embed`, `mixer`, `neuron`); all but neurons if None. A layer's neurons sum to
            its MLP, or to the input of the norm behind it if there is one (Gemma-2, OLMo-2), unless
            the rules change its last matrix (`linear`).
        neurons: at edge level, neurons (`L3N17`) that write and read by themselves, as heads do;
            `L3.mlp` is then the rest of that MLP.
        features: sparse dictionaries by site, `{"L3.mlp": dictionary}`: a
            `relp.Dictionary`, the path of its files, or an SAE of SAELens. Their features
            (`L3.mlp/f1021`; those whose values differ between the runs of some pair) and what they
            leave over (`L3.mlp/rest`) are components, which sum to the site's own score;
            `components="feature"` gives them alone.
            At edge level, the edges between features: of those named in `components`, or of the
            strongest of each dictionary (`relp.feature_edges`).
        keep: at most so many features of a site, those with the largest |score|; at edge level 32
            if not given.
        direction: `"denoise"` (coefficients on the corrupt run) or `"noise"` (on the clean run).
        steps: more than 1 averages coefficients along a path between the runs (EAP-IG).
        path: what moves along it: `"inputs"`, the embeddings (`steps` runs), `"activations"`,
            each writing site in turn (`steps` runs for each of 1 + 2·layers sites), or `"site"`, at
            node level: what is scored itself (`steps` runs for each site; as in arXiv:2403.19647).
        positions: keep the position axis of edge scores; `"spans"`: sum them over each named span
            of the task and over the rest, pair by pair (node scores have `Scores.by_span`).
        batch_size: pairs per pass; by default as many as fit the memory, see `plan`. Batches for
            which it runs out are made smaller, and a pair by itself goes block by block.
        strict: an operation that no rule knows is an error; else its derivative is used.
        progress: show a bar if there are several batches.

    Returns:
        Scores in the unit of the metric.

    Raises:
        TypeError, ValueError: an argument is wrong; the message says which and what to do.
        UnknownOperationError: the model has an operation that no rule knows.
        RuntimeError: a hook did not fire, or a score is not finite.
    """
    level, way = Level(level), Direction(direction)
    _check(rules, level, steps, path, positions)
    _check_features(features, keep)
    if level == "edge" and features:
        _check_feature_edges(rules, steps, positions, neurons, keep if components else None)
        return _between_features(
            model, task, rules, features, components, keep or KEPT, way, batch_size=batch_size,
            strict=strict, progress=progress,
        )  # fmt: skip
    if (components if level == "edge" else neurons or None) is not None:
        raise ValueError(
            "`components` is for node scores and `neurons` for edge scores; got the other one with "
            f"level={level!r}; at node level neurons are components"
        )
    sites = Sites.of(model).splitting(neurons)
    task.must_fit(sites.model.cfg, sites.model_name)
    dictionaries = features_of(sites, features)
    sums: NodeSums | EdgeSums
    if level == "node":
        sums = NodeSums(sites, task, rules, components, dictionaries, keep)
    else:
        sums = EdgeSums(sites, task, rules, positions)
    names, at = sums.sites_needed, sums.coefficients_needed
    taken = partial(needed, sites, rules=rules, names=names, coefficients=at, own=way.own)
    how = attribution_plan(sites, task, taken, work=sums.work, batch_size=batch_size)
    metrics = {side: torch.zeros(len(task)) for side in (way.own, way.other)}
    remainder: dict[str, float] = defaultdict(float)
    used: dict[str, None] = {}

    def captured(batch: TaskLike, blocks: int | None) -> Iterator[Capture]:
        return captures(
            sites, batch, rules, names, own=way.own, steps=steps, path=path, coefficients=at,
            blocks=blocks, strict=strict,
        )  # fmt: skip

    def add(index: Int[Tensor, " row"], batch: TaskLike, seen: Capture) -> None:
        sums.add(index, batch, seen)
        used[seen.rules] = None
        for module, value in seen.remainder.items():
            remainder[module] += value / len(task)
        metrics[way.own][index] = seen.own_metric.float().cpu()
        metrics[way.other][index] = seen.other_metric.float().cpu()

    with tqdm(total=len(task), desc=f"{rules.name} {level}s", unit="pair",
              disable=not progress or how.pairs >= len(task), leave=False) as bar:  # fmt: skip
        bar.set_postfix_str(how.note)
        for pairs in in_batches(task, how, captured, add):
            bar.update(pairs)
    if way.own == "clean" and steps == 1:
        _must_slope(task, rules, metrics["clean"])
    _must_be_finite(sums.table, rules)
    named = "; ".join(used)  # one, unless batches differ in which registrations they met
    along = "" if path == "inputs" else f" of {'each site' if path == 'site' else path}"
    name = named if steps == 1 else f"{named} ({steps} steps{along})"
    source, about = provenance(sites, task, way, name), pairs_of(sites, task, metrics)
    source = replace(source, dictionaries=fingerprints(dictionaries))
    return sums.scores(source, about, dict(remainder))


def plan(
    model: ModelLike,
    task: TaskLike,
    *,
    rules: Rules = RELP,
    level: str = "node",
    direction: str = "denoise",
    room: Room | None = None,
) -> Plan:
    """How `attribute` would run these pairs, and how much memory it would take.

    >>> plan(model, task, rules=RELP, level="edge").pairs     # at a time; see `note` and `bytes`
    4

    Single blocks are run on one pair of the greatest length, and what is alive is counted. `model`
    may be an outline without weights (`tasks.zoo.outline`).

    Args:
        model: as for `attribute`; also `task`, `rules`, `level` and `direction`.
        room: the memory there is; where the model is, if None.

    Raises:
        TypeError, ValueError: as for `attribute`.
    """
    level, way = Level(level), Direction(direction)
    _check(rules, level, 1, "inputs", False)
    sites = Sites.of(model)
    task.must_fit(sites.model.cfg, sites.model_name)
    sums = NodeSums(sites, task, rules, None) if level == "node" else EdgeSums(
        sites, task, rules, False
    )  # fmt: skip
    names, at = sums.sites_needed, sums.coefficients_needed
    taken = partial(needed, sites, rules=rules, names=names, coefficients=at, own=way.own)
    return attribution_plan(sites, task, taken, work=sums.work, room=room or Room.of(sites.device))


def _between_features(
    model: ModelLike,
    task: TaskLike,
    rules: Rules,
    features: Mapping[str, Any],
    components: Sequence[str] | None,
    keep: int,
    way: Direction,
    *,
    batch_size: int | None,
    strict: bool,
    progress: bool,
) -> EdgeScores:
    """Edge scores between the features that are named, or the strongest of each dictionary."""
    if components is None:
        nodes = attribute(
            model, task, rules=rules, components="feature", features=features, keep=keep,
            direction=str(way), batch_size=batch_size, strict=strict, progress=progress,
        )  # fmt: skip
        assert isinstance(nodes, NodeScores)
        components = nodes.components
    sites = Sites.of(model)
    task.must_fit(sites.model.cfg, sites.model_name)
    chosen = divisions(sites, features, components)
    sums = FeatureEdges(sites, task, rules, chosen)
    names = tuple(dict.fromkeys(n for f in chosen for n in (f.site, f.reads)))
    taken = partial(needed, sites, rules=rules, names=names, coefficients=names, own=way.own)
    how = attribution_plan(sites, task, taken, batch_size=batch_size)
    metrics = {side: torch.full((len(task),), torch.nan) for side in (way.own, way.other)}
    remainder: dict[str, float] = defaultdict(float)
    used: dict[str, None] = {}
    with tqdm(total=len(task), desc=f"{rules.name} edges of features", unit="pair",
              disable=not progress or how.pairs >= len(task), leave=False) as bar:  # fmt: skip

        def run(rows: int) -> None:
            for index, batch in task.buckets(rows):
                if not bool(metrics[way.own][index].isnan().any()):
                    continue
                with cut_run(
                    sites, batch, rules, sums.cuts, sums.reads, own=way.own, strict=strict
                ) as seen:
                    sums.add(seen)
                metrics[way.own][index] = seen.metric.detach().float().cpu()
                metrics[way.other][index] = seen.other_metric.float().cpu()
                used[seen.rules] = None
                for module, value in seen.remainder.items():
                    remainder[module] += value / len(task)
                bar.update(len(index))

        as_fits(run, how.pairs, emptied=lambda: None)
    _must_be_finite(sums.table, rules)
    source = provenance(sites, task, way, "; ".join(used))
    source = replace(source, dictionaries=fingerprints(chosen))
    return EdgeScores(provenance=source, pairs=pairs_of(sites, task, metrics), places=(),
                      remainder=dict(remainder), layout=sums.layout, edges=sums.table)  # fmt: skip


def _must_be_finite(table: Tensor, rules: Rules) -> None:
    if wrong := int((~torch.isfinite(table)).sum()):
        raise RuntimeError(
            f"every score must be finite; {wrong} are not under {rules.name}; run the model in "
            "float32, or look for overflow in its activations"
        )


# -- arguments -------------------------------------------------------------------------------------


def _check(rules: Rules, level: Level, steps: int, path: str, positions: bool | str) -> None:
    if not isinstance(rules, Rules):
        raise TypeError(
            f"`rules` must be a Rules value such as relp.RELP; got {type(rules).__name__}; "
            "turn a name into rules with relp.preset(name)"
        )
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(
            f"`steps` must be a whole number of at least 1; got {steps!r}; leave it out"
        )
    if path not in PATHS:
        raise ValueError(
            f"`path` must be one of {', '.join(map(repr, PATHS))}; got {path!r}; 'inputs' moves "
            "the embeddings"
        )
    if path != "inputs" and steps == 1:
        raise ValueError(
            f"`path={path!r}` needs `steps` above 1; got 1, which has no path; give steps=5"
        )
    if path == "site" and level == "edge":
        raise ValueError(
            "`path='site'` is for node scores, as edges have no site of their own; got "
            "level='edge'; give path='activations'"
        )
    if steps > 1 and rules.needs_reference:
        raise ValueError(
            f"`steps` must be 1 for rules that compare two runs; got {steps} with {rules.name}; "
            "those rules know the whole way between the runs already"
        )
    if positions not in (False, True, "spans"):
        raise ValueError(
            f"`positions` must be True, False or 'spans'; got {positions!r}; 'spans' sums over "
            "each of the task's named spans"
        )
    if positions and level == "node":
        raise ValueError(
            "`positions` is for edge scores; got level='node', whose scores keep the position axis "
            "anyway; leave it out"
        )


def _check_features(features: Mapping[str, Any], keep: int | None) -> None:
    if keep is not None and (not features or not isinstance(keep, int) or keep < 1):
        raise ValueError(
            f"`keep` must be a whole number of at least 1, beside `features`; got {keep!r}; leave "
            "it out"
        )


def _check_feature_edges(
    rules: Rules, steps: int, positions: bool | str, neurons: Sequence[str], keep: int | None
) -> None:
    given = {"steps": steps > 1, "positions": bool(positions), "neurons": bool(neurons),
             "rules that are partway": rules.partway,
             "keep beside components, which name them": keep is not None}  # fmt: skip
    if wrong := next((name for name, there in given.items() if there), ""):
        raise ValueError(
            "edges between features are of one run, summed over positions, between dictionaries "
            f"alone; got {wrong}; leave that out, or use level='node'"
        )


def _must_slope(task: TaskLike, rules: Rules, metric: Float[Tensor, " pair"]) -> None:
    """At the maximum of a metric every score would be 0 up to rounding, and look like a result."""
    at_maximum = task.metric.flat_at_zero and float(metric.abs().max()) < 1e-4
    if at_maximum and rules.softmax != "secant":  # secants see the other run too
        raise ValueError(
            "with direction='noise' the metric must have a slope on the clean run; "
            f"{task.metric.name!r} is 0 there, its maximum, and so would be every score under "
            f"{rules.name}; use direction='denoise', steps=5, rules=DEEPLIFT, or patch, which "
            "measures"
        )
