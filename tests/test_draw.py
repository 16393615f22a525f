"""Figures: what is drawn where, in which colour, and that no name is taken for markup."""

import inspect
import math
import re

import networkx as nx
import numpy as np
import pytest
import torch
from conftest import altered, made
from test_graph import make_scores

from circuits import agreement
from circuits.draw import draw
from circuits.draw.layout import BOX, crossings, layout, routes
from circuits.draw.paint import NEGATIVE, NEUTRAL, POSITIVE, ink, tint
from circuits.graph import assemble, size
from circuits.search.prune import top
from relp.scores import Effects, Scores


def make_nodes(kind=Scores, *, layers=2, heads=2, pairs=3, pos=4, seed=0, **labels) -> Scores:
    names = ["embed"]
    for layer in range(layers):
        names += [f"L{layer}.resid", f"L{layer}.attn", *(f"L{layer}H{h}" for h in range(heads))]
        names += [f"L{layer}.mlp"]
    generator = torch.Generator().manual_seed(seed)
    fields = {
        "model": "tiny",
        "task": "toy",
        "rules": "exact" if kind is Effects else "relp",
        "direction": "denoise",
        "metric": "logit difference",
        "clean": torch.ones(pairs),
        "corrupt": torch.zeros(pairs),
        "lengths": torch.full((pairs,), pos),
        "components": tuple(names),
        "nodes": torch.randn(pairs, len(names), pos, generator=generator),
    }
    return made(kind, **(fields | labels))


def make_circuit(edges=12, **options) -> nx.MultiDiGraph:
    return top(assemble(make_scores(**options)), edges=edges)


# -- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["resid", "attn", "mlp"])
def test_heatmap_shows_the_mean_over_pairs(kind):
    scores = make_nodes()
    figure = draw(scores, kind=kind)
    np.testing.assert_allclose(figure.data[0].z, scores.of_kind(kind)[1].mean(0), rtol=1e-6)
    assert list(figure.data[0].y) == ["L0", "L1"]
    assert figure.layout.yaxis.autorange is None, "layer 0 is at the bottom"
    assert "relp · tiny · toy · denoise" in figure.layout.title.text
    assert "score (logit difference)" in figure.data[0].colorbar.title.text


def test_the_residual_stream_comes_first():
    assert np.array_equal(draw(make_nodes()).data[0].z, draw(make_nodes(), kind="resid").data[0].z)


def test_heads_are_layer_by_head_summed_over_positions():
    scores = make_nodes(layers=3, heads=2)
    figure = draw(scores, kind="head")
    z = figure.data[0].z
    assert z.shape == (3, 2)
    at = scores.components.index("L2H1")
    assert z[2, 1] == pytest.approx(float(scores.nodes[:, at].sum(-1).mean()), rel=1e-5)
    assert figure.data[0].customdata[2, 1] == "L2H1"
    # each pair counts as much, whatever its length
    lengths = torch.tensor([4, 1, 2])
    kept = torch.where(torch.arange(4) < lengths[:, None, None], scores.nodes, 0.0)
    z = draw(make_nodes(layers=3, heads=2, nodes=kept, lengths=lengths), kind="head").data[0].z
    assert z[2, 1] == pytest.approx(float(kept[:, at].sum(-1).mean()), rel=1e-5)


def test_colours_are_symmetric_about_zero_and_blue_is_positive():
    scores = make_nodes()
    scores.nodes.abs_()  # nothing negative, and yet 0 must stay white
    for figure in (draw(scores), draw(make_scores())):
        trace = figure.data[0]
        assert trace.zmin == -trace.zmax and trace.zmid == 0
        assert trace.zmax == pytest.approx(np.nanmax(np.abs(trace.z)))
        assert trace.colorscale[0][1] == "rgb(103,0,31)"  # red, the low end
        assert trace.colorscale[-1][1] == "rgb(5,48,97)"
    assert [ink(score, 1.0) == "#ffffff" for score in (-1.0, -0.5, 0.5, 1.0)] == [1, 0, 0, 1]
    assert (tint(1.0, 1.0), tint(0.0, 1.0), tint(-9.0, 1.0)) == ("#427db8", "#ffffff", "#be3b4b")


def shown(title) -> list[str]:
    """The lines of a panel's title."""
    text = title.text.replace("<b>", "").replace("</b>", "")
    return text.replace("\N{NO-BREAK SPACE}", " ").split("<br>")


def test_scores_of_zero_can_be_drawn():
    scores = make_nodes()
    scores.nodes.zero_()
    assert draw(scores).data[0].zmax == 1.0
    (title, *_) = draw(scores, scores).layout.annotations
    assert shown(title) == [
        "embed", "r undefined · ρ undefined", "signs undefined", "error undefined"
    ]  # fmt: skip


def test_tokens_label_positions_only_where_all_pairs_have_them():
    tokens = ("<b>", " A&B", "\n", "x")
    trace = draw(make_nodes(tokens=tokens)).data[0]
    assert list(trace.x) == ['"&lt;b&gt;"@0', '" A&amp;B"@1', '"\\n"@2', '"x"@3']
    assert trace.customdata[0, 1] == 'L0.resid " A&amp;B"@1'
    assert list(draw(make_nodes()).data[0].x) == ["@0", "@1", "@2", "@3"]
    long = (f" {'a' * 40}", *tokens[1:])
    trace = draw(make_nodes(tokens=long)).data[0]
    assert trace.x[0] == '" aaaaaaaaaaa…aaa"@0' and "a" * 40 in trace.customdata[0, 0]


def test_spans_that_lie_apart_take_the_place_of_positions():
    nodes, end = make_nodes().nodes, torch.full((3,), 3)
    for spans, lengths in (
        ({"name": torch.tensor([0, 2, 1]), "end": end}, torch.tensor([4, 4, 4])),
        ({"name": torch.tensor([0, 0, 0]), "end": end - torch.arange(3)}, 4 - torch.arange(3)),
    ):
        kept = torch.where(torch.arange(4) < lengths[:, None, None], nodes, 0.0)
        scores = make_nodes(nodes=kept, lengths=lengths, spans=spans, tokens=tuple("abcd"))
        figure = draw(scores, kind="mlp")
        assert list(figure.data[0].x) == ["name", "end", "other"]
        assert figure.layout.xaxis.title.text == "span"
        assert figure.data[0].customdata[1, 0] == "L1.mlp@name"
        row = kept[:, scores.components.index("L1.mlp")]
        named = [float(row[torch.arange(3), at].mean()) for at in spans.values()]
        expected = [*named, float(row.sum(-1).mean()) - sum(named)]
        np.testing.assert_allclose(figure.data[0].z[1], expected, atol=1e-6)
        by_position = draw(scores, kind="mlp", positions=True)
        assert by_position.data[0].customdata[1, 3] in ("L1.mlp@3", 'L1.mlp "d"@3')
    named = altered(scores, spans={"<b>": spans["name"], "end": spans["end"]})
    assert draw(named, kind="mlp").data[0].customdata[1, 0] == "L1.mlp@&lt;b&gt;"
    same = make_nodes(spans={"name": torch.tensor([1, 1, 1]), "end": end}, tokens=tuple("abcd"))
    assert draw(same).data[0].customdata[0, 3] == 'L0.resid "d"@3'
    effect = altered(scores, nodes=kept.sum(-1, keepdim=True), tokens=("all positions",))
    assert draw(effect).data[0].customdata[1, 0] == "L1.resid@all positions"
    assert effect.by_span() is effect


def test_edges_are_writer_by_reader_and_blank_where_none_can_be():
    scores = make_scores()
    trace = draw(scores).data[0]
    assert trace.z.shape == (7, 15)
    assert np.isfinite(trace.z).sum() == 46
    w, r = scores.writers.index("L0H1"), scores.readers.index("L1H0.k")
    assert trace.z[w, r] == pytest.approx(float(scores.edges[w, r]))
    assert (trace.y[w], trace.x[r]) == ("L0H1", "L1H0.k")
    assert "grey: no edge" in draw(scores).layout.title.subtitle.text
    # edges by position: a reader at each of them is a column of its own, nothing is summed
    by_position = make_scores(positions=2)
    trace = draw(by_position).data[0]
    assert (trace.z.shape, trace.x[2 * r + 1]) == ((7, 30), "L1H0.k@1")
    assert trace.z[w, 2 * r + 1] == pytest.approx(float(by_position.edges[1, w, r]))
    with pytest.raises(ValueError, match="`kind` of edges must be one of .'q', 'k', 'v', 'in'"):
        draw(scores, kind="head")


# -- score against effect -------------------------------------------------------------------------


def test_scatter_has_a_panel_per_kind_with_all_measures():
    scores = make_nodes(pairs=2)
    noise = torch.randn(scores.nodes.shape, generator=torch.Generator().manual_seed(5))
    effect = make_nodes(Effects, pairs=2, nodes=scores.nodes + 0.5 * noise)
    figure = draw(scores, effect)
    titles = [shown(annotation) for annotation in figure.layout.annotations]
    assert [lines[0] for lines in titles] == ["embed", "resid", "attn", "head", "mlp"]
    measures = agreement(scores, effect).set_index("kind")
    note = figure.layout.title.subtitle.text.replace("<br>", " ")
    assert "*: one point decides r" in note and measures["hangs"].any()
    for kind, title in zip(scores.kinds(), titles, strict=True):
        x, y = scores.of_kind(kind)[1], effect.of_kind(kind)[1]
        each = [np.corrcoef(x[p].flatten(), y[p].flatten())[0, 1] for p in range(2)]
        norms = [torch.linalg.norm(v.flatten(1), dim=1) for v in (x - y, y)]
        error = float((norms[0] / norms[1]).mean())
        row = measures.loc[kind]
        star = "*" if row["hangs"] else ""
        bracket = f" [{row['pearson_low']:.3f}, {row['pearson_high']:.3f}]"
        said = " · ".join(title[1:]).replace(f"{star} · [", f"{star} [")
        assert said == (
            f"r {np.mean(each):.3f}{star}{'' if math.isnan(row['pearson_low']) else bracket} · ρ "
            f"{row['spearman']:.2f} · signs {row['signs']:.0%} · error {error:.2f}"
        )
    line, points = figure.data[6:8]  # two traces per panel; heads are the fourth
    assert list(line.x) == list(line.y)
    np.testing.assert_allclose(points.x, effect.of_kind("head")[1].flatten(), rtol=1e-6)
    np.testing.assert_allclose(points.y, scores.of_kind("head")[1].flatten(), rtol=1e-6)
    assert figure.layout.xaxis5.title.text == "effect (logit difference)"
    assert figure.layout.yaxis.title.text == "score (logit difference)"
    assert "denoise" in figure.layout.title.text
    assert len(draw(scores, effect, kind="mlp").data) == 2


def test_scatter_leaves_out_positions_that_a_pair_does_not_have():
    lengths = torch.tensor([4, 2, 3])
    figure = draw(make_nodes(lengths=lengths), make_nodes(Effects, lengths=lengths), kind="mlp")
    assert len(figure.data[1].x) == 2 * (4 + 2 + 3)


def test_scatter_takes_the_same_sample_of_many_points_each_time():
    scores, effect = (make_nodes(k, layers=6, heads=12, pos=80) for k in (Scores, Effects))
    a, b = (draw(scores, effect, kind="head").data[1] for _ in "ab")
    assert len(a.x) == 5000 and np.array_equal(a.x, b.x)


def test_edges_can_be_compared_too():
    scores = make_scores()
    figure = draw(scores, make_scores(seed=1))
    titles = [shown(annotation) for annotation in figure.layout.annotations]
    assert [lines[0] for lines in titles] == ["q", "k", "v", "in"]
    assert sum(len(trace.x) for trace in figure.data[1::2]) == 46


def test_what_does_not_belong_together_is_refused():
    scores = make_nodes()
    for name, value in (("direction", "noise"), ("task", "other"), ("metric", "loss")):
        with pytest.raises(ValueError, match=f"must be of the same {name}"):
            draw(scores, make_nodes(Effects, **{name: value}))
    with pytest.raises(ValueError, match="must be of the same level"):
        draw(scores, make_scores())
    with pytest.raises(ValueError, match="of the same pairs"):
        draw(scores, make_nodes(Effects, lengths=torch.tensor([4, 4, 3])))
    with pytest.raises(ValueError, match="must have the same positions and components"):
        draw(make_scores(), make_scores(positions=2))
    with pytest.raises(ValueError, match="`kind` must be one of"):
        draw(scores, kind="mixer")
    with pytest.raises(ValueError, match="`kind` must be one of"):
        draw(scores, make_nodes(Effects), kind="mixer")


def test_wrong_types_are_told_what_is_accepted():
    for wrong in (("scores",), (make_nodes(), make_circuit()), (make_circuit(), make_nodes())):
        with pytest.raises(
            TypeError, match="draw takes Scores, Effects, Scores with Effects, a list of them"
        ):
            inspect.unwrap(draw)(*wrong)  # without the tests' type checker
    with pytest.raises(TypeError, match="got DiGraph"):
        inspect.unwrap(draw)(nx.DiGraph())


# -- circuits -------------------------------------------------------------------------------------


def test_layout_goes_up_from_embed_to_logits():
    circuit = make_circuit(edges=120, layers=4, heads=4, kv_heads=2)
    places = layout(circuit)
    assert set(places) == set(circuit)
    for u, v in circuit.edges():
        assert places[u][1] < places[v][1]
    heights = [y for _, y in places.values()]
    assert places["embed"][1] == min(heights) and places["logits"][1] == max(heights)
    for node, data in circuit.nodes(data=True):
        if data["kind"] == "mlp":
            heads = [n for n, d in circuit.nodes(data=True) if d["kind"] == "head"]
            same = [places[h][1] for h in heads if circuit.nodes[h]["layer"] == data["layer"]]
            assert all(places[node][1] > y for y in same)
    xs = [x for x, _ in places.values()]
    assert max(xs) == pytest.approx(-min(xs)), "centred"


def test_boxes_do_not_overlap():
    places = list(layout(make_circuit(edges=200, layers=8, heads=8)).values())
    for i, (x, y) in enumerate(places):
        for other_x, other_y in places[:i]:
            assert abs(x - other_x) >= min(1, BOX[0]) or abs(y - other_y) > BOX[1]


def test_layout_crosses_fewer_edges_than_the_order_of_heads():
    circuit = make_circuit(edges=80, layers=6, heads=6)
    places = layout(circuit)
    rows: dict[float, list[str]] = {}
    for node, (_, y) in places.items():
        rows.setdefault(y, []).append(node)
    naive = {}
    for y, nodes in rows.items():
        nodes.sort(key=lambda node: circuit.nodes[node]["head"])
        naive |= {node: (i - (len(nodes) - 1) / 2, y) for i, node in enumerate(nodes)}
    assert crossings(circuit, places) < 0.9 * crossings(circuit, naive)


def test_crossings_of_a_drawing_worked_out_by_hand():
    graph = nx.MultiDiGraph([("a", "d"), ("b", "c"), ("a", "c"), ("a", "c")])
    low = {"a": (0.0, 0.0), "b": (1.0, 0.0)}
    assert crossings(graph, low | {"c": (0.0, 1.0), "d": (1.0, 1.0)}) == 1
    assert crossings(graph, low | {"c": (1.0, 1.0), "d": (0.0, 1.0)}) == 0
    assert crossings(nx.MultiDiGraph(), {}) == 0


def test_layout_is_the_same_each_time():
    circuit = make_circuit(edges=60, layers=5, heads=5)
    assert layout(circuit) == layout(circuit.copy())


def test_routes_join_boxes_and_pass_by_those_in_between():
    circuit = make_circuit(edges=60, layers=5, heads=5)
    places = layout(circuit)
    curves = routes(circuit, places)
    assert set(curves) == set(circuit.edges(keys=True))

    def covered(ways) -> int:
        hits = 0
        for (u, v, _), points in ways.items():
            for t in np.linspace(0, 1, 40):
                w = np.array([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
                px, py = w @ np.array(points)
                hits += any(
                    abs(px - x) < BOX[0] / 2 and abs(py - y) < BOX[1] / 2
                    for node, (x, y) in places.items()
                    if node not in (u, v)
                )
        return hits

    straight = {}
    for (u, v, key), (start, _, _, end) in curves.items():
        assert start == pytest.approx((places[u][0], places[u][1] + BOX[1] / 2))
        assert end[1] == pytest.approx(places[v][1] - BOX[1] / 2)
        assert abs(end[0] - places[v][0]) < BOX[0] / 2
        rise = 0.45 * (end[1] - start[1])
        straight[u, v, key] = (
            start, (start[0], start[1] + rise), (end[0], end[1] - rise), end
        )  # fmt: skip
    assert covered(curves) < 0.5 * covered(straight)


def test_circuit_figure():
    circuit = make_circuit(edges=30, heads=4, kv_heads=2)
    figure = draw(circuit)
    traces = {trace.name: trace for trace in figure.data}
    assert {a.text for a in figure.layout.annotations} == set(circuit)
    assert len(traces["nodes"].x) == len(circuit)
    embed = traces["nodes"].hovertext[list(layout(circuit)).index("embed")]
    assert embed.startswith(f"embed · score {circuit.nodes['embed']['score']:+.4g} · 0 in")
    logits = traces["nodes"].hovertext[list(layout(circuit)).index("logits")]
    assert re.fullmatch(r"logits · \d+ in, 0 out", logits)
    notes = set(traces["edges"].hovertext)
    assert len(notes) == circuit.number_of_edges()
    for u, _, _, data in circuit.edges(keys=True, data=True):
        if not data["structural"]:
            assert f"{u} → {data['reader']}: {data['score']:+.4g}" in notes
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    drawn = sum(sum(math.isnan(x) for x in line.x) for line in lines)
    assert drawn == circuit.number_of_edges() > size(circuit)
    assert {line.line.color for line in lines} == {POSITIVE, NEGATIVE, NEUTRAL}
    hover = traces["edges"]
    assert [colour for _, colour in hover.marker.colorscale] == [NEGATIVE, NEUTRAL, POSITIVE]
    assert (hover.marker.cmin, hover.marker.cmax) == (0, 2)
    assert len(hover.x) == len(hover.y) == len(hover.hovertext) == 4 * circuit.number_of_edges()
    for note, colour in zip(hover.hovertext, hover.marker.color, strict=True):
        assert colour == (1 if "keys and values" in note else 2 if ": +" in note else 0)
    assert {line.line.color for line in lines if line.line.dash == "dot"} == {NEUTRAL}
    scale = traces["nodes"].marker
    inner = [abs(d["score"]) for node, d in circuit.nodes(data=True) if node != "embed"]
    assert scale.cmax == max(inner)
    assert scale.cmin == -scale.cmax and scale.cmid == 0
    assert f"{size(circuit)} of {circuit.graph['total_edges']} edges" in figure.layout.title.text


def test_stronger_edges_are_wider():
    figure = draw(make_circuit(edges=40))
    lines = {t.name: t.line.width for t in figure.data if t.mode == "lines"}
    steps = sorted(lines, key=lambda name: int(name.split()[1].split("/")[0]))
    widths = [lines[name] for name in steps]
    assert widths == sorted(widths) and widths[-1] == 7


def test_positions_are_named():
    circuit = make_circuit(edges=20, positions=3, heads=4, kv_heads=2)
    figure = draw(circuit)
    edges, nodes = (next(t for t in figure.data if t.name == n) for n in ("edges", "nodes"))
    assert all((" @ position " in text) != ("keys and values" in text) for text in edges.hovertext)
    boxes = {a.text.partition("<br>")[0]: a.text for a in figure.layout.annotations}
    for node, note in zip(layout(circuit), nodes.hovertext, strict=True):
        around = [circuit.out_edges(node, data=True), circuit.in_edges(node, data=True)]
        found = [sorted({d["pos"] for *_, d in edges if d["pos"] >= 0}) for edges in around]
        at = found[0] or found[1]  # key/value heads and the logits only read
        shown = {1: "@{0}", 2: "@{0} @{1}", 3: "@{0}…{2}"}[len(at)].format(*at)
        assert note.startswith(f"{node} {shown} · ") and f">{shown}</span>" in boxes[node]
    assert "@" not in str(draw(make_circuit(edges=20)).layout.annotations)


def test_text_of_models_and_tasks_is_escaped():
    nasty = {"model": "a/b <i>c</i>", "task": "</script><b>&", "metric": "<u>"}
    effect = make_nodes(Effects, **nasty)
    for figure in (
        draw(make_nodes(**nasty)),
        draw(make_nodes(**nasty), effect),
        draw(make_scores(**nasty)),
        draw(make_circuit(**nasty)),
        draw(make_circuit(), title="</script><b>& a/b <i>c</i>"),
    ):
        title = figure.layout.title.text
        assert "&lt;/script&gt;&lt;b&gt;&amp;" in title and "a/b &lt;i&gt;c&lt;/i&gt;" in title
        assert "<u>" not in str(figure.to_dict())
    nodes = str(draw(nx.relabel_nodes(make_circuit(), {"L0H0": "<b>"})).to_dict())
    assert nodes.count("&lt;b&gt;") > 2 and "<b>" not in nodes


@pytest.mark.parametrize("edges", [30, 1000])
def test_small_and_large_circuits_can_be_drawn(edges):
    circuit = make_circuit(edges=edges, layers=8, heads=8)
    assert draw(circuit).layout.height < 4000


def test_an_empty_circuit_is_refused():
    with pytest.raises(ValueError, match="this one is empty"):
        draw(make_circuit(edges=0))


def test_the_circuit_is_left_alone():
    circuit = make_circuit()
    before = circuit.copy()
    draw(circuit)
    assert nx.utils.graphs_equal(circuit, before)


def test_agreement_is_drawn_by_measure() -> None:
    effect = make_nodes(Effects)
    noisy = [make_nodes(rules=r, nodes=effect.nodes + size * make_nodes(seed=1).nodes)
             for r, size in (("RELP", 0.3), ("GRADIENT", 1.0))]  # fmt: skip
    table = agreement(noisy, effect)
    table.loc[table["kind"] == "embed", "pearson"] = math.nan
    figure = draw(table)
    assert [shown(a) for a in figure.layout.annotations[:4]] == [
        ["Pearson's r"], ["Spearman's ρ"], ["right signs"], ["relative error"],
    ]  # fmt: skip
    assert "agreement with exact effects · tiny · toy" in figure.layout.title.text
    marks = {(t.name, t.xaxis): t for t in figure.data}
    assert len(marks) == len(figure.data) == 8
    # what has no correlation has no row
    kinds = [k for k in dict.fromkeys(table["kind"]) if k != "embed"]
    assert list(figure.layout.yaxis.ticktext) == kinds
    of = table[(table["rules"] == "GRADIENT") & (table["kind"] != "embed")]
    drawn = marks["GRADIENT", "x4"]
    assert list(drawn.x) == pytest.approx(of["relative_error"].tolist())
    assert list(drawn.error_x.array) == pytest.approx(
        (of["relative_error_high"] - of["relative_error"]).tolist()
    )
    # what lies outside is at the edge, with its number
    table.loc[table["rules"] == "GRADIENT", "pearson"] = -0.8
    edge = next(t for t in draw(table).data if t.name == "GRADIENT" and t.xaxis == "x")
    assert set(edge.x) == {-0.25} and set(edge.text) == {"-0.80"}
    with pytest.raises(ValueError, match=r"one of circuits\.agreement; it has no column 'kind'"):
        draw(table[["rules"]])
    with pytest.raises(ValueError, match="must have rows with a correlation; this one has none"):
        draw(table.assign(pearson=math.nan))
