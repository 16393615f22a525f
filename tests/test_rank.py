"""The one ranking against the graphs of edges that it stands for, on scores with many ties."""

from itertools import product
from random import Random

import networkx as nx
import pytest
import torch
from conftest import altered, made, precedes
from test_graph import names

from circuits.graph import assemble, real_edges, size
from circuits.judge.evaluation import _best
from circuits.search.prune import connect, greedy, random, threshold, top
from circuits.search.rank import edge_ranks
from relp.bridge.basis import Basis
from relp.bridge.stream import Place
from relp.layout import Component
from relp.scores import Scores

CASES = [
    dict(zip(("kv", "neurons", "positions", "parallel", "direction"), case, strict=True))
    for case in (
        (None, (), None, False, "denoise"),
        (2, (), None, False, "noise"),
        (None, (3, 11), None, True, "noise"),
        (2, (3, 11), None, False, "denoise"),
        (None, (), 12, False, "denoise"),  # q@10 comes before q@2
        (2, (3,), 3, True, "noise"),
        (None, (), 1, False, "denoise"),
    )
]


def tied(kv, neurons, positions, parallel, direction, seed=0, layers=2) -> Scores:
    """Scores out of seven numbers, those of edges that do not exist too."""
    writers, readers = ["embed"], []
    for layer in range(layers):
        heads = [f"L{layer}H{h}" for h in range(4)]
        sources = heads if kv is None else [f"L{layer}KV{h}" for h in range(kv)]
        mlp = [*(f"L{layer}N{n}" for n in neurons), f"L{layer}.mlp"]
        writers += [*heads, *mlp]
        readers += [f"{h}.q" for h in heads] + [f"{s}.{x}" for x in "kv" for s in sources]
        readers += [f"{m}.in" for m in mlp]
    readers.append("logits.in")
    shape = ([positions] if positions else []) + [len(writers), len(readers)]
    generator = torch.Generator().manual_seed(seed)
    return made(
        model="tiny", task="toy", rules="relp", metric="logit difference", direction=direction,
        clean=torch.tensor([2.0, 4.0]), corrupt=torch.tensor([-1.0, 0.0]),
        lengths=torch.tensor([3, 3]), parallel=parallel,
        writers=tuple(writers), readers=tuple(readers),
        edges=torch.randint(-3, 4, shape, generator=generator).float(),
    )  # fmt: skip


def contents(graph: nx.MultiDiGraph) -> tuple[object, ...]:
    """All that is in a graph, in its order."""
    before = {node: list(graph.pred[node]) for node in graph}
    nodes, edges = list(graph.nodes(data=True)), list(graph.edges(keys=True, data=True))
    return nodes, edges, before, graph.graph


# -- second implementations, one edge at a time ----------------------------------------------------


def assembled(scores: Scores) -> nx.MultiDiGraph:
    """The full graph but for its structural edges and labels."""
    assert scores.edges is not None
    by_position = scores.edges.dim() == 3
    table = (scores.edges if by_position else scores.edges[None]).double()
    graph = nx.MultiDiGraph()
    for c in scores.layout.components:
        graph.add_node(c.name, kind=c.kind, layer=c.layer, head=c.head, score=0.0)
    for r, reader in enumerate(scores.readers):
        owner, slot = Component.of_reader(reader)
        for w, writer in enumerate(scores.writers):
            if not precedes(Component.parse(writer), owner, parallel=scores.parallel):
                continue
            for p in range(len(table)):
                score = float(table[p, w, r])
                key, pos = (f"{slot}@{p}", p) if by_position else (slot, -1)
                graph.add_edge(
                    writer, owner.name, key,
                    score=score, slot=slot, pos=pos, structural=False, reader=reader,
                )  # fmt: skip
                graph.nodes[writer]["score"] += score
    return graph


def on_paths(graph: nx.MultiDiGraph, edges: list[tuple[str, str, str]]) -> set:
    """Those of `edges` that lie on a path from `embed` to `logits`."""
    part = nx.MultiDiGraph(edges)
    part.add_nodes_from(["embed", "logits"])
    part.add_edges_from((u, v) for u, v, d in graph.edges(data=True) if d["structural"])
    behind = nx.descendants(part, "embed") | {"embed"}
    before = nx.ancestors(part, "logits") | {"logits"}
    return {e for e in edges if e[0] in behind and e[1] in before}


def kept(graph: nx.MultiDiGraph, edges: set) -> nx.MultiDiGraph:
    """A copy of these edges and the structural ones between their ends."""
    read, used = {v for _, v, _ in edges}, {end for e in edges for end in e[:2]}
    part = nx.MultiDiGraph(**graph.graph)
    part.add_nodes_from((n, d) for n, d in graph.nodes(data=True) if n in used)
    part.add_edges_from(
        (u, v, key, d)
        for u, v, key, d in graph.edges(keys=True, data=True)
        if (u, v, key) in edges or (d["structural"] and u in read and v in used)
    )
    return part


def first(graph: nx.MultiDiGraph, ranking: list, edges: int, *, connected: bool) -> set:
    """The first edges of a ranking; connected: of the longest start with `edges` on a path."""
    if not connected:
        return set(ranking[:edges])
    low, high = 0, len(ranking)  # the longer the start, the more of it are on a path
    while low < high:
        middle = (low + high + 1) // 2
        if len(on_paths(graph, ranking[:middle])) <= edges:
            low = middle
        else:
            high = middle - 1
    return on_paths(graph, ranking[:low])


def by_score(graph: nx.MultiDiGraph, *, signed: bool) -> list[tuple[str, str, str]]:
    """All edges, the best first, ties by name."""
    sign = -1 if graph.graph["direction"] == "noise" else 1

    def place(edge):
        *name, data = edge
        return -(sign * data["score"] if signed else abs(data["score"])), name

    return [e[:3] for e in sorted(real_edges(graph), key=place)]


def grown(graph: nx.MultiDiGraph, ranking: list) -> list[tuple[str, str, str]]:
    """The best edge into what is reached, again and again."""
    left, taken, reached = list(ranking), [], {"logits"}
    while True:
        reached |= {u for u, v, d in graph.edges(data=True) if d["structural"] and v in reached}
        edge = next((e for e in left if e[1] in reached), None)
        if edge is None:
            return taken
        left.remove(edge)
        taken.append(edge)
        reached.add(edge[0])


# -- and what they are compared with ---------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_full_graph_has_its_edges_in_their_order(case) -> None:
    scores = tied(**case)
    graph = assemble(scores)
    nodes, edges, *_ = contents(graph)
    expected = contents(assembled(scores))
    assert nodes == expected[0]
    assert [e for e in edges if not e[-1]["structural"]] == expected[1]
    assert graph.graph["total_edges"] == len(expected[1]) == size(graph)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_part_of_the_full_graph_is_what_a_copy_of_it_gives(case, turned) -> None:
    scores = tied(**case)
    if turned:  # the graph is in the order of a forward pass all the same
        scores = altered(scores, writers=scores.writers[::-1], edges=scores.edges.flip(-2))
    graph, mask = assemble(scores), scores.edges > 1
    edges = {
        (u, v, key)
        for u, v, key, d in real_edges(graph)
        if mask[..., scores.layout.row[u], scores.layout.column[d["reader"]]][
            () if d["pos"] < 0 else d["pos"]
        ]
    }
    assert contents(assemble(scores, mask)) == contents(kept(graph, edges))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_top_is_the_first_edges_by_score_and_name(case, signed) -> None:
    scores = tied(**case)
    graph = assemble(scores)
    ranking = by_score(graph, signed=signed)
    for edges, connected in product((0, 1, 6, 35, 10**6), (True, False)):
        options = {"edges": edges, "signed": signed, "connected": connected}
        expected = contents(kept(graph, first(graph, ranking, edges, connected=connected)))
        assert contents(top(graph, **options)) == expected
        assert contents(top(scores, **options)) == expected


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("case", [c for c in CASES if not c["positions"]])
def test_greedy_is_the_best_edge_into_what_is_reached(case, signed) -> None:
    scores = tied(**case)
    graph = assemble(scores)
    ranking = grown(graph, by_score(graph, signed=signed))
    for edges, connected in product((1, 6, 35), (True, False)):
        options = {"edges": edges, "signed": signed, "connected": connected}
        expected = contents(kept(graph, first(graph, ranking, edges, connected=connected)))
        assert contents(greedy(graph, **options)) == expected
        assert contents(greedy(scores, **options)) == expected


@pytest.mark.parametrize("case", CASES)
def test_random_edges_are_drawn_from_their_names(case) -> None:
    scores = tied(**case)
    graph = assemble(scores)
    order = sorted(names(graph))
    Random(5).shuffle(order)
    for connected in (True, False):
        expected = contents(kept(graph, first(graph, order, 20, connected=connected)))
        for given in (graph, scores):
            assert contents(random(given, edges=20, seed=5, connected=connected)) == expected


@pytest.mark.parametrize("case", CASES)
def test_threshold_of_scores_is_that_of_their_graph(case) -> None:
    scores = tied(**case)
    graph = assemble(scores)
    for minimum, signed in ((0.0, False), (2.0, False), (2.0, True), (-1.0, True)):
        edges = [
            e[:3]
            for e in real_edges(graph)
            if (e[3]["score"] if signed else abs(e[3]["score"])) >= minimum
        ]
        for connected, wanted in ((False, set(edges)), (True, on_paths(graph, edges))):
            for given in (graph, scores):
                found = threshold(given, minimum, signed=signed, connected=connected)
                assert contents(found) == contents(kept(graph, wanted))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_evaluation_breaks_ties_by_name(case, signed) -> None:
    scores, layout = tied(**case), tied(**case).layout
    table = scores.edges if case["positions"] else scores.edges[None]
    sign = -1 if scores.direction == "noise" and signed else 1
    places = layout.exists.expand(table.shape).nonzero().tolist()

    def key(at: list[int]) -> tuple[object, ...]:
        (owner, slot), worth = layout.targets[at[2]], float(table[*at])
        name = f"{slot}@{at[0]}" if case["positions"] else slot
        return -(sign * worth if signed else abs(worth)), layout.writers[at[1]], owner.name, name

    order = sorted(places, key=key)
    writers, readers = layout.exists.shape
    heard, columns = slice(0, writers), slice(0, readers)
    every = Place(Basis("all", None), 2, "final", heard, slice(writers, writers), columns)
    for size_, kept in zip((0.01, 0.3, 1.0), _best(scores, (0.01, 0.3, 1.0), signed), strict=True):
        mask = kept(every) & layout.exists
        assert mask.nonzero().tolist() == sorted(order[: int(size_ * len(order))])


@pytest.mark.parametrize("case", CASES[:2])
def test_a_circuit_is_ranked_again(case) -> None:
    graph = threshold(tied(**case), 2.0, connected=False)
    for signed in (False, True):
        ranking = by_score(graph, signed=signed)
        for edges in (1, 10):
            expected = first(graph, ranking, edges, connected=True)
            assert names(top(graph, edges=edges, signed=signed)) == expected
            expected = first(graph, grown(graph, ranking), edges, connected=True)
            assert names(greedy(graph, edges=edges, signed=signed)) == expected
    nothing = top(graph, edges=0)
    for choose in (connect, lambda g: top(g, edges=3), lambda g: threshold(g, 0.0)):
        assert contents(choose(nothing)) == contents(nothing)


def test_a_default_device_and_inference_mode_change_nothing() -> None:
    scores = tied(**CASES[1])
    graph = assemble(scores)

    def circuits() -> list[tuple[object, ...]]:
        chosen = [f(g, edges=9) for f in (top, greedy, random) for g in (scores, graph)]
        chosen += [threshold(scores, 2.0), connect(graph), assemble(scores)]
        return [contents(circuit) for circuit in chosen]

    expected = circuits()
    with torch.device("meta"), torch.inference_mode():
        assert circuits() == expected


def test_what_a_circuit_cannot_be_chosen_from() -> None:
    with pytest.raises(ValueError, match="got -1; the full graph has 82"):
        top(tied(**CASES[1]), edges=-1)


@pytest.mark.parametrize("case", CASES)
def test_what_is_evaluated_is_what_top_chooses_ties_included(case) -> None:
    scores = tied(**case)
    layout = scores.layout
    for signed in (False, True):
        rank = edge_ranks(scores, signed=signed)
        for edges in (1, 7, 20):
            circuit = top(scores, edges=edges, signed=signed, connected=False)
            chosen = {
                (max(d["pos"], 0), layout.row[u], layout.column[d["reader"]])
                for u, _, _, d in real_edges(circuit)
            }
            assert chosen == {tuple(at) for at in (rank <= edges).nonzero().tolist()}
