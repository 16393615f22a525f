"""Edge scores -> an ordinary `networkx.MultiDiGraph`, the form in which circuits travel.

    circuit = assemble(attribute(model, task, rules=RELP, level="edge"))
    circuit.edges["L5H5", "L9H6", "q"]["score"]

Node ids are component names (`embed`, `L9H6`, `L9.mlp`, `logits`). The edge u -> v has the slot
that reads (`q`, `k`, `v`, `in`) as its key, or `q@14` where scores were kept by position. All
edges that can exist are there, those with score 0 too: the assembled graph is the whole model.

Key/value heads of grouped-query attention are nodes of their own (`L9KV1`): what they read are
edges into them, and one structural edge (key `kv`, score 0) leads to each query head they serve.
Structural edges carry paths and are not counted: they cannot be patched.

Neurons are nodes (`L9N17`) if the scores were computed with some split off: then `L9.mlp` is the
rest of that MLP, and the graph keeps their names, as a neuron that a circuit lacks is cut and no
part of `L9.mlp`.

Attributes (only str, int, float and bool, so that every file format can hold them):

=====  ==============  =====  ==================================================================
node   kind            str    embed, head, kv, neuron, attn, mlp, mixer or logits
       layer, head     int    -1 where there is none; a neuron's number is its `head`
       score           float  sum of the node's outgoing edges in the full graph = its node score
edge   score           float  in units of the metric; the sign is that of `Scores`
       slot            str    q, k, v, in, or kv for structural edges
       pos             int    position of the token, -1 if summed over positions
       structural      bool   True: leads from a key/value head to a query head
       reader          str    the reader in full (`L9H6.q`), empty for structural edges
graph  model, task, rules, direction, metric, level  str, as in `Scores`
       metric_clean    float  mean of the metric over the clean prompts
       metric_corrupt  float  mean of the metric over the corrupt prompts
       pairs           int    pairs of prompts behind the scores
       total_edges     int    edges of the full graph, structural ones not counted
       positions       bool   True if edges are kept by position
       neurons         str    names of the neurons that were split off, with spaces between
=====  ==============  =====  ==================================================================
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import networkx as nx
import torch
from jaxtyping import Bool
from torch import Tensor

from relp.scores import Component, Scores, precedes

__all__ = ["all_edges", "assemble", "check_circuit", "real_edges", "size"]

NODE: Mapping[str, type] = {"kind": str, "layer": int, "head": int, "score": float}
EDGE: Mapping[str, type] = {
    "score": float,
    "slot": str,
    "pos": int,
    "structural": bool,
    "reader": str,
}
GRAPH: Mapping[str, type] = {
    "model": str,
    "task": str,
    "rules": str,
    "direction": str,
    "metric": str,
    "metric_clean": float,
    "metric_corrupt": float,
    "pairs": int,
    "level": str,
    "total_edges": int,
    "positions": bool,
    "neurons": str,
}

_WITHIN_LAYER = {"kv": 0, "head": 1, "attn": 1, "mixer": 1, "neuron": 2, "mlp": 3}


def assemble(scores: Scores) -> nx.MultiDiGraph:
    """The full graph of edge scores; see the module's docstring for its attributes.

    Raises:
        TypeError: `scores` is not `Scores`.
        ValueError: the scores are of nodes, are not finite, or the query heads of a layer do not
            divide evenly over its key/value heads.
    """
    if not isinstance(scores, Scores):
        raise TypeError(
            f"`scores` must be Scores; got {type(scores).__name__}; call "
            "attribute(model, task, level='edge')"
        )
    if scores.edges is None:
        raise ValueError(
            "assemble needs edge scores; these are node scores; call "
            "attribute(model, task, level='edge')"
        )
    if scores.places:
        raise ValueError(
            f"assemble needs edges by token or summed over all; these are by span {scores.places}; "
            "call attribute(level='edge') with positions=True or without"
        )
    if not bool(scores.edges.isfinite().all()):
        bad = int((~scores.edges.isfinite()).sum())
        raise ValueError(
            f"edge scores must be finite; {bad} of {scores.edges.numel()} are NaN or infinite; "
            "look for half-precision overflow or a metric that divides by zero"
        )
    positions = scores.edges.dim() == 3
    table = scores.edges.detach().cpu().double()
    # [reader, writer, pos] as lists: indexing tensors one by one would take most of the time.
    columns = (table if positions else table[None]).permute(2, 1, 0).tolist()

    writers = [Component.parse(writer) for writer in scores.writers]
    readers = [Component.of_reader(reader) for reader in scores.readers]
    graph = nx.MultiDiGraph()
    # In the order in which a forward pass meets them, whatever the order in the table.
    components = {c.name: c for c in (*writers, *(target for target, _ in readers))}
    for c in sorted(components.values(), key=_depth):
        graph.add_node(c.name, kind=c.kind, layer=c.layer, head=c.head, score=0.0)

    total = 0
    for (target, slot), reader, column in zip(readers, scores.readers, columns, strict=True):
        for writer, values in zip(writers, column, strict=True):
            if not precedes(writer, target, parallel=scores.parallel):
                continue
            for p, score in enumerate(values):
                pos = p if positions else -1
                graph.add_edge(
                    writer.name,
                    target.name,
                    key=f"{slot}@{pos}" if positions else slot,
                    score=score,
                    slot=slot,
                    pos=pos,
                    structural=False,
                    reader=reader,
                )
                total += 1
            graph.nodes[writer.name]["score"] += sum(values)
    _serve_query_heads(graph)

    graph.graph.update(
        model=scores.model,
        task=scores.task,
        rules=scores.rules,
        direction=scores.direction,
        metric=scores.metric,
        metric_clean=float(scores.clean.double().mean()),
        metric_corrupt=float(scores.corrupt.double().mean()),
        pairs=len(scores.clean),
        level=scores.level,
        total_edges=total,
        positions=positions,
        neurons=" ".join(c.name for c in writers if c.kind == "neuron"),
    )
    return graph


def all_edges(layout: Any) -> Bool[Tensor, "writer reader"]:
    """Which edges the model has, for what has `writers`, `readers` and `parallel` (`Scores`)."""
    writers = [Component.parse(w) for w in layout.writers]
    readers = [Component.of_reader(r)[0] for r in layout.readers]
    columns: dict[tuple[str, int], list[bool]] = {}
    for r in readers:  # heads and neurons of one layer hear the same
        if (r.kind, r.layer) not in columns:
            heard = [precedes(w, r, parallel=layout.parallel) for w in writers]
            columns[r.kind, r.layer] = heard
    return torch.tensor([columns[r.kind, r.layer] for r in readers]).T


def real_edges(graph: nx.MultiDiGraph) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """`(u, v, key, attributes)` of the edges that can be patched: all but the structural ones."""
    for u, v, key, data in graph.edges(keys=True, data=True):
        if not data["structural"]:
            yield u, v, key, data


def size(graph: nx.MultiDiGraph) -> int:
    """Number of edges, structural ones not counted."""
    return sum(1 for _ in real_edges(graph))


def check_circuit(graph: object) -> nx.MultiDiGraph:
    """Gives `graph` back if it is a circuit with the attributes named above.

    Raises:
        TypeError: it is no `networkx.MultiDiGraph`, or an attribute has another type.
        ValueError: an attribute is missing.
    """
    if not isinstance(graph, nx.MultiDiGraph):
        raise TypeError(
            f"a circuit must be a networkx.MultiDiGraph; got {type(graph).__name__}; make one "
            "with assemble(attribute(model, task, level='edge'))"
        )
    _check_attributes("the graph", graph.graph, GRAPH)
    for node, data in graph.nodes(data=True):
        _check_attributes(f"node {node!r}", data, NODE)
    for u, v, key, data in graph.edges(keys=True, data=True):
        _check_attributes(f"edge {u!r} -> {v!r} ({key!r})", data, EDGE)
    return graph


def _check_attributes(owner: str, data: Mapping[str, object], schema: Mapping[str, type]) -> None:
    for name, kind in schema.items():
        if name not in data:
            raise ValueError(
                f"{owner} must have the attribute {name!r}; it has {sorted(data)}; make circuits "
                "with assemble, and copy attributes when you build one by hand"
            )
        if type(data[name]) is not kind:
            raise TypeError(
                f"attribute {name!r} of {owner} must be {kind.__name__}; got {data[name]!r}; "
                f"convert it with {kind.__name__}(...)"
            )


def _depth(component: Component) -> tuple[float, int, int]:
    """Sorts components from `embed` to `logits`, as a forward pass meets them."""
    layer = float("inf" if component.kind == "logits" else component.layer)
    return layer, _WITHIN_LAYER.get(component.kind, 0), component.head


def _serve_query_heads(graph: nx.MultiDiGraph) -> None:
    """Adds the structural edges: query heads are split evenly over key/value heads, in order."""
    layers: dict[int, dict[str, list[str]]] = defaultdict(lambda: {"kv": [], "head": []})
    for node, data in graph.nodes(data=True):  # in order of head
        if data["kind"] in ("kv", "head"):
            layers[data["layer"]][data["kind"]].append(node)
    for layer, nodes in layers.items():
        sources, heads = nodes["kv"], nodes["head"]
        if not sources:
            continue
        group, rest = divmod(len(heads), len(sources))
        if rest:
            raise ValueError(
                f"query heads must divide evenly over key/value heads: layer {layer} has "
                f"{len(heads)} and {len(sources)}; give scores that hold all heads of a layer"
            )
        for i, head in enumerate(heads):
            graph.add_edge(
                sources[i // group],
                head,
                key="kv",
                score=0.0,
                slot="kv",
                pos=-1,
                structural=True,
                reader="",
            )
