"""Circuits by position, a node for each place: against graphs worked out by hand."""

import json
from collections import defaultdict

import networkx as nx
import pytest
from test_graph import make_scores

from circuits.draw.lanes import by_lane
from circuits.graph import assemble, check_circuit, keep, real_edges, size
from circuits.search.prune import top


def make_circuit(edges=40, **options) -> nx.MultiDiGraph:
    scores = make_scores(**{"positions": 4, "layers": 3, "heads": 4} | options)
    return top(assemble(scores), edges=edges)


def circuit_of(*edges: tuple[str, str, str], **options) -> nx.MultiDiGraph:
    """The circuit of these edges `(u, v, key)`."""
    return keep(assemble(make_scores(**{"positions": 4} | options)), edges)


def links(graph: nx.MultiDiGraph) -> set[tuple[str, str]]:
    """The structural edges."""
    return {(u, v) for u, v, data in graph.edges(data=True) if data["structural"]}


def test_a_head_reads_at_one_place_and_writes_at_another() -> None:
    """An induction head: keys and values of 1, queries of 3; its output leaves at 3."""
    circuit = circuit_of(
        ("embed", "L0H0", "k@0"),
        ("embed", "L0H0", "q@1"),
        ("L0H0", "L1H1", "v@1"),
        ("embed", "L1H1", "q@3"),
        ("L1H1", "logits", "in@3"),
    )
    lanes = by_lane(circuit)
    ends = {(u, v, k) for u, v, k, _ in real_edges(lanes)}
    assert ends == {
        ("embed@0", "L0H0@0", "k@0"),
        ("embed@1", "L0H0@1", "q@1"),
        ("L0H0@1", "L1H1@1", "v@1"),
        ("embed@3", "L1H1@3", "q@3"),
        ("L1H1@3", "logits@3", "in@3"),
    }
    assert links(lanes) == {("L0H0@0", "L0H0@1"), ("L1H1@1", "L1H1@3")}
    assert lanes.nodes["L1H1@3"] == {
        "kind": "head", "layer": 1, "head": 1, "pos": 3, "name": "L1H1",
        "score": circuit.edges["L1H1", "logits", "in@3"]["score"],
    }  # fmt: skip
    assert lanes.nodes["L1H1@1"]["score"] == lanes.nodes["logits@3"]["score"] == 0.0


def test_what_is_read_is_written_at_no_earlier_place() -> None:
    """Keys of 2 reach the outputs at 2 and 3 and not that at 1; queries reach their own alone."""
    circuit = circuit_of(
        ("embed", "L0H0", "k@2"),
        ("embed", "L0H0", "q@0"),
        *(("L0H0", "logits", f"in@{pos}") for pos in (1, 2, 3)),
    )
    lanes = by_lane(circuit)
    assert links(lanes) == {("L0H0@2", "L0H0@3")}
    assert lanes.has_edge("embed@2", "L0H0@2", "k@2") and lanes.out_degree("L0H0@0") == 0
    assert {n for n in lanes if n.startswith("L0H0")} == {f"L0H0@{pos}" for pos in range(4)}


def test_an_mlp_stays_at_its_position() -> None:
    lanes = by_lane(circuit_of(("embed", "L0.mlp", "in@0"), ("L0.mlp", "logits", "in@2")))
    assert links(lanes) == set() and set(lanes) == {
        "embed@0", "L0.mlp@0", "L0.mlp@2", "logits@2",
    }  # fmt: skip


def test_key_value_heads_lead_to_the_query_heads_they_serve() -> None:
    circuit = circuit_of(
        ("embed", "L0KV0", "v@1"),
        ("embed", "L0H1", "q@2"),
        ("L0H0", "logits", "in@0"),
        ("L0H0", "logits", "in@1"),
        ("L0H1", "logits", "in@2"),
        heads=4,
        kv_heads=2,
    )
    lanes = by_lane(circuit)
    assert links(lanes) == {("L0KV0@1", "L0H0@1"), ("L0KV0@1", "L0H1@2")}
    assert lanes.nodes["L0KV0@1"]["score"] == 0.0


def test_spans_come_in_any_order() -> None:
    circuit = circuit_of(
        ("embed", "L0H0", "k@3"),
        ("embed", "L0H1", "v@1"),
        ("L0H0", "logits", "in@0"),
        *(("L0H1", "logits", f"in@{pos}") for pos in range(3)),
    )
    spans = ["IO", "S2", 'a "b"', "other"]
    circuit.graph.update(by_span=True, places=json.dumps(spans))
    lanes = by_lane(circuit)
    assert links(lanes) == {("L0H0@other", "L0H0@IO"), ("L0H1@S2", 'L0H1@a "b"')}
    assert lanes.nodes["embed@other"]["pos"] == 3


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_every_edge_is_there_once_with_all_it_says(kv_heads: int | None) -> None:
    circuit = make_circuit(kv_heads=kv_heads)
    lanes = check_circuit(by_lane(circuit))
    assert size(lanes) == size(circuit) and nx.is_directed_acyclic_graph(lanes)
    names = lanes.nodes(data="name")
    back = {(names[u], names[v], key): data for u, v, key, data in real_edges(lanes)}
    assert back == {(u, v, key): data for u, v, key, data in real_edges(circuit)}
    places, sums = set(), defaultdict(float)
    for u, v, _, data in real_edges(circuit):
        places |= {(u, data["pos"]), (v, data["pos"])}
        sums[u] += data["score"]
    assert {(d["name"], d["pos"]) for _, d in lanes.nodes(data=True)} == places
    assert len(lanes) == len(places)
    for u, v, _, data in real_edges(lanes):
        assert lanes.nodes[u]["pos"] == lanes.nodes[v]["pos"] == data["pos"]
    for node in circuit:
        own = [d for _, d in lanes.nodes(data=True) if d["name"] == node]
        assert sum(d["score"] for d in own) == pytest.approx(sums[node])
        assert {d["kind"] for d in own} == {circuit.nodes[node]["kind"]}
    assert lanes.graph == circuit.graph


def test_what_has_no_positions_or_has_lanes_is_left_as_it_is() -> None:
    plain, lanes = top(assemble(make_scores()), edges=9), by_lane(make_circuit())
    assert by_lane(plain) is plain and by_lane(lanes) is lanes


def test_the_circuit_is_left_alone() -> None:
    circuit = make_circuit()
    before = circuit.copy()
    by_lane(circuit)
    assert nx.utils.graphs_equal(circuit, before)


def test_files_that_name_no_places_have_lanes_too() -> None:
    circuit = make_circuit()
    circuit.graph["places"] = "[]"  # as `load` has it of older files
    assert all(n == f"{d['name']}@{d['pos']}" for n, d in by_lane(circuit).nodes(data=True))
