"""Graphs and pruning, against counts and circuits worked out by hand."""

import functools
import inspect
import time

import networkx as nx
import pytest
import torch
from conftest import made, precedes

from circuits.graph import EDGE, GRAPH, NODE, assemble, real_edges, size
from circuits.search.prune import connect, threshold, top
from relp.layout import Component, Layout
from relp.scores import EdgeEffects, Scores


def make_scores(layers=2, heads=2, kv_heads=None, positions=None, seed=0, **labels) -> Scores:
    """Random edge scores of a model with `layers` blocks; heavy tails, like real ones."""
    writers, readers = ["embed"], []
    for layer in range(layers):
        writers += [f"L{layer}H{h}" for h in range(heads)] + [f"L{layer}.mlp"]
        readers += [f"L{layer}H{h}.q" for h in range(heads)]
        sources = [f"H{h}" for h in range(heads)]
        if kv_heads is not None:
            sources = [f"KV{h}" for h in range(kv_heads)]
        readers += [f"L{layer}{source}.{slot}" for slot in "kv" for source in sources]
        readers.append(f"L{layer}.mlp.in")
    readers.append("logits.in")
    generator = torch.Generator().manual_seed(seed)
    shape = ([positions] if positions else []) + [len(writers), len(readers)]
    edges = torch.randn(shape, generator=generator) ** 3
    exists = torch.tensor(
        [
            [precedes(Component.parse(w), Component.of_reader(r)[0]) for r in readers]
            for w in writers
        ]
    )
    names = {"model": "tiny", "task": "toy", "rules": "relp", "metric": "logit difference"}
    return made(
        **(names | {"direction": "denoise"} | labels),
        clean=torch.tensor([2.0, 4.0]),
        corrupt=torch.tensor([-1.0, 0.0]),
        lengths=torch.tensor([3, 3]),
        writers=tuple(writers),
        readers=tuple(readers),
        edges=edges * exists,
    )


def circuit_of(*edges: tuple[str, str, str, float]) -> nx.MultiDiGraph:
    """A circuit with these edges `(u, v, key, score)`, kept as they are."""
    full = assemble(make_scores())
    for _, _, _, data in full.edges(keys=True, data=True):
        data["score"] = 0.0
    for u, v, key, score in edges:
        full.edges[u, v, key]["score"] = score
    return full


def names(graph: nx.MultiDiGraph) -> set[tuple[str, str, str]]:
    return {(u, v, key) for u, v, key, _ in real_edges(graph)}


# -- assemble -------------------------------------------------------------------------------------


def test_counts_of_a_tiny_model():
    """2 layers, 2 heads: q,k,v of layer 0 read 1 writer, its MLP 3; layer 1: 4 and 6; logits 7."""
    graph = assemble(make_scores())
    assert size(graph) == 6 * 1 + 3 + 6 * 4 + 6 + 7 == graph.graph["total_edges"]
    order = ["embed", "L0H0", "L0H1", "L0.mlp", "L1H0", "L1H1", "L1.mlp", "logits"]
    assert list(graph) == order
    assert graph.in_degree("L1.mlp") == 6 and graph.out_degree("embed") == 6 + 1 + 6 + 1 + 1
    assert set(graph["L0.mlp"]["L1H1"]) == {"q", "k", "v"}
    assert set(graph["L1H0"]["L1.mlp"]) == {"in"}
    assert not graph.has_edge("L1.mlp", "L1H0") and not graph.has_edge("L0H0", "L0H1")
    assert nx.is_directed_acyclic_graph(graph)


@functools.cache
def gpt2_small() -> Scores:
    return make_scores(layers=12, heads=12)


def test_gpt2_small_has_32491_edges():
    scores = gpt2_small()
    start = time.process_time()
    graph = assemble(scores)
    # 0.4 s; the tests' type checker takes another 1.5. This is against growing with the square.
    assert time.process_time() - start < 6
    assert size(graph) == 32_491
    assert len(graph) == 158


def test_attributes_have_the_types_of_the_dictionary():
    scores = make_scores()
    graph = assemble(scores)
    assert {k: type(v) for k, v in graph.graph.items()} == dict(GRAPH)
    for _, data in graph.nodes(data=True):
        assert {k: type(v) for k, v in data.items()} == dict(NODE)
    for *_, data in graph.edges(data=True):
        assert {k: type(v) for k, v in data.items()} == dict(EDGE)
    assert graph.graph["metric_clean"] == 3.0 and graph.graph["metric_corrupt"] == -0.5
    assert graph.graph["pairs"] == 2 and graph.graph["positions"] is False
    edge = graph.edges["L0H1", "L1H0", "k"]
    assert edge["reader"] == "L1H0.k" and edge["pos"] == -1
    w, r = scores.writers.index("L0H1"), scores.readers.index("L1H0.k")
    assert edge["score"] == float(scores.edges[w, r])


def test_a_nodes_score_is_the_sum_of_its_row():
    scores = make_scores()
    graph = assemble(scores)
    for writer, row in zip(scores.writers, scores.edges, strict=True):
        assert graph.nodes[writer]["score"] == pytest.approx(float(row.sum()), abs=1e-5)
    assert graph.nodes["logits"]["score"] == 0.0


def test_zero_scores_stay():
    scores = make_scores()
    scores.edges.zero_()
    assert size(assemble(scores)) == 46


def test_positions_become_keys():
    scores = make_scores(positions=3)
    graph = assemble(scores)
    assert size(graph) == 3 * 46 == graph.graph["total_edges"]
    assert set(graph["embed"]["L0H0"]) == {f"{s}@{p}" for s in "qkv" for p in range(3)}
    w, r = scores.writers.index("embed"), scores.readers.index("L0H0.v")
    edge = graph.edges["embed", "L0H0", "v@2"]
    assert edge["pos"] == 2 and edge["slot"] == "v" and edge["reader"] == "L0H0.v"
    assert edge["score"] == float(scores.edges[2, w, r])
    assert graph.nodes["embed"]["score"] == pytest.approx(float(scores.edges[:, w].sum()), abs=1e-5)


def test_grouped_query_attention_has_key_value_nodes():
    graph = assemble(make_scores(heads=4, kv_heads=2))
    structural = {(u, v) for u, v, d in graph.edges(data=True) if d["structural"]}
    assert structural == {
        (f"L{layer}KV{kv}", f"L{layer}H{h}")
        for layer in (0, 1)
        for kv, h in [(0, 0), (0, 1), (1, 2), (1, 3)]
    }
    assert graph.nodes["L1KV0"]["kind"] == "kv" and graph.nodes["L1KV0"]["score"] == 0.0
    assert set(graph["embed"]["L1KV0"]) == {"k", "v"} and set(graph["embed"]["L1H0"]) == {"q"}
    assert graph.edges["L1KV1", "L1H3", "kv"]["slot"] == "kv"
    # layer 0: 4 q + 4 kv + 5; layer 1: 8 readers of 6 writers + 10; logits: 11 writers.
    assert size(graph) == graph.graph["total_edges"] == 4 + 4 + 5 + 8 * 6 + 10 + 11


def test_key_value_heads_come_before_the_heads_they_serve():
    order = list(assemble(make_scores(heads=2, kv_heads=1)))
    assert order[:5] == ["embed", "L0KV0", "L0H0", "L0H1", "L0.mlp"]


def test_parallel_blocks_have_no_edges_from_heads_to_their_own_mlp():
    scores = make_scores(parallel=True)
    graph = assemble(scores)
    assert graph.has_edge("L0H0", "L1.mlp") and not graph.has_edge("L1H0", "L1.mlp")
    assert size(graph) == int(scores.layout.exists.sum()) == 46 - 2 * 2


@pytest.mark.parametrize("parallel", [False, True])
def test_neurons_hear_what_their_mlp_hears(parallel):
    names = [f"L{layer}{part}" for layer in (0, 1) for part in ("H0", "N3", "N7", ".mlp")]
    readers = [*(f"{n}.{s}" for n in names for s in ("qv" if "H" in n else ("in",))), "logits.in"]
    layout = Layout(("embed", *names), tuple(readers), parallel)
    found = layout.exists
    for w, row in zip(layout.writers, found.tolist(), strict=True):
        for r, exists in zip(readers, row, strict=True):
            owner, _ = Component.of_reader(r)
            assert exists == precedes(Component.parse(w), owner, parallel=parallel), (w, r)


def test_uneven_groups_are_refused():
    with pytest.raises(ValueError, match="layer 0 has 3 and 2"):
        assemble(make_scores(heads=3, kv_heads=2))


def test_node_scores_and_bad_numbers_are_refused():
    nodes = made(
        model="m", task="t", rules="r", direction="denoise", metric="x",
        clean=torch.zeros(1), corrupt=torch.zeros(1), lengths=torch.tensor([1]),
        components=("embed",), nodes=torch.zeros(1, 1, 1),
    )  # fmt: skip
    with pytest.raises(ValueError, match="level='edge'"):
        assemble(nodes)
    with pytest.raises(TypeError, match="must be Scores; got str"):
        inspect.unwrap(assemble)("scores")  # without the tests' type checker
    scores = make_scores()
    scores.edges[0, 0] = float("nan")
    with pytest.raises(ValueError, match="1 of 105 are NaN"):
        assemble(scores)


# -- prune ----------------------------------------------------------------------------------------


def by_definition(graph: nx.MultiDiGraph, edges: int, signed: bool) -> set[tuple[str, str, str]]:
    """The slow second implementation of `top`: try every number of best edges."""
    worth = float if signed else abs
    ranked = sorted(real_edges(graph), key=lambda e: (-worth(e[3]["score"]), e[:3]))
    best: set[tuple[str, str, str]] = set()
    sizes = []
    for n in range(len(ranked) + 1):
        part = nx.MultiDiGraph()
        part.add_nodes_from(["embed", "logits"])
        part.add_edges_from(e[:3] for e in ranked[:n])
        part.add_edges_from((u, v, "kv") for u, v, d in graph.edges(data=True) if d["structural"])
        kept = {
            e[:3]
            for e in ranked[:n]
            if nx.has_path(part, "embed", e[0]) and nx.has_path(part, e[1], "logits")
        }
        sizes.append(len(kept))
        if len(kept) <= edges:
            best = kept
    assert sizes == sorted(sizes), "the connected size must grow with the number of best edges"
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("kv_heads", [None, 1])
def test_top_equals_its_definition(seed, signed, kv_heads):
    graph = assemble(make_scores(kv_heads=kv_heads, seed=seed))
    for edges in (0, 1, 2, 5, 11, 30):
        kept = top(graph, edges=edges, signed=signed)
        assert names(kept) == by_definition(graph, edges, signed)
        assert size(kept) <= edges


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_everything_in_a_connected_circuit_lies_on_a_path(kv_heads):
    graph = assemble(make_scores(layers=5, heads=4, kv_heads=kv_heads))
    sizes = []
    for edges in range(1, 120, 7):
        kept = top(graph, edges=edges)
        sizes.append(size(kept))
        for node in kept:
            assert nx.has_path(kept, "embed", node) and nx.has_path(kept, node, "logits")
    assert sizes == sorted(sizes) and sizes[-1] > 100


def test_top_drops_loose_ends_and_counts_whole_paths():
    graph = circuit_of(
        ("L0H0", "L1.mlp", "in", -9.0),  # leads nowhere until L1.mlp -> logits
        ("embed", "logits", "in", 5.0),
        ("embed", "L0H0", "q", 3.0),
        ("L1.mlp", "logits", "in", 2.0),
    )
    assert names(top(graph, edges=1)) == {("embed", "logits", "in")}
    assert size(top(graph, edges=3)) == 1  # the next path needs three edges at once
    assert size(top(graph, edges=4)) == 4
    assert names(top(graph, edges=1, connected=False)) == {("L0H0", "L1.mlp", "in")}
    assert names(top(graph, edges=1, connected=False, signed=True)) == {("embed", "logits", "in")}


def test_structural_edges_carry_paths_and_follow_their_ends():
    graph = assemble(make_scores(layers=1, heads=4, kv_heads=2))
    for *_, data in real_edges(graph):
        data["score"] = 0.0
    graph.edges["embed", "L0KV0", "v"]["score"] = 2.0
    graph.edges["L0H1", "logits", "in"]["score"] = -1.0
    kept = top(graph, edges=2)
    assert set(kept) == {"embed", "L0KV0", "L0H1", "logits"}
    assert set(kept.edges(keys=True)) == {
        ("embed", "L0KV0", "v"), ("L0KV0", "L0H1", "kv"), ("L0H1", "logits", "in")
    }  # fmt: skip
    loose = top(graph, edges=1, connected=False)
    assert set(loose.edges(keys=True)) == {("embed", "L0KV0", "v")}


def test_limits():
    graph = assemble(make_scores())
    everything = top(graph, edges=10_000)
    assert nx.utils.graphs_equal(everything, graph)
    nothing = top(graph, edges=0)
    assert len(nothing) == 0 and nothing.graph == graph.graph
    with pytest.raises(ValueError, match="got -1"):
        top(graph, edges=-1)
    with pytest.raises(TypeError):
        inspect.unwrap(top)(graph, edges=0.1)
    with pytest.raises(TypeError, match="got str"):
        inspect.unwrap(top)("scores", edges=3)
    with pytest.raises(TypeError, match="got EdgeScores"):
        inspect.unwrap(connect)(make_scores())


def test_ties_do_not_depend_on_the_order_of_the_edges():
    scores = make_scores(layers=3, heads=3)
    scores.edges.fill_(1.0)
    graph = assemble(scores)
    turned = nx.MultiDiGraph()
    turned.graph.update(graph.graph)
    turned.add_nodes_from(reversed(list(graph.nodes(data=True))))
    turned.add_edges_from(reversed(list(graph.edges(keys=True, data=True))))
    for edges in (1, 7, 20):
        for connected in (True, False):
            a = top(graph, edges=edges, connected=connected)
            assert names(a) == names(top(turned, edges=edges, connected=connected))


def test_threshold():
    graph = assemble(make_scores(layers=3))
    kept = threshold(graph, 1.0, connected=False)
    assert names(kept) == {(u, v, k) for u, v, k, d in real_edges(graph) if abs(d["score"]) >= 1}
    assert names(threshold(graph, 1.0)) == names(connect(kept)) < names(kept)
    positive = threshold(graph, 0.0, signed=True, connected=False)
    assert all(d["score"] >= 0 for *_, d in real_edges(positive))
    assert len(threshold(graph, 1e9)) == 0
    least = graph.edges["embed", "L0H0", "q"]["score"]
    for minimum, signed in ((abs(least), False), (least, True)):
        kept = threshold(graph, minimum, signed=signed, connected=False)
        assert kept.has_edge("embed", "L0H0", "q")  # the minimum itself stays
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError) as error:
            threshold(graph, bad)
        assert str(error.value) == (
            f"`minimum` must be 0 or more, as it is compared with |score|; got {bad}; pass "
            "signed=True to compare it with the score itself"
        )


def test_the_input_is_left_alone_and_shares_nothing():
    graph = assemble(make_scores(kv_heads=1))
    before = graph.copy()
    kept = top(graph, edges=9)
    for *_, data in kept.edges(data=True):
        data["score"] = 123.0
    kept.nodes["embed"]["score"] = 5.0
    kept.graph["task"] = "other"
    assert nx.utils.graphs_equal(graph, before)


def test_an_unconnected_circuit_is_empty_and_keeps_its_labels():
    graph = circuit_of(("L0H0", "L1.mlp", "in", 1.0))
    kept = connect(threshold(graph, 0.5, connected=False))
    assert len(kept) == 0 and kept.graph == graph.graph


def test_a_graph_of_someone_elses_is_refused():
    with pytest.raises(ValueError, match="must have the attribute 'model'"):
        connect(nx.MultiDiGraph([("embed", "logits")]))
    graph = assemble(make_scores())
    graph.edges["embed", "logits", "in"]["score"] = 1
    with pytest.raises(TypeError, match="must be float; got 1"):
        connect(graph)


def test_a_large_graph_is_pruned_quickly():
    graph = assemble(gpt2_small())
    start = time.process_time()
    kept = top(graph, edges=200)
    assert time.process_time() - start < 6  # 0.4 s without the tests' type checker
    assert 150 < size(kept) <= 200


def test_effects_of_some_edges_make_no_circuit() -> None:
    scores = make_scores()
    some = scores.edges.clone()
    some[0] = float("nan")
    effect = EdgeEffects(
        provenance=scores.provenance, pairs=scores.pairs, layout=scores.layout, edges=some
    )
    for choose in (assemble, lambda e: top(e, edges=1)):
        with pytest.raises(ValueError, match=r"of these effects were not measured; give the score"):
            choose(effect)
