"""The graph files of EAP-IG and of MIB's circuit track, both ways.

    to_mib(assemble(edges), "ioi_gpt2/importances.json", model)
    graph = from_mib("ioi_gpt2/importances.json", model)

`circuits.save` and `circuits.load` do the same for files named .mib.json.

The format, Graph.to_json of github.com/hannamw/EAP-IG 2.0 (MIB: hannamw/MIB-circuit-track), is

    {"cfg": {"n_layers": 12, "n_heads": 12, "parallel_attn_mlp": false, "d_model": 768},
     "nodes": {"input": {"in_graph": true}, "a0.h0": …, "m0": …, "logits": …},
     "edges": {"input->a0.h0<q>": {"score": 0.1, "in_graph": true}, …, "m11->logits": …}}

and holds every edge of the model. A submission to MIB is one folder per task and model, named
`ioi_gpt2`, with one such file of all edges' scores, or nine whose `in_graph` marks circuits of
at most .1 .2 .5 1 2 5 10 20 50 % of the edges.

* Sign: positive means that the edge helps the clean behaviour, as MIB writes scores (its metric is
  a loss); its evaluation ranks by the score itself unless told otherwise. So scores in the
  direction `noise` are negated. EAP-IG itself writes the sign of whatever metric it was given.
* Grouped-query attention: there every query head has k and v edges of its own, here they are edges
  of the key/value head. Scores are first-order effects, and patching the key/value head's edge is
  patching those of all its query heads: so reading adds them up, and writing gives each an equal
  share. All sums, such as a node's score, are the same on both sides, and what is ranked there is
  the score per edge counted there. In a circuit the k and v of the query heads that it has are
  marked; on reading, one marked edge of a group is enough.

Labels that the format has no place for (model, task, rules, direction, metric) stand under a key
`relp`, which EAP-IG skips. EAP-IG's .pt files are pickles and are not read.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import networkx as nx
import torch

from circuits.files.texts import read_circuit, write_file
from circuits.graph import UNSTATED, assemble, check_circuit, real_edges
from relp import Direction, EdgeScores, Layout, Pairs, Provenance, check_texts
from relp.bridge import Sites

__all__ = ["SAID", "Shape", "from_mib", "from_text", "to_mib", "to_text"]

SAID = (
    "must be a graph in EAP-IG's JSON, of the model if one is given; it is not ({}); for other "
    "files of circuits.save use circuits.load, renamed if they end in .mib.json"
)
"""Of a file that is no graph of this format."""

_UNKNOWN = ("level", "total_edges", "positions", "by_span", "places", "prompt", "neurons")
_LABELS = {n: v for n, v in UNSTATED.items() if n not in _UNKNOWN}


class _Edge(NamedTuple):
    """An edge of the format."""

    name: str
    writer: str
    reader: str
    """Ours; the one of the key/value head, if the edge is into a head's k or v."""
    node: str
    """Ours, that the edge leads to: a query head, MLP or `logits`."""


@dataclass(frozen=True)
class Shape:
    """What the format knows of a model, and how many query heads share a key/value head."""

    layers: int
    heads: int
    d_model: int
    parallel: bool
    group: int = 1

    @classmethod
    def of(cls, model: Any) -> Shape:
        """Raises ValueError if the model has other blocks than the format knows."""
        sites = Sites.of(model)
        blocks = sites.blocks
        if not all(b.heads and b.mlp for b in blocks):
            raise ValueError(
                "the format knows blocks of heads and an MLP only; "
                f"{sites.model_name!r} has others; write the graph with circuits.save"
            )
        one = blocks[0]
        return cls(
            len(blocks), one.heads, int(model.cfg.d_model), one.parallel, one.heads // one.kv_heads
        )

    @classmethod
    def read(cls, cfg: dict[str, Any]) -> Shape:
        """As `cfg` has it; each query head has its own keys and values."""
        return cls(
            int(cfg["n_layers"]),
            int(cfg["n_heads"]),
            int(cfg["d_model"]),
            bool(cfg["parallel_attn_mlp"]),
        )

    @property
    def cfg(self) -> dict[str, int | bool]:
        """What the file says of it."""
        return {
            "n_layers": self.layers,
            "n_heads": self.heads,
            "parallel_attn_mlp": self.parallel,
            "d_model": self.d_model,
        }

    @property
    def nodes(self) -> dict[str, str]:
        """From our names to theirs, in the order of a forward pass."""
        names = {"embed": "input"}
        for layer in range(self.layers):
            names |= {f"L{layer}H{h}": f"a{layer}.h{h}" for h in range(self.heads)}
            names[f"L{layer}.mlp"] = f"m{layer}"
        return names | {"logits": "logits"}

    @cached_property
    def inputs(self) -> dict[str, dict[str, str]]:
        """Of each of our nodes that reads: what they write behind its name, and our reader."""
        found = {}
        for layer in range(self.layers):
            for h in range(self.heads):
                head = f"L{layer}H{h}"
                source = head if self.group == 1 else f"L{layer}KV{h // self.group}"
                found[head] = {"<q>": f"{head}.q", "<k>": f"{source}.k", "<v>": f"{source}.v"}
            found[f"L{layer}.mlp"] = {"": f"L{layer}.mlp.in"}
        return found | {"logits": {"": "logits.in"}}

    @cached_property
    def layout(self) -> Layout:
        """Our writers and readers; the k and v of a group of query heads have one reader."""
        *writers, _ = self.nodes
        readers = dict.fromkeys(r for slots in self.inputs.values() for r in slots.values())
        return Layout(tuple(writers), tuple(readers), self.parallel)

    def edges(self) -> Iterator[_Edge]:
        """All edges of the model, as the format has them."""
        names, layout = self.nodes, self.layout
        for node, slots in self.inputs.items():
            for slot, reader in slots.items():
                for row in layout.exists[:, layout.column[reader]].nonzero().flatten().tolist():
                    writer = layout.writers[row]
                    yield _Edge(f"{names[writer]}->{names[node]}{slot}", writer, reader, node)


def to_mib(
    graph: nx.MultiDiGraph,
    path: str | Path,
    model: Any,
    *,
    circuit: nx.MultiDiGraph | None = None,
) -> Path:
    """Writes the scores of `graph` as EAP-IG and MIB read them; the file appears whole.

    >>> to_mib(assemble(edges), "ioi.json", model, circuit=circuit)

    Args:
        graph: whose scores are written. For a submission of importances the full graph; an edge
            that it lacks is written with score 0.
        path: a .json file; an existing one is replaced.
        model: the `TransformerBridge` that the graph is about, for its shape.
        circuit: the edges and nodes to mark as `in_graph`; `graph` itself if None.

    Raises:
        TypeError: `graph` or `circuit` is no circuit.
        ValueError: the suffix is not .json, scores are by position or not finite, neurons were
            split off, an edge is none of the model's (of mixers, for instance, which the format
            does not know), or a label holds half a surrogate pair.
        OSError: the folder does not exist or cannot be written.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise ValueError(f"the suffix must be .json; got {path.name!r}; choose another name")
    text = to_text(graph, shape=Shape.of(model), circuit=circuit)
    return write_file(path, text)


def to_text(
    graph: nx.MultiDiGraph,
    title: str | None = None,
    *,
    shape: Shape,
    circuit: nx.MultiDiGraph | None = None,
) -> str:
    """What `to_mib` writes; the format has no place for a title."""
    known = {(e.writer, e.reader) for e in shape.edges()}
    scores = _scores(check_circuit(graph), known)
    marked = graph if circuit is None else check_circuit(circuit)
    chosen = set(_scores(marked, known))
    sign = Direction(graph.graph["direction"]).sign
    edges = {}
    for e in shape.edges():
        share = sign * scores.get((e.writer, e.reader), 0.0)
        if e.reader.endswith((".k", ".v")):
            share /= shape.group
        inside = (e.writer, e.reader) in chosen and e.node in marked
        edges[e.name] = {"score": share, "in_graph": inside}
    nodes = {theirs: {"in_graph": ours in marked} for ours, theirs in shape.nodes.items()}
    labels = {name: graph.graph[name] for name in _LABELS}
    check_texts("the graph", labels)
    data = {"cfg": shape.cfg, "nodes": nodes, "edges": edges, "relp": labels}
    return json.dumps(data)


def _scores(graph: nx.MultiDiGraph, known: set[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """The scores by (writer, reader)."""
    if graph.graph["positions"]:
        raise ValueError(
            "edges must be summed over positions in this format; these are by position; use "
            "attribute(level='edge') without positions=True"
        )
    if graph.graph["neurons"]:
        raise ValueError(
            "nodes must be heads and whole MLPs in this format; this graph has neurons split off: "
            f"{graph.graph['neurons']}; compute the scores without `neurons`"
        )
    scores = {(u, data["reader"]): data["score"] for u, _, _, data in real_edges(graph)}
    for (writer, reader), score in scores.items():
        if not math.isfinite(score):
            raise ValueError(
                f"scores must be finite; {writer!r} -> {reader!r} has {score}; replace it"
            )
        if (writer, reader) not in known:
            raise ValueError(
                f"every edge must be one of the model's; {writer!r} -> {reader!r} is not; give "
                "the model that the graph is about (the format knows heads and MLPs only)"
            )
    return scores


def from_mib(path: str | Path, model: Any = None, *, in_graph: bool = False) -> nx.MultiDiGraph:
    """Reads a graph that EAP-IG, MIB's code or `to_mib` wrote.

    >>> path = to_mib(assemble(edges), "ioi.json", model, circuit=circuit)
    >>> from_mib(path)                               # all edges
    >>> from_mib(path, in_graph=True)                # the circuit

    Args:
        path: a .json file of that format.
        model: the `TransformerBridge` that it is about. Needed to have key/value heads as nodes,
            as the model's own circuits have under grouped-query attention: the file does not know
            about them. Without it each query head has its own k and v.
        in_graph: give only the edges that the file marks so, instead of all edges.

    Returns:
        A circuit with the file's scores, `direction` `"denoise"` (positive helps the clean
        behaviour) and labels `"unknown"`, unless `to_mib` wrote them into the file.

    Raises:
        ValueError: the file is not of that format, or is about a model of another shape.
        OSError: the file does not exist or cannot be read.
    """
    path = Path(path)
    if path.suffix == ".pt":
        raise ValueError(
            f"the file must be .json; {path.name!r} is pickled, and reading it could run code; "
            "convert it with EAP-IG: Graph.from_pt(path).to_json(path)"
        )
    shape = None if model is None else Shape.of(model)
    return read_circuit(path, partial(from_text, shape=shape, in_graph=in_graph), SAID)


def from_text(text: str, *, shape: Shape | None, in_graph: bool = False) -> nx.MultiDiGraph:
    """Undoes `to_text`: the full graph, or the edges that are marked."""
    data = json.loads(text)
    theirs = Shape.read(data["cfg"])
    shape = shape or theirs
    if shape.cfg != theirs.cfg:
        raise ValueError(f"the file has {theirs.cfg}, the model {shape.cfg}")
    entries = {n: (float(d["score"]), d["in_graph"]) for n, d in data["edges"].items()}
    layout = shape.layout
    terms, marked = defaultdict(list), torch.zeros(layout.exists.shape, dtype=torch.bool)
    for e in shape.edges():
        at = layout.row[e.writer], layout.column[e.reader]
        score, mark = entries.pop(e.name, (0.0, False))
        terms[at].append(score)
        if mark:
            marked[at] = True
    if entries:
        raise ValueError(f"a model with {shape.cfg} has no edge {next(iter(entries))!r}")

    table = torch.zeros(marked.shape, dtype=torch.float64)
    labels: dict[str, Any] = {**_LABELS, "direction": "denoise"} | data.get("relp", {})
    sign = Direction(labels["direction"]).sign
    for at, parts in terms.items():
        table[at] = sign * math.fsum(parts)
    scores = EdgeScores(
        provenance=Provenance.of(labels),
        pairs=Pairs(clean=torch.zeros(1), corrupt=torch.zeros(1), lengths=torch.ones(1).long()),
        layout=layout,
        edges=table,
    )
    graph = assemble(scores, marked if in_graph else None)
    graph.graph.update(labels)
    return graph
