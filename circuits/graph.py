"""Edge scores -> a `networkx.MultiDiGraph`, the form in which circuits travel.

    circuit = assemble(attribute(model, task, rules=RELP, level="edge"))
    circuit.edges["L5H5", "L9H6", "q"]["score"]

Node ids are component names (`embed`, `L9H6`, `L9.mlp`, `logits`). The edge u -> v has the slot
that reads (`q`, `k`, `v`, `in`) as its key, or `q@14` where scores were kept by position, `q@IO`
where they were kept by span. All edges that can exist are there, those with score 0 too: the
assembled graph is the whole model.

Key/value heads of grouped-query attention are nodes of their own (`L9KV1`): what they read are
edges into them, and one structural edge (key `kv`, score 0) leads to each query head they serve.
Structural edges carry paths and are not counted: they cannot be patched.

Neurons are nodes (`L9N17`) if the scores were computed with some split off: then `L9.mlp` is the
rest of that MLP, and the graph keeps their names, as a neuron that a circuit lacks is cut and no
part of `L9.mlp`.

Attributes (only str, int, float and bool, so that every file format can hold them):

=====  ==============  =====  ==================================================================
node   kind            str    embed, head, kv, neuron, attn, mlp, mixer, feature, rest or logits
       layer, head     int    -1 where there is none; a neuron's or feature's number is its `head`
       score           float  sum of the node's outgoing edges in the full graph = its node score
edge   score           float  in units of the metric; the sign is that of `Scores`
       slot            str    q, k, v, in, or kv for structural edges
       pos             int    position of the token, or number of the span; -1 if summed over all
       structural      bool   True: leads from a key/value head to a query head
       reader          str    the reader in full (`L9H6.q`), empty for structural edges
graph  model, task, rules, direction, metric, level  str, as in `Scores`
       versions, dtype, weights, quantization, dictionaries  str, as in `Provenance`
       compatibility   bool   True if the bridge was in compatibility mode
       metric_clean    float  mean of the metric over the clean prompts
       metric_corrupt  float  mean of the metric over the corrupt prompts
       pairs           int    pairs of prompts behind the scores
       total_edges     int    edges of the full graph, structural ones not counted
       positions       bool   True if edges are kept by position, or by span
       by_span         bool   True if edges are kept by span
       places          str    JSON, a list: what figures call each position (`" Mary"@4`) or span
       prompt          str    JSON, a list: the tokens of the first clean prompt
       neurons         str    names of the neurons that were split off, with spaces between
=====  ==============  =====  ==================================================================
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import networkx as nx
import pandas as pd
from jaxtyping import Bool, Float
from torch import Tensor

from relp import EdgeEffects, EdgeScores, Provenance, Scores

__all__ = [
    "Circuit",
    "assemble",
    "check_circuit",
    "check_edges",
    "edge_key",
    "edge_table",
    "has_lanes",
    "has_place",
    "height",
    "keep",
    "labelled",
    "place_label",
    "real_edges",
    "size",
]

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
    "versions": str,
    "dtype": str,
    "weights": str,
    "quantization": str,
    "compatibility": bool,
    "dictionaries": str,
    "metric_clean": float,
    "metric_corrupt": float,
    "pairs": int,
    "level": str,
    "total_edges": int,
    "positions": bool,
    "by_span": bool,
    "places": str,
    "prompt": str,
    "neurons": str,
}
UNSTATED: Mapping[str, object] = {
    **{name: "unknown" if kind is str else kind() for name, kind in GRAPH.items()},
    "quantization": "",
    "dictionaries": "",
    "places": "[]",
    "prompt": "[]",
}
"""What the graph's attributes are where a file does not say."""


class Circuit(nx.MultiDiGraph):  # type: ignore[misc]  # networkx has no types
    """A `networkx.MultiDiGraph` that says what it is: a line when printed, a page in a notebook.

    >>> circuit
    Circuit(200 of 3,628 edges, 35 nodes, RELP · ioi-gpt2 · ioi · denoise)

    Verbs that take a circuit take any `MultiDiGraph` with the attributes above.
    """

    def __repr__(self) -> str:
        try:
            check_circuit(self)
        except (TypeError, ValueError):  # some of its attributes were taken away, or it is new
            return f"Circuit({self.number_of_edges():,} edges, {len(self):,} nodes)"
        source = Provenance.of(self.graph)
        of = f"{size(self):,} of {self.graph['total_edges']:,} edges"
        return f"Circuit({of}, {len(self):,} nodes, {source.title})"

    __str__ = __repr__

    def _repr_html_(self) -> str | None:
        """The page of `circuits.explore`; None, so that the line is shown, where there is none."""
        from circuits.explorer import inline

        try:
            return inline(self)
        except (TypeError, ValueError):  # it is empty, or no longer a circuit
            return None


def assemble(
    scores: Scores, kept: Bool[Tensor, "*pos writer reader"] | None = None
) -> nx.MultiDiGraph:
    """The graph of edge scores; see the module's docstring for its attributes.

    >>> graph = assemble(edges)                      # every node and edge of the model
    >>> graph.edges["embed", "L0.mlp", "in"]["score"]
    3.8...

    Args:
        scores: edge scores, by position or summed over all.
        kept: which edges the graph has, with their ends and the structural edges between those;
            if None all edges and nodes of the model. Its attributes are those of the full graph.

    Raises:
        TypeError: `scores` is not `Scores`.
        ValueError: the scores are of nodes, are not finite, or the query heads of a layer do not
            divide evenly over its key/value heads.
    """
    scores = check_edges(scores)
    table, layout = edge_table(scores), scores.layout
    exists = layout.exists.expand(table.shape)
    edges = list(_edges(scores, table, exists if kept is None else exists & kept))
    read = {v for _, v, _, _ in edges}
    used = read | {u for u, _, _, _ in edges}
    for source, heads in layout.serves.items():
        for head in heads:
            if kept is None or (source in read and head in used):
                data = {"score": 0.0, "slot": "kv", "pos": -1, "structural": True, "reader": ""}
                edges.append((source, head, "kv", data))
    # reader after reader, so that the sum does not depend on how it is vectorised
    totals = table.sum(0).T.contiguous().numpy().sum(0).tolist()
    graph = Circuit()
    last = 1 + max(c.layer for c in layout.components)  # behind all blocks
    for c in layout.components:
        if kept is None or c.name in used:
            score = totals[layout.row[c.name]] if c.name in layout.row else 0.0
            layer = last if c.name.startswith("final/") else c.layer
            graph.add_node(c.name, kind=c.kind, layer=layer, head=c.head, score=score)
    graph.add_edges_from(edges)
    graph.graph.update(
        **asdict(scores.provenance) | {"direction": str(scores.direction)},
        metric_clean=float(scores.clean.double().mean()),
        metric_corrupt=float(scores.corrupt.double().mean()),
        pairs=len(scores.clean),
        level=str(scores.level),
        total_edges=int(exists.sum()),
        positions=scores.edges.dim() == 3,
        by_span=bool(scores.places),
        places=json.dumps(scores.place_labels),
        prompt=json.dumps(scores.pairs.prompt),
        neurons=" ".join(c.name for c in layout.sources if c.kind == "neuron"),
    )
    return graph


def labelled(graph: nx.MultiDiGraph, texts: Mapping[str, str] | pd.DataFrame) -> nx.MultiDiGraph:
    """The same circuit with texts that say what nodes stand for, as pictures show on hovering.

    >>> from circuits import labelled
    >>> labelled(circuit, {"embed": "the tokens"}).nodes["embed"]["text"]
    'the tokens'

    Args:
        graph: a circuit; it stays as it is.
        texts: by name of a node, or a table with the columns `feature` and `text`. Names that are
            not in the circuit are left alone: a table may be of all features.

    Raises:
        TypeError: `graph` is no circuit.
        ValueError: the table has not these columns, or no name is in the circuit.
    """
    check_circuit(graph)
    if isinstance(texts, pd.DataFrame):
        if not {"feature", "text"} <= set(texts.columns):
            raise ValueError(
                "a table of labels must have the columns 'feature' and 'text'; got "
                f"{', '.join(map(str, texts.columns)) or 'none'}; rename them"
            )
        texts = dict(zip(texts["feature"].astype(str), texts["text"].astype(str), strict=True))
    known = {name: str(text) for name, text in texts.items() if name in graph}
    if not known:
        raise ValueError(
            f"labels must be by names of nodes of the circuit, such as {next(iter(graph), '')!r}; "
            f"got {next(iter(texts), 'none')!r}; see list(circuit)"
        )
    named = graph.copy()
    nx.set_node_attributes(named, known, "text")
    return named


_HEIGHT = {"kv": 0, "neuron": 2, "mlp": 2, "resid": 0, "mid": 2, "neurons": 2, "final": 0}


def height(node: str, kind: str) -> int:
    """Where in its layer a node stands: an MLP hears the heads of its layer, these the stream.

    >>> from circuits.graph import height
    >>> height("L3.mlp", "mlp"), height("L3H1", "head"), height("L3.resid/f7", "feature")
    (2, 1, 0)
    """
    if kind in ("feature", "rest"):
        kind = node.partition("/")[0].rpartition(".")[2]
    return _HEIGHT.get(kind, 1)


def _edges(
    scores: EdgeScores,
    table: Float[Tensor, "pos writer reader"],
    chosen: Bool[Tensor, "pos writer reader"],
) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """`(u, v, key, attributes)` of the chosen edges, in the order of the graph: writers as its
    nodes are, and the readers of one component side by side, where its first one is."""
    layout, places = scores.layout, scores.places or scores.positions
    owners = [owner.name for owner, _ in layout.targets]
    first = {name: i for i, name in reversed(list(enumerate(owners)))}
    columns = sorted(range(len(owners)), key=lambda column: first[owners[column]])
    rows = [layout.row[c.name] for c in layout.components if c.name in layout.row]
    chosen, table = (t.permute(1, 2, 0)[rows][:, columns] for t in (chosen, table))
    for (w, r, p), score in zip(chosen.nonzero().tolist(), table[chosen].tolist(), strict=True):
        column = columns[r]
        slot = layout.targets[column][1]
        pos = p if scores.edges.dim() == 3 else -1
        data = {"score": score, "slot": slot, "pos": pos, "structural": False}
        data["reader"] = layout.readers[column]
        yield layout.writers[rows[w]], owners[column], edge_key(slot, places[p]), data


def edge_key(slot: str, place: int | str) -> str:
    """The key of an edge: its slot, and its position (unless that is -1) or span."""
    return slot if place == -1 else f"{slot}@{place}"


def place_label(graph: nx.MultiDiGraph, pos: int) -> str:
    """What figures call a position or span: `" Mary"@4`, `IO@2`, `IO`; `@4` if that is all."""
    labels = json.loads(graph.graph["places"])
    return str(labels[pos]) if 0 <= pos < len(labels) else f"@{pos}"


def has_lanes(graph: nx.MultiDiGraph) -> bool:
    """Whether nodes stand for a component at one place, as `circuits.draw.lanes` makes them."""
    return len(graph) > 0 and all(has_place(graph, node) for node in graph)


def has_place(graph: nx.MultiDiGraph, node: str) -> bool:
    """Whether a node stands for a component at one place; a user's own `pos` alone says nothing."""
    return bool(graph.graph["positions"]) and {"pos", "name"} <= graph.nodes[node].keys()


def check_edges(scores: object) -> EdgeScores:
    """Gives `scores` back if a graph can be made of them.

    Raises:
        TypeError, ValueError: as `assemble`.
    """
    if not isinstance(scores, Scores):
        raise TypeError(
            f"`scores` must be Scores; got {type(scores).__name__}; call "
            "attribute(model, task, level='edge')"
        )
    if not isinstance(scores, EdgeScores):
        raise ValueError(
            "assemble needs edge scores; these are node scores; call "
            "attribute(model, task, level='edge')"
        )
    if scores.edges.dim() == 3 and not scores.places and len(scores.lengths.unique()) > 1:
        raise ValueError(
            "edges by position make a circuit if all prompts have one length; these have lengths "
            f"{sorted(set(scores.lengths.tolist()))}, so that a position is of some pairs only; "
            "call attribute(level='edge', positions='spans'), or leave `positions` out"
        )
    if not bool(scores.edges.isfinite().all()):
        bad = int((~scores.edges.isfinite()).sum())
        if isinstance(scores, EdgeEffects) and bad == int(scores.edges.isnan().sum()):
            raise ValueError(
                f"a circuit is chosen among all edges; {bad} of {scores.edges.numel()} of these "
                "effects were not measured; give the scores of attribute(level='edge'), or measure "
                "all with patch(level='edge')"
            )
        raise ValueError(
            f"edge scores must be finite; {bad} of {scores.edges.numel()} are NaN or infinite; "
            "look for half-precision overflow or a metric that divides by zero"
        )
    return scores


def edge_table(scores: EdgeScores) -> Float[Tensor, "pos writer reader"]:
    """Edge scores, 0 where there is no edge; one position if they are summed over all."""
    table = scores.by_position.detach().cpu().double()
    return table.where(scores.layout.exists, 0.0)


def real_edges(graph: nx.MultiDiGraph) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """`(u, v, key, attributes)` of the edges that can be patched: all but the structural ones."""
    for u, v, key, data in graph.edges(keys=True, data=True):
        if not data["structural"]:
            yield u, v, key, data


def size(graph: nx.MultiDiGraph) -> int:
    """Number of edges, structural ones not counted."""
    return sum(1 for _ in real_edges(graph))


def keep(graph: nx.MultiDiGraph, edges: Iterable[tuple[str, str, str]]) -> nx.MultiDiGraph:
    """A copy with these edges, their ends, and the structural edges between those."""
    edges = {(u, v, key) for u, v, key in edges if not graph.edges[u, v, key]["structural"]}
    read = {v for _, v, _ in edges}
    used = read | {u for u, _, _ in edges}
    edges |= {
        (u, v, key)
        for u, v, key, data in graph.edges(keys=True, data=True)
        if data["structural"] and u in read and v in used
    }
    result = Circuit()
    result.graph.update(graph.graph)
    result.add_nodes_from(
        (node, data.copy()) for node, data in graph.nodes(data=True) if node in used
    )
    result.add_edges_from(
        (u, v, key, data.copy())
        for u, v, key, data in graph.edges(keys=True, data=True)
        if (u, v, key) in edges
    )
    return result


def check_circuit(graph: object) -> nx.MultiDiGraph:
    """Gives `graph` back if it is a circuit with the attributes named above.

    Raises:
        TypeError: it is no `networkx.MultiDiGraph`, or an attribute has another type.
        ValueError: an attribute is missing, or is no list in JSON that must be one, or edges by
            position stand beside others.
    """
    if not isinstance(graph, nx.MultiDiGraph):
        raise TypeError(
            f"a circuit must be a networkx.MultiDiGraph; got {type(graph).__name__}; make one "
            "with assemble(attribute(model, task, level='edge'))"
        )
    _check_attributes("the graph", graph.graph, GRAPH)
    for name in ("places", "prompt"):
        _check_list(name, graph.graph[name])
    for node, data in graph.nodes(data=True):
        _check_attributes("node {!r}", data, NODE, node)
    kept = graph.graph["positions"]
    for u, v, key, data in graph.edges(keys=True, data=True):
        _check_attributes("edge {!r} -> {!r} ({!r})", data, EDGE, u, v, key)
        if (data["pos"] >= 0) != kept and not data["structural"]:
            raise ValueError(
                f"edges of a circuit must {'' if kept else 'not '}be kept by position, as its "
                f"attribute `positions` says; {u!r} -> {v!r} ({key!r}) has pos {data['pos']}; do "
                "not join circuits that are by position with others"
            )
    return graph


def _check_list(name: str, text: str) -> None:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise ValueError(
            f"attribute {name!r} of the graph must be a list of texts in JSON; got {text!r}; "
            'write "[]" if there are none'
        )


def _check_attributes(
    owner: str, data: Mapping[str, object], schema: Mapping[str, type], *names: object
) -> None:
    if all(type(data.get(name)) is kind for name, kind in schema.items()):
        return
    owner = owner.format(*names)
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
