"""`patch`: the exact effect of components and edges, in the layout of `attribute`'s scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from circuits.engines.local import Engine
from circuits.exact.cells import EVERYWHERE, Cell
from circuits.exact.runs import Runs
from circuits.exact.shards import shard_title, sharded
from circuits.exact.tables import edge_effects, node_effects
from relp import Direction, EdgeEffects, Level, ModelLike, NodeEffects, TaskLike
from relp.bridge import NO_FEATURES, Sites, provenance, undisturbed

__all__ = ["patch"]


@undisturbed
def patch(
    model: ModelLike,
    task: TaskLike,
    *,
    level: str = "node",
    components: Sequence[str] | None = None,
    edges: Sequence[tuple[str, str]] | None = None,
    neurons: Sequence[str] = (),
    features: Mapping[str, Any] = NO_FEATURES,
    positions: bool | None = None,
    direction: str = "denoise",
    ablation: str = "patch",
    resume: str | Path | None = None,
    batch_size: int | None = None,
    engine: Engine | None = None,
    shard: str | None = None,
    progress: bool = True,
) -> NodeEffects | EdgeEffects:
    """Measures what patching each component or edge does to the metric.

    >>> effect = patch(model, task)            # nodes [pair, component, pos], as attribute's
    >>> effect = patch(model, task, components=["attn", "L3.mlp", "L3N17"])
    >>> effect = patch(model, task, level="edge", edges=[("L1H1", "L3H5.q")])

    `denoise`: the clean value is put into the corrupt run and the effect is the metric minus that
    of the corrupt run; `noise`: the other way round.

    Args:
        model: a `TransformerBridge` in eval mode. It is the same afterwards.
        task: a `tasks.Task`.
        level: `"node"` or `"edge"`.
        components: at node level, names (`L3H1`, neurons `L3N17`) or kinds (`resid`, `attn`, `mlp`,
            `head`, `embed`, `neuron`); all but neurons if None.
        edges: at edge level, `(writer, reader)` names; all if None, which are many. Edges that
            were not asked for are NaN in the result.
        neurons: at edge level, neurons (`L3N17`) that write and read by themselves, as for
            `attribute`; `L3.mlp` is then the rest of that MLP.
        features: at node level, dictionaries by site, as for `attribute`: then `components` may
            name features (`L3.mlp/f1021`), and what is left of the site without those that are
            named (`L3.mlp/rest`), as `Scores.components` does.
        positions: one cell per position, or one for all positions at once. If None, nodes are
            patched by position and edges are not, as `attribute` gives them.
        direction: `"denoise"` or `"noise"`.
        ablation: what replaces a value: that of the other run (`"patch"`), zero (`"zero"`), or a
            mean over what the component holds in the other runs of all pairs of the task, at all
            positions (`"mean"`) or at the same one (`"mean_per_position"`).
        resume: a `.safetensors` file that keeps finished cells. If it exists, the sweep goes on
            from there; it must be of the same sweep.
        batch_size: prompts of full length per forward pass at most, or as many tokens of runs that
            start later; by default as many as fit the memory, and fewer if it runs out.
        engine: who measures, such as a `circuits.engines.RayEngine`; this process if None.
        shard: `"3/16"`: the third of sixteen parts of the cells alone; what is in the others is NaN
            in the result. `circuits.exact.merge_effects` puts all together.
        progress: show a bar.

    Returns:
        Effects in the unit of the metric, in the layout of `attribute`'s scores. With
        `positions=False` the position axis of nodes has length 1.

    Raises:
        ValueError: an argument is wrong, the model is in train mode, or `resume` is the file of
            another sweep. With an engine also what that refuses.
        RuntimeError: edges were asked for, and what heads and MLPs add is not all that the
            residual stream gets.
    """
    level = Level(level)
    if (components if level == "edge" else edges or neurons or None) is not None:
        raise ValueError(
            "`components` is for nodes and `edges` for edges; got the other one with "
            f"level={str(level)!r}; choose the level that you want"
        )
    sites = Sites.of(model).splitting(neurons)
    by_position = level == "node" if positions is None else positions
    places = range(int(task.lengths.max())) if by_position else [EVERYWHERE]
    nodes = _nodes(sites, components) if level == "node" else ()
    named = _edges(sites, edges) if level == "edge" else [(name, "") for name in nodes]
    cells = [Cell(name, reader, pos) for name, reader in named for pos in places]
    runs = Runs(model, task, direction, ablation, neurons=tuple(neurons), features=features,
                kept=nodes, kept_bytes=0)  # fmt: skip
    sweep = runs.measure(sharded(cells, shard, len(sites.blocks)), resume=resume,
                         batch_size=batch_size, engine=engine, progress=progress)  # fmt: skip
    rules = "exact" if ablation == "patch" else f"exact ({ablation} ablation)"
    source = provenance(sites, task, Direction(direction), shard_title(rules, shard))
    source = replace(source, dictionaries=sweep.identity["dictionaries"])
    if level == "edge":
        return edge_effects(sites, task, source, sweep, by_position=by_position)
    return node_effects(sites, task, source, sweep, nodes, by_position=by_position)


def _nodes(sites: Sites, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Names of components; those of dictionaries behind the others, as they are named."""
    asked = () if wanted is None or isinstance(wanted, str) else tuple(dict.fromkeys(wanted))
    parts = tuple(name for name in asked if "/" in name)
    if not parts:
        return sites.chosen(wanted)
    others = [name for name in asked if "/" not in name]
    return (*(sites.chosen(others) if others else ()), *parts)


def _edges(sites: Sites, wanted: Sequence[tuple[str, str]] | None) -> tuple[tuple[str, str], ...]:
    """The chosen edges of the model as `(writer, reader)`."""
    writers, readers = sites.layout.writers, sites.layout.readers
    known = tuple((writers[w], readers[r]) for r, w in sites.layout.exists.T.nonzero().tolist())
    if wanted is None:
        return known
    chosen = tuple(dict.fromkeys(tuple(edge) for edge in wanted))
    existing = set(known)
    unknown = [edge for edge in chosen if edge not in existing] if chosen else ["none"]
    if unknown:
        raise ValueError(
            f"`edges` must be pairs (writer, reader) such as {known[-1]}; got {unknown[0]!r}; see "
            "Scores.writers and Scores.readers, let the writer come before the reader, and name "
            "neurons that have edges in `neurons`"
        )
    return tuple((writer, reader) for writer, reader in chosen)
