"""Circuits by position, a node for each place: against graphs worked out by hand."""

import json
import sys
from collections import defaultdict

import networkx as nx
import pytest
from test_graph import make_scores

from circuits import draw, explore
from circuits.draw.lanes import by_lane, drawn, strongest
from circuits.draw.svg import picture
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
    assert links(lanes) == {("L0H0.kv@2", "L0H0@2"), ("L0H0.kv@2", "L0H0@3")}
    assert lanes.has_edge("embed@2", "L0H0.kv@2", "k@2") and lanes.out_degree("L0H0@0") == 0
    heads = {n for n in lanes if n.startswith("L0H0")}
    assert heads == {f"L0H0@{pos}" for pos in range(4)} | {"L0H0.kv@2"}


def test_what_is_asked_at_one_place_reaches_no_other() -> None:
    """Queries and keys of 1, and an output at 3: a path from 1 to 3 is one of keys."""
    circuit = circuit_of(
        ("embed", "L1H1", "q@1"), ("L0H0", "L1H1", "k@1"), ("L1H1", "logits", "in@3")
    )
    lanes = by_lane(circuit)
    assert {(u, v) for u, v in lanes.edges()} == {
        ("embed@1", "L1H1@1"),
        ("L0H0@1", "L1H1.kv@1"),
        ("L1H1.kv@1", "L1H1@3"),
        ("L1H1@3", "logits@3"),
    }
    assert not nx.has_path(lanes, "embed@1", "logits@3")
    assert lanes.nodes["L1H1.kv@1"] == {
        "kind": "kv", "layer": 1, "head": 1, "pos": 1, "name": "L1H1", "score": 0.0,
    }  # fmt: skip


def test_at_the_last_place_one_node_is_enough() -> None:
    circuit = circuit_of(
        *(("embed", "L1H1", f"{slot}@3") for slot in "qkv"), ("L1H1", "logits", "in@3")
    )
    assert set(by_lane(circuit)) == {"embed@3", "L1H1@3", "logits@3"}


@pytest.mark.parametrize("by_span", [False, True])
@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("edges", [40, 150, 400])
def test_an_edge_leads_to_another_if_it_does_in_the_model(
    edges: int, kv_heads: int | None, by_span: bool
) -> None:
    circuit = make_circuit(edges, kv_heads=kv_heads)
    if by_span:
        circuit.graph.update(by_span=True, places='["IO", "S1", "S2", "other"]')
    lanes = by_lane(circuit)
    names = lanes.nodes(data="name")
    found = set()
    for u, v, key, _ in real_edges(lanes):
        heads = [v, *(w for _, w, d in lanes.out_edges(v, data=True) if d["structural"])]
        for head in heads:
            for _, w, then, data in lanes.out_edges(head, keys=True, data=True):
                if not data["structural"]:
                    found.add(((names[u], names[v], key), (names[head], names[w], then)))
                else:
                    assert head == v, "a structural edge leads to no other"
    expected = set()
    for u, v, key, data in real_edges(circuit):
        served = [w for _, w, d in circuit.out_edges(v, data=True) if d["structural"]] or [v]
        moves = circuit.nodes[v]["kind"] in ("head", "kv") and data["slot"] != "q"
        for head in served:
            for _, w, then, onward in circuit.out_edges(head, keys=True, data=True):
                later = by_span or onward["pos"] >= data["pos"]
                if not onward["structural"] and (later if moves else onward["pos"] == data["pos"]):
                    expected.add(((u, v, key), (head, w, then)))
    assert found == expected and len(found) > edges


def test_what_is_drawn_is_cut_before_it_has_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a node has one score in every picture: that of the edges that are seen."""
    circuit = make_circuit(200)
    monkeypatch.setattr(sys.modules["circuits.draw.lanes"], "MOST", 100)
    shown = drawn(circuit)
    assert 50 < size(shown) <= 100 and size(drawn(make_circuit(90))) == size(make_circuit(90))
    for node, data in shown.nodes(data=True):
        if data["kind"] != "kv":
            leaving = [d["score"] for *_, d in shown.out_edges(node, data=True)]
            assert data["score"] == pytest.approx(sum(leaving))
    assert nx.utils.graphs_equal(shown, by_lane(strongest(circuit, 100)))


def test_structural_edges_have_a_bound_too() -> None:
    """A head that reads at 60 places and writes at all: 1,830 pairs of places."""
    edges = [
        edge
        for pos in range(60)
        for edge in (("embed", "L1H1", f"v@{pos}"), ("L1H1", "logits", f"in@{pos}"))
    ]
    circuit = circuit_of(*edges, positions=60)
    assert len(links(by_lane(circuit))) == 1829  # at the last place one node is enough
    shown = strongest(circuit, 500)
    assert 0 < size(shown) < size(circuit) and len(links(by_lane(shown))) <= 500
    scores = [abs(d["score"]) for *_, d in real_edges(shown)]
    left = sorted(abs(d["score"]) for *_, d in real_edges(circuit))
    assert min(scores) >= left[len(left) // 4]
    assert strongest(circuit, 2000) is circuit


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
    assert links(lanes) == {
        ("L0H0@other", "L0H0@IO"),
        ("L0H1.kv@S2", "L0H1@IO"),
        ("L0H1.kv@S2", "L0H1@S2"),
        ("L0H1.kv@S2", 'L0H1@a "b"'),
    }
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
    readers = [n for n in lanes if ".kv@" in n]
    assert len(lanes) == len(places) + len(readers)
    assert all(lanes.nodes[n]["kind"] == "kv" and lanes.nodes[n]["score"] == 0 for n in readers)
    for u, v, _, data in real_edges(lanes):
        assert lanes.nodes[u]["pos"] == lanes.nodes[v]["pos"] == data["pos"]
    for node in circuit:
        own = [d for n, d in lanes.nodes(data=True) if d["name"] == node and n not in readers]
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
    for node, data in by_lane(circuit).nodes(data=True):
        assert node.replace(".kv", "") == f"{data['name']}@{data['pos']}"


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_not_drawn(score: float) -> None:
    circuit = make_circuit()
    u, v, key, _ = next(real_edges(circuit))
    circuit.edges[u, v, key]["score"] = score
    for shown in (draw, explore, picture):
        with pytest.raises(ValueError, match=f"scores must be finite to be drawn; that of '{u}'"):
            shown(circuit)
    assert circuit._repr_html_() is None
