"""Greedy and node-level circuits, against slow second versions and cases worked out by hand."""

import inspect

import networkx as nx
import pytest
from test_graph import circuit_of, make_scores, names

from circuits.graph import assemble, real_edges, size
from circuits.search.prune import between, connect, greedy, random, threshold, top, top_nodes


def slowly(graph: nx.MultiDiGraph, edges: int, signed: bool) -> set[tuple[str, str, str]]:
    """EAP-IG's apply_greedy without its last step: the best edge into what is reached, n times."""
    worth = float if signed else abs
    taken: set[tuple[str, str, str]] = set()
    while len(taken) < edges:
        reached = {"logits"} | {u for u, _, _ in taken}
        reached |= {u for u, v, d in graph.edges(data=True) if d["structural"] and v in reached}
        into = [e for e in real_edges(graph) if e[1] in reached and e[:3] not in taken]
        taken.add(min(into, key=lambda e: (-worth(e[3]["score"]), e[:3]))[:3])
    return taken


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("kv_heads", [None, 1])
def test_greedy_equals_its_definition(seed, signed, kv_heads):
    graph = assemble(make_scores(kv_heads=kv_heads, seed=seed))
    for edges in (0, 1, 2, 5, 11, size(graph)):
        loose = greedy(graph, edges=edges, signed=signed, connected=False)
        assert names(loose) == slowly(graph, edges, signed)
        kept = greedy(graph, edges=edges, signed=signed)
        assert names(connect(loose)) <= names(kept) and size(kept) <= edges
        assert names(connect(kept)) == names(kept)


def test_greedy_waits_behind_a_weak_edge_and_takes_nothing_that_leads_nowhere():
    graph = circuit_of(
        ("embed", "L0H0", "v", 9.0),
        ("L0H0", "logits", "in", 1.0),
        ("L0H1", "L1H0", "k", 8.0),
        ("embed", "logits", "in", 2.0),
        ("L1.mlp", "logits", "in", -3.0),
    )
    path = [("L1.mlp", "logits", "in"), ("embed", "logits", "in"), ("L0H0", "logits", "in")]
    for n in (1, 2, 3):
        assert names(greedy(graph, edges=n, connected=False)) == set(path[:n])
    assert names(greedy(graph, edges=4, connected=False)) == {*path, ("embed", "L0H0", "v")}
    assert ("L0H1", "L1H0", "k") in names(top(graph, edges=2, connected=False))
    assert names(greedy(graph, edges=1)) == {("embed", "logits", "in")}
    assert names(greedy(graph, edges=3)) == {
        ("embed", "logits", "in"), ("L0H0", "logits", "in"), ("embed", "L0H0", "v")
    }  # fmt: skip


def test_signed_means_help_in_either_direction():
    denoise = assemble(make_scores())
    noise = assemble(make_scores(direction="noise"))
    for *_, data in noise.edges(data=True):
        data["score"] *= -1
    for _, data in noise.nodes(data=True):
        data["score"] *= -1
    for choose in (top, greedy):
        a, b = (choose(g, edges=9, signed=True) for g in (denoise, noise))
        assert names(a) == names(b)
    a, b = (top_nodes(g, nodes=2, signed=True) for g in (denoise, noise))
    assert set(a) == set(b)


def test_a_pruned_graph_can_be_pruned_again():
    graph = threshold(assemble(make_scores(layers=3)), 0.3, connected=False)
    for edges in (3, 10, 1000):
        kept = greedy(graph, edges=edges)
        assert names(kept) <= names(graph) and names(connect(kept)) == names(kept)
    assert names(greedy(graph, edges=1000)) == names(connect(graph))
    assert len(greedy(circuit_of(), edges=0)) == 0


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_between_keeps_every_edge_between_its_nodes(kv_heads):
    graph = assemble(make_scores(layers=3, heads=4, kv_heads=kv_heads))
    kept = between(graph, ["L0H1", "L2H3", "L1.mlp"])
    heads = {"L0H1", "L2H3"}
    expected = heads | {"embed", "L1.mlp", "logits"}
    expected |= set() if kv_heads is None else {"L0KV0", "L2KV1"}
    assert set(kept) == expected
    assert nx.utils.graphs_equal(kept, graph.subgraph(expected))
    assert names(between(graph, [])) == {("embed", "logits", "in")}
    with pytest.raises(ValueError, match="'L7H0' is none of its"):
        between(graph, ["L0H1", "L7H0"])


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_top_nodes_are_the_best_heads_and_mlps(kv_heads):
    graph = assemble(make_scores(layers=3, heads=4, kv_heads=kv_heads))
    ranked = sorted(
        (n for n, d in graph.nodes(data=True) if d["kind"] in ("head", "mlp")),
        key=lambda n: -abs(graph.nodes[n]["score"]),
    )
    for nodes in (0, 1, 4, 15, 99):
        kept = top_nodes(graph, nodes=nodes)
        assert names(kept) == names(between(graph, ranked[:nodes]))
        assert names(connect(kept)) == names(kept)
    assert nx.utils.graphs_equal(top_nodes(graph, nodes=15), graph)
    # key/value heads, whose score is 0, are not counted before nodes that do harm either
    ranked.sort(key=lambda n: -graph.nodes[n]["score"])
    assert graph.nodes[ranked[-2]]["score"] < 0
    kept = top_nodes(graph, nodes=14, signed=True)
    assert names(kept) == names(between(graph, ranked[:14]))
    with pytest.raises(ValueError, match="got -1"):
        top_nodes(graph, nodes=-1)
    for choose in (lambda: greedy(graph, edges=0.5), lambda: top_nodes(graph, nodes=0.5)):
        with pytest.raises(TypeError):
            choose()


def test_random_circuits_are_drawn_by_their_seed_and_not_by_score():
    graph = assemble(make_scores(layers=3, kv_heads=1))
    one, again, other = (random(graph, edges=12, seed=seed) for seed in (0, 0, 1))
    assert names(one) == names(again) != names(other)
    assert names(connect(one)) == names(one) and 0 < size(one) <= 12
    assert size(random(graph, edges=12, connected=False)) == 12
    for *_, data in real_edges(graph):
        data["score"] = 0.0
    assert names(random(graph, edges=12)) == names(one)


def test_the_input_is_left_alone_and_shares_nothing():
    graph = assemble(make_scores(kv_heads=1))
    before = graph.copy()
    for kept in (greedy(graph, edges=9), top_nodes(graph, nodes=2), between(graph, ["L0H0"])):
        for *_, data in kept.edges(data=True):
            data["score"] = 123.0
        kept.nodes["embed"]["score"] = 5.0
        kept.graph["task"] = "other"
    assert nx.utils.graphs_equal(graph, before)


def test_a_graph_of_someone_elses_is_refused():
    for choose in (
        lambda g: greedy(g, edges=1), lambda g: top_nodes(g, nodes=1), lambda g: between(g, [])
    ):  # fmt: skip
        with pytest.raises(ValueError, match="must have the attribute 'model'"):
            choose(nx.MultiDiGraph([("embed", "logits")]))
    with pytest.raises(TypeError, match="got EdgeScores"):
        inspect.unwrap(between)(make_scores(), [])
