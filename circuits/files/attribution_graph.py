"""Circuits as .graph.json: what the viewers of circuit-tracer and of Neuronpedia open.

The format has a column for each token of the prompt, so it is for circuits by position (or span).
A component is a node at each place where it reads or writes, as `circuits.draw.lanes.by_lane` has
it; the scores of edges from one node to another (`q`, `k`, `v`) are one link with their sum. What a
head hears as keys and values at one place and writes at another is a link too: its weight is the
sum of what arrives there, in equal shares if it goes to several places, as a circuit does not know
how it is divided. A link stays where its scores cancel, with a weight of 1e-9. The output that the
metric reads is the logit: the format wants its probability, which a circuit does not know, so that
it says `(p=n/a)`.

What is ours stands as node-link data under a key `relp`, which viewers skip: so a file that `save`
wrote can be read, and no other. The format: `graph-schema.json` of hijohnnylin/neuronpedia and
`graph_models.py` of safety-research/circuit-tracer, both on github.com.
"""

from __future__ import annotations

import html
import json
import re
from collections import defaultdict
from typing import Any

import networkx as nx

from circuits.draw import paint
from circuits.draw.lanes import by_lane
from circuits.files.node_link import from_json, to_json
from circuits.graph import Circuit, place_label, size

__all__ = ["SAID", "from_attribution_graph", "to_attribution_graph"]

SAID = (
    "must be an attribution graph written by circuits.save; it is not ({}); those of "
    "circuit-tracer itself hold features, no components, and cannot be read"
)
"""Of a file that holds no circuit of ours."""

_NUMBERS = {"head": 0, "kv": 1_000, "attn": 2_000, "mixer": 2_001, "mlp": 2_002, "neuron": 10_000}
"""Where the numbers of each kind begin, as the format has numbers in place of names."""
_NOTHING = 1e-9
"""The weight of a link whose scores cancel: viewers divide by the sum of what arrives, and prune
what has no input."""
_SHOWN = str.maketrans({"\n": "⏎", "\t": "→", "\r": "↵"})
"""How circuit-tracer writes tokens that would break a line."""


def to_attribution_graph(graph: nx.MultiDiGraph, title: str | None = None) -> str:
    """The circuit with a column for each token, and itself inside.

    Raises:
        ValueError: edges are summed over positions, or lie in the first layer alone: the viewers
            find no layer then.
    """
    if not graph.graph["positions"]:
        raise ValueError(
            "an attribution graph must have its edges by position; this circuit's are summed over "
            "all; use attribute(model, task, level='edge', positions=True), or save as .html"
        )
    lanes = by_lane(graph)
    deepest = max(
        (d["layer"] for _, d in lanes.nodes(data=True) if d["kind"] != "logits"), default=0
    )
    if deepest < 1:
        raise ValueError(
            "an attribution graph must reach above layer 0, or its viewers refuse it; this circuit "
            "does not; keep more edges, or save as .html"
        )
    tokens = _tokens(lanes)
    nodes = {
        name: _node(data, deepest, graph.graph["metric"]) for name, data in lanes.nodes(data=True)
    }
    embedded = {data["pos"] for _, data in lanes.nodes(data=True) if data["kind"] == "embed"}
    rest = [
        _node({"kind": "embed", "head": -1, "layer": -1, "name": "embed", "pos": pos}, deepest, "")
        for pos in sorted({*range(len(tokens))} - embedded)
    ]  # viewers show the tokens that are embedded
    named = title or f"{paint.heading(graph)} · {paint.extent(graph)}"
    described = {
        "metadata": {
            "slug": re.sub(r"[^a-z0-9]+", "-", named.lower()).strip("-") or "circuit",
            "scan": graph.graph["model"],
            "transcoder_list": [],
            "prompt_tokens": tokens,
            "prompt": "".join(json.loads(graph.graph["prompt"])) or " ".join(tokens),
            "info": {
                "description": named,
                "generator": {"name": "relp", "version": graph.graph["versions"]},
            },
            "generation_settings": {
                name: graph.graph[name]
                for name in ("task", "metric", "rules", "direction", "pairs")
            },
            "pruning_settings": {"edges": size(graph), "total_edges": graph.graph["total_edges"]},
        },
        "qParams": {
            "pinnedIds": [],
            "supernodes": [],
            "linkType": "both",
            "clickedId": next((n["node_id"] for n in nodes.values() if n["is_target_logit"]), ""),
            "sg_pos": "",
        },
        "nodes": [*rest, *nodes.values()],
        "links": [
            {
                "source": nodes[u]["node_id"],
                "target": nodes[v]["node_id"],
                "weight": weight or _NOTHING,
            }
            for (u, v), weight in _weights(lanes).items()
        ],
        "relp": json.loads(to_json(graph)),
    }
    return json.dumps(described, ensure_ascii=False, allow_nan=False)


def from_attribution_graph(text: str) -> Circuit:
    """The circuit in a file that `to_attribution_graph` made."""
    data = json.loads(text)
    if "relp" not in data:
        raise ValueError('it has no key "relp"')
    return from_json(json.dumps(data["relp"]))


def _tokens(lanes: nx.MultiDiGraph) -> list[str]:
    """What stands at the head of each column: tokens of the first prompt, or names of spans."""
    tokens = json.loads(lanes.graph["places" if lanes.graph["by_span"] else "prompt"])
    columns = 1 + max(data["pos"] for _, data in lanes.nodes(data=True))
    tokens += [place_label(lanes, pos) for pos in range(len(tokens), max(columns, 2))]
    return [token.translate(_SHOWN) for token in tokens]


def _weights(lanes: nx.MultiDiGraph) -> dict[tuple[str, str], float]:
    """What goes from node to node: scores, and what heads carry from place to place."""
    result: dict[tuple[str, str], float] = defaultdict(float)
    for node in lanes:
        leaving = [(v, data) for _, v, data in lanes.out_edges(node, data=True)]
        onward = [v for v, data in leaving if data["structural"]]
        for v, data in leaving:
            result[node, v] += data["score"]
        carried = sum(d["score"] for *_, d in lanes.in_edges(node, data=True) if d["slot"] != "q")
        here = len(onward) < len(leaving)  # the head writes at this place too
        for v in onward:
            result[node, v] += carried / (len(onward) + here)
    return result


def _node(data: dict[str, Any], deepest: int, metric: str) -> dict[str, Any]:
    kind, pos = data["kind"], data["pos"]
    least = -1 if kind == "kv" else 0  # what a mixer reads stands before all key/value heads
    feature = _NUMBERS.get(kind, 0) + max(data["head"], least)
    layer, named = str(data["layer"]), html.escape(data["name"])  # viewers set it as HTML
    sort = "unknown"  # any other makes them look for a feature
    if kind == "embed":
        layer, sort, feature = "E", "embedding", pos
    elif kind == "logits":
        layer, sort = str(deepest + 1), "logit"
        named = f'Output "{html.escape(metric)}" (p=n/a)'
    return {
        "node_id": f"{layer}_{feature}_{pos}",
        "feature": feature,
        "layer": layer,
        "ctx_idx": pos,
        "feature_type": sort,
        "token_prob": 0.0,
        "is_target_logit": kind == "logits",
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{layer}_{feature}-{pos}",
        "clerp": named,
        "influence": None,
        "activation": None,
    }
