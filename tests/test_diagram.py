"""The circuit diagram: where things go, and what plotly, SVG and TikZ make of it."""

import html
import json
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET

import networkx as nx
import numpy as np
import plotly.graph_objects as go
import pytest
from test_graph import make_scores

from circuits.draw import draw
from circuits.draw.lanes import by_lane
from circuits.draw.layout import (
    BOX,
    bands,
    bezier,
    crossings,
    frame,
    lanes,
    layout,
    routes,
)
from circuits.draw.paint import (
    NEGATIVE,
    NEUTRAL,
    POSITIVE,
    edge_notes,
    node_limit,
    node_note,
    pixels,
    tint,
)
from circuits.draw.svg import picture
from circuits.files.html import to_html
from circuits.files.tikz import to_tikz
from circuits.graph import assemble, has_lanes, real_edges, size
from circuits.search.prune import top

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '</script><b>& \\end{document}$^_~# "%" {漢} é\n\x1b --'


def make_circuit(edges=12, **options) -> nx.MultiDiGraph:
    return top(assemble(make_scores(**options)), edges=edges)


def by_position(edges=60, **options) -> nx.MultiDiGraph:
    return make_circuit(edges, **{"layers": 4, "heads": 8, "positions": 5} | options)


# -- where things go ------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "circuit",
    [make_circuit(edges=200, layers=8, heads=8), make_circuit(edges=300, layers=2, heads=40),
     by_lane(by_position(200)), by_lane(by_position(200, heads=4, kv_heads=2))],
    ids=["layers", "long rows", "lanes", "grouped queries"],
)  # fmt: skip
def test_boxes_do_not_overlap(circuit):
    places = list(layout(circuit).values())
    for i, (x, y) in enumerate(places):
        for other_x, other_y in places[:i]:
            assert abs(x - other_x) > BOX[0] + 0.1 or abs(y - other_y) > BOX[1] + 0.1


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
    for circuit in (make_circuit(edges=60, layers=5, heads=5), by_lane(by_position())):
        again = layout(circuit.copy())
        assert layout(circuit) == again and list(layout(circuit)) == list(again)


def test_nodes_stay_in_the_lane_of_their_position():
    circuit = by_lane(by_position(150))
    places = layout(circuit)
    names = {f"@{pos}": pos for pos in range(5)}
    sides = {names[name]: side for name, side in lanes(circuit, places).items()}
    assert list(sides) == sorted({pos for _, pos in circuit.nodes(data="pos")})
    for node, pos in circuit.nodes(data="pos"):
        low, high = sides[pos]
        assert low < places[node][0] - BOX[0] / 2 and places[node][0] + BOX[0] / 2 < high
    borders = [border for side in sides.values() for border in side]
    assert borders == sorted(borders) and borders[1:-1:2] == borders[2::2]
    assert lanes(make_circuit(), layout(make_circuit())) == {}


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_every_edge_of_lanes_goes_up(kv_heads):
    circuit = by_lane(by_position(200, heads=4, kv_heads=kv_heads))
    places = layout(circuit)
    assert sum(d["structural"] for *_, d in circuit.edges(data=True)) > 20
    for u, v in circuit.edges():
        assert places[u][1] + BOX[1] < places[v][1]


def test_what_only_reads_is_below_the_heads_that_ask_and_write():
    circuit = by_lane(by_position(150))
    places = layout(circuit)
    readers = {u for u, _, d in circuit.edges(data=True) if d["structural"]}
    heads = {n for n, d in circuit.nodes(data=True) if d["kind"] == "head"} - readers
    for layer in range(4):
        low, high = (
            {places[n][1] for n in some if circuit.nodes[n]["layer"] == layer}
            for some in (readers, heads)
        )
        assert max(low) < min(high)


def test_long_rows_are_broken_into_lines_that_leave_gaps_to_each_other():
    circuit = make_circuit(edges=300, layers=2, heads=40)
    places = layout(circuit)
    heads = [n for n, d in circuit.nodes(data=True) if d["kind"] == "head" and d["layer"] == 0]
    heights = sorted({places[node][1] for node in heads})
    assert len(heads) > 20 and len(heights) > 1
    for low, high in zip(heights, heights[1:], strict=False):
        rows = [{places[n][0] % 1 for n in heads if places[n][1] == y} for y in (low, high)]
        (shift,), (other,) = ({round(x, 6) % 1 for x in row} for row in rows)
        assert abs(shift - other) == pytest.approx(0.5)
    xs = [x for x, _ in places.values()]
    assert max(xs) - min(xs) < 3 * max(y for _, y in places.values())


def test_tall_pictures_are_closer_together():
    def pitch(layers: int) -> float:
        circuit = make_circuit(edges=12 * layers, layers=layers, heads=2)
        ends = list(bands(circuit, layout(circuit)).values())
        assert all(below[1] < above[0] for below, above in zip(ends, ends[1:], strict=False))
        return (ends[-1][1] - ends[0][0]) / len(ends)

    assert pitch(30) < 0.75 * pitch(4)


def hidden(circuit: nx.MultiDiGraph, curves) -> dict[tuple[str, str, str], int]:
    """Of 100 points along each edge, how many lie behind a box that is none of its ends."""
    places, found = layout(circuit), {}
    for (u, v, key), points in curves.items():
        path = bezier(np.array(points)[:, None], np.linspace(0, 1, 100))[0]
        boxes = np.array([at for node, at in places.items() if node not in (u, v)])
        near = np.abs(path[:, None] - boxes) < np.array(BOX) / 2
        found[u, v, key] = int(near.all(-1).any(-1).sum())
    return found


def test_routes_join_boxes_and_pass_by_those_in_between():
    circuit = make_circuit(edges=60, layers=5, heads=5)
    places = layout(circuit)
    curves = routes(circuit, places)
    assert set(curves) == set(circuit.edges(keys=True))
    straight = {}
    for (u, v, key), (start, _, _, end) in curves.items():
        assert start == pytest.approx((places[u][0], places[u][1] + BOX[1] / 2))
        assert end[1] == pytest.approx(places[v][1] - BOX[1] / 2)
        assert abs(end[0] - places[v][0]) < BOX[0] / 2
        rise = 0.45 * (end[1] - start[1])
        straight[u, v, key] = (
            start, (start[0], start[1] + rise), (end[0], end[1] - rise), end
        )  # fmt: skip
    behind = sum(hidden(circuit, curves).values())
    assert behind < 0.2 * sum(hidden(circuit, straight).values())


def test_the_strongest_edges_are_hardly_hidden_among_five_hundred():
    circuit = make_circuit(edges=500, layers=6, heads=8)
    behind = hidden(circuit, routes(circuit, layout(circuit)))
    ranked = sorted(real_edges(circuit), key=lambda edge: -abs(edge[3]["score"]))
    assert np.mean([behind[edge[:3]] for edge in ranked[:20]]) < 4  # of 100 points


def test_a_frame_holds_all_that_is_drawn():
    for circuit in (make_circuit(edges=60, layers=5, heads=5), by_lane(by_position(200))):
        places = layout(circuit)
        curves = routes(circuit, places)
        (left, low), (right, high) = frame(places, curves)
        spots = [bezier(np.array(c)[:, None], np.linspace(0, 1, 50))[0] for c in curves.values()]
        x, y = np.concatenate([*spots, np.array(list(places.values()))]).T
        assert left <= x.min() and x.max() <= right and low <= y.min() and y.max() <= high


def test_two_thousand_edges_are_laid_out_in_two_seconds():
    circuit = make_circuit(edges=2000, layers=10, heads=12)
    assert size(circuit) > 1900
    start = time.process_time()
    routes(circuit, layout(circuit))
    # 1.3 s; the tests' type checker takes its part
    assert time.process_time() - start < 4


# -- plotly ---------------------------------------------------------------------------------------


def traces(figure: go.Figure) -> dict[str, list[go.Scatter]]:
    found: dict[str, list[go.Scatter]] = {}
    for trace in figure.data:
        kind = "edges" if trace.name.startswith("edges") else trace.name
        if len(trace.x) > 1:  # the others are samples of the legend
            found.setdefault(kind, []).append(trace)
    return found


def test_circuit_figure():
    circuit = make_circuit(edges=30, heads=4, kv_heads=2)
    figure = draw(circuit)
    found = traces(figure)
    assert set(found) == {
        "edges", "positive", "negative", "keys and values", "boxes", "texts", "nodes",
    }  # fmt: skip
    strokes = found["edges"]
    drawn = sum(int(np.isnan(line.x).sum()) for line in strokes)
    assert drawn == circuit.number_of_edges() > size(circuit)
    assert {line.line.color for line in strokes} == {POSITIVE, NEGATIVE, NEUTRAL}
    assert {line.line.color for line in strokes if line.line.dash == "dot"} == {NEUTRAL}
    outlines = sum(int(np.isnan(box.x).sum()) for box in found["boxes"])
    assert outlines == len(circuit)
    (texts,) = found["texts"]
    slots = [
        (node, slot)
        for node in circuit
        for slot in {d["slot"] for *_, d in circuit.in_edges(node, data=True)} & {*"qkv"}
    ]
    assert sorted(texts.text) == sorted([*circuit, *(slot for _, slot in slots)])
    scale = found["nodes"][0].marker
    inner = [abs(d["score"]) for node, d in circuit.nodes(data=True) if node != "embed"]
    assert scale.cmax == max(inner) and scale.cmin == -scale.cmax and scale.cmid == 0
    assert (
        f"{size(circuit)} of {circuit.graph['total_edges']} edges"
        in figure.layout.title.subtitle.text
    )
    assert "relp · tiny · toy · denoise" in figure.layout.title.text
    layers = {d["layer"] for _, d in circuit.nodes(data=True)} - {-1}
    assert len(figure.layout.shapes) == len(layers)
    assert list(figure.layout.yaxis.ticktext) == [f"layer {layer}" for layer in sorted(layers)]
    peak = max(abs(d["score"]) for *_, d in real_edges(circuit))
    assert [t.name for t in figure.data if t.showlegend is None] == [
        "positive", "negative", "keys and values", *(f"{s * peak:.2g}" for s in (1, 0.5, 0.1)),
    ]  # fmt: skip
    assert "grey lines: keys and values" in figure.layout.annotations[0].text


def test_notes_are_those_of_the_circuit():
    circuit = make_circuit(edges=30, heads=4, kv_heads=2)
    found = traces(draw(circuit))
    (nodes,) = found["nodes"]
    assert list(nodes.hovertext) == [node_note(circuit, n) for n in layout(circuit) for _ in "abc"]
    embed = node_note(circuit, "embed")
    assert embed.startswith(f"embed · score {circuit.nodes['embed']['score']:+.4g} · 0 in")
    assert re.fullmatch(r"logits · \d+ in, 0 out", node_note(circuit, "logits"))
    answers = {
        note: name
        for name in ("positive", "negative", "keys and values")
        for note in found[name][0].hovertext
    }
    assert set(answers) == set(edge_notes(circuit))
    for u, _, data in circuit.edges(data=True):
        if not data["structural"]:
            note = f"{u} → {data['reader']}: {data['score']:+.4g}"
            assert answers[note] == ("positive" if data["score"] >= 0 else "negative")


def test_edges_answer_along_their_whole_length_and_the_strongest_first():
    circuit = make_circuit(edges=80, layers=6, heads=6)
    found, unit = traces(draw(circuit)), np.array(pixels(circuit))
    shown = [t for name in ("positive", "negative") for t in found[name]]
    points = np.concatenate([np.stack([t.x, t.y], -1) for t in shown]) * unit
    notes = [note for t in shown for note in t.hovertext]
    places = layout(circuit)
    boxes = np.array(list(places.values()))
    curves = routes(circuit, places)
    scores = {note: abs(d["score"]) for note, (*_, d) in
              zip(edge_notes(circuit), circuit.edges(data=True), strict=True)}  # fmt: skip
    asked = weaker = 0
    for note, edge in zip(edge_notes(circuit), circuit.edges(keys=True), strict=True):
        path = bezier(np.array(curves[edge])[:, None], np.linspace(0.02, 0.98, 60))[0]
        covered = (np.abs(path[:, None] - boxes) < np.array(BOX) / 2).all(-1).any(-1)
        away = np.linalg.norm(points - path[~covered, None] * unit, axis=-1)
        assert away.min(1).max() < 12, "plotly looks so many pixels far"
        answers = [notes[i] for i in away.argmin(1)]
        asked += len(answers)
        weaker += sum(scores[answer] < scores[note] for answer in answers)
    assert asked > 3000 and weaker < 0.03 * asked


def test_stronger_edges_are_wider_and_weak_ones_fade_among_many():
    few, many = (traces(draw(make_circuit(n, layers=5, heads=6)))["edges"] for n in (40, 400))
    for strokes in (few, many):
        widths = [t.line.width for t in sorted(strokes, key=lambda t: t.name)]  # edges 3/8
        assert widths == sorted(widths) and widths[-1] == 7 and widths[0] >= 0.7
    assert min(t.opacity for t in many) < 0.8 * min(t.opacity for t in few)
    assert max(t.opacity for t in many) == pytest.approx(max(t.opacity for t in few))


def test_positions_are_lanes_with_the_names_of_their_tokens():
    circuit = by_position(80)
    places = ['" Mary"@0', "IO@1", "@2", '" <b>"@3', "end@4"]
    circuit.graph["places"] = json.dumps(places)
    figure = draw(circuit)
    drawn = by_lane(circuit)
    used = [places[pos] for pos in sorted({pos for _, pos in drawn.nodes(data="pos")})]
    assert list(figure.layout.xaxis.ticktext) == [html.escape(name, quote=False) for name in used]
    found = traces(figure)
    texts = [text for text in found["texts"][0].text if text not in "qkv"]
    assert sorted(texts) == sorted(name for _, name in drawn.nodes(data="name"))
    for note in found["positive"][0].hovertext:
        assert any(f" at {html.escape(name, quote=False)}: +" in note for name in used)
    for note in found["nodes"][0].hovertext:
        assert re.match(r"\S+ at .+ · ", note)
    assert any("score of these edges" in note for note in found["nodes"][0].hovertext)
    assert "@" not in str(draw(make_circuit(edges=20)).layout)


@pytest.mark.parametrize("some", [slice(1), slice(None)], ids=["one node", "all nodes"])
def test_attributes_of_ones_own_make_no_lanes(some):
    circuit = make_circuit(edges=30)
    for node in list(circuit)[some]:
        circuit.nodes[node].update(pos=3, name="mine")
    assert not has_lanes(circuit) and draw(circuit).layout.xaxis.ticktext == ()
    by_place = by_position()
    for node in list(by_place)[some]:
        by_place.nodes[node]["pos"] = 3
    assert not has_lanes(by_place) and has_lanes(by_lane(by_place))
    assert len(by_lane(by_place)) > len(by_place)


def test_colours_of_lanes_leave_out_the_embedding():
    circuit = by_lane(by_position())
    scores = {node: abs(d["score"]) for node, d in circuit.nodes(data=True)}
    inner = {n: s for n, s in scores.items() if not n.startswith("embed@")}
    circuit.nodes["embed@0"]["score"] = 100.0
    assert node_limit(circuit) == max(inner.values()) < 100


def test_figures_are_light():
    figure = draw(make_circuit(edges=500, layers=8, heads=8))
    assert len(figure.to_json()) < 1e6 and figure.layout.height < 3000
    assert len(figure.data) < 60, "each trace takes time to draw"


def test_of_a_whole_model_the_strongest_edges_are_drawn(monkeypatch):
    monkeypatch.setattr(sys.modules["circuits.draw.lanes"], "MOST", 40)
    circuit = assemble(make_scores(layers=4, heads=4))
    chosen, figure = top(circuit, edges=40), draw(circuit)
    assert sum(int(np.isnan(t.x).sum()) for t in traces(figure)["edges"]) == size(chosen) > 30
    said = f"{size(circuit):,} of {size(circuit):,} edges, the {size(chosen)} strongest drawn"
    assert said in figure.layout.title.subtitle.text
    root = drawn(circuit)
    assert any(said in (e.text or "") for e in root.iter(f"{SVG}text"))
    shown = {path.findtext(f"{SVG}title") for path in root.iter(f"{SVG}path")}
    assert shown == set(edge_notes(chosen))


def test_a_place_has_one_score_in_the_page_and_the_picture(monkeypatch):
    for module in ("circuits.draw.lanes", "circuits.files.html"):
        monkeypatch.setattr(sys.modules[module], "MOST", 60)
    circuit = by_position(200)
    text = to_html(circuit).partition('<script type="application/json" id="relp-view">')[2]
    data = json.loads(text.partition("</script>")[0])
    for node in data["nodes"]:
        node["score"] = node["score"] and f"{node['score']:+.4g}"
    page = {(node["label"], node["place"], node["score"]) for node in data["nodes"]}
    groups = [g for g in drawn(circuit).iter(f"{SVG}g") if g.get("class") == "relp-node"]
    notes = [g.findtext(f"{SVG}title") for g in groups]
    scores = [re.search("score of these edges (\\S+)", note) for note in notes]
    names = [re.match(r"(\S+) at (\S+) ·", note).groups() for note in notes]
    assert page == {(*n, s and s[1]) for n, s in zip(names, scores, strict=True)} and len(page) > 20


def test_an_empty_circuit_is_refused():
    for paint in (draw, picture, to_tikz):
        with pytest.raises(ValueError, match="this one is empty"):
            paint(make_circuit(edges=0))


def test_the_circuit_is_left_alone():
    for circuit in (make_circuit(), by_position()):
        before = circuit.copy()
        draw(circuit)
        picture(circuit)
        to_tikz(circuit)
        assert nx.utils.graphs_equal(circuit, before)


# -- SVG ------------------------------------------------------------------------------------------


def drawn(circuit: nx.MultiDiGraph, title: str | None = None) -> ET.Element:
    return ET.fromstring(picture(circuit, title))


def test_svg_draws_every_edge_and_node():
    circuit = make_circuit(heads=4, kv_heads=2, edges=30, task=HOSTILE)
    root = drawn(circuit, title="<i>mine</i>")
    paths = root.findall(f".//{SVG}path")
    assert len(paths) == circuit.number_of_edges()
    notes = [path.findtext(f"{SVG}title") for path in paths]
    for u, _, _, data in circuit.edges(keys=True, data=True):
        if not data["structural"]:
            at = notes.index(f"{u} → {data['reader']}: {data['score']:+.4g}")
            assert paths[at].get("stroke") == (POSITIVE if data["score"] >= 0 else NEGATIVE)
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert set(circuit) <= set(texts)
    assert "<i>mine</i>" in texts
    assert any("grey lines: keys and values" in text for text in texts)
    strongest = max(paths, key=lambda path: float(path.get("stroke-width")))
    scores = {abs(d["score"]) for *_, d in circuit.edges(data=True)}
    assert f"{max(scores):.4g}" in strongest.findtext(f"{SVG}title").replace("-", "+")
    assert not root.findall(f".//{SVG}script") and not root.findall(f".//{SVG}image")


def test_svg_titles_shrink_before_they_are_cut():
    for letters, whole in ((20, True), (85, True), (400, False)):
        title = "a" * letters
        shown = next(e for e in drawn(make_circuit(), title).iter(f"{SVG}text"))
        assert (shown.text == title) == whole
        assert 13 <= float(shown.get("font-size")) <= 20
        assert len(shown.text) * 0.55 * float(shown.get("font-size")) < 700


def test_svg_carries_what_it_is_given():
    assert drawn(make_circuit()).find(f"{SVG}metadata") is None
    root = ET.fromstring(picture(make_circuit(), metadata="<&>"))
    assert root.findtext(f"{SVG}metadata") == "<&>"


def test_svg_boxes_are_above_all_edges():
    order = [e.get("class") for e in drawn(make_circuit(edges=30)).iter() if e.get("class")]
    edges = [i for i, kind in enumerate(order) if kind == "relp-edge"]
    assert max(edges) < order.index("relp-node")


def test_svg_is_painted_by_score():
    circuit = make_circuit(heads=4, kv_heads=2, edges=30)
    root = drawn(circuit)
    strongest = max(abs(d["score"]) for *_, d in circuit.edges(data=True))
    widths = {
        f"{u} → {d['reader']}: {d['score']:+.4g}": max(0.5, 7 * abs(d["score"]) / strongest)
        for u, _, d in circuit.edges(data=True)
        if not d["structural"]
    }
    for path in root.iter(f"{SVG}path"):
        note = path.findtext(f"{SVG}title")
        assert (note in widths) == (path.get("stroke-dasharray") is None)
        assert float(path.get("stroke-width")) == pytest.approx(widths.get(note, 0.9), abs=0.005)
    limit = max(abs(d["score"]) for node, d in circuit.nodes(data=True) if node != "embed")
    for group in root.iter(f"{SVG}g"):
        if group.get("class") == "relp-node":
            data = circuit.nodes[group.findtext(f"{SVG}title").partition(" ")[0]]
            box = group.find(f"{SVG}rect")
            assert box.get("fill") == tint(data["score"], limit)
            assert (box.get("rx") == "6") == (data["kind"] in ("head", "kv"))
            assert (box.get("stroke-dasharray") is not None) == (data["kind"] == "kv")
    texts = [element.text for element in root.iter(f"{SVG}text")]
    legend = [f"{share * strongest:.2g}" for share in (1, 0.5, 0.1)]
    at = texts.index("negative")
    assert texts[at + 1 : at + 6] == [*legend, f"−{limit:.2g}", f"+{limit:.2g}"]


def test_svg_has_the_slots_of_a_head_in_one_order():
    """Whatever the seed of Python's hashes: the same circuit gives the same file."""
    circuit = make_circuit(edges=40)
    shown = []
    for group in drawn(circuit).iter(f"{SVG}g"):
        if group.get("class") == "relp-node":
            node, *slots = (text.text for text in group.iter(f"{SVG}text"))
            entered = {d["slot"] for *_, d in circuit.in_edges(node, data=True)}
            assert slots == [slot for slot in "qkv" if slot in entered]
            shown.append("".join(slots))
    assert "qkv" in shown


def test_svg_names_lanes_at_the_bottom():
    circuit = by_position(80)
    circuit.graph["places"] = json.dumps(
        ['" Mary"@0', "IO@1", "@2", '" a very long token"@3', "@4"]
    )
    root = drawn(circuit)
    texts = {e.text: float(e.get("y")) for e in root.iter(f"{SVG}text") if "@" in e.text}
    assert {'" Mary"@0', "IO@1", "@2", "@4"} <= set(texts) and len(set(texts.values())) == 1
    lowest = max(
        float(e.get("y"))
        for e in root.iter(f"{SVG}text")
        if e.text == "embed"
    )  # fmt: skip
    assert lowest < next(iter(texts.values()))
    assert any("read for another place" in (e.text or "") for e in root.iter(f"{SVG}text"))
    names = [e.text for e in root.iter(f"{SVG}text")]
    for _, name in by_lane(circuit).nodes(data="name"):
        assert name in names


@pytest.mark.parametrize("circuit", [make_circuit(layers=6, heads=6, edges=80), by_position(150)])
def test_svg_edges_stay_in_the_picture(circuit):
    root = drawn(circuit)
    width, height = (float(root.get(side)) for side in ("width", "height"))
    for path in root.iter(f"{SVG}path"):
        numbers = np.array([float(n) for n in re.findall(r"-?[\d.]+", path.get("d"))])
        x, y = bezier(numbers.reshape(4, 1, 2), np.linspace(0, 1, 20))[0].T
        assert min(x) > 0 and max(x) < width and min(y) > 0 and max(y) < height


# -- TikZ -----------------------------------------------------------------------------------------


def test_tikz_draws_every_edge_and_node():
    circuit = make_circuit(heads=4, kv_heads=2, edges=30)
    lines = to_tikz(circuit).splitlines()
    edges = [line for line in lines if line.startswith(r"\draw[edge")]
    boxes = [line for line in lines if line.startswith(r"\node[box")]
    assert len(edges) == circuit.number_of_edges() and len(boxes) == len(circuit)
    signs = [d["score"] >= 0 for *_, d in real_edges(circuit)]
    assert sum("positive" in line for line in edges) == sum(signs)
    assert sum("dash" in line for line in edges) == len(edges) - len(signs)
    assert lines.index(edges[-1]) < lines.index(boxes[0])
    widths = [float(re.search(r"line width=([\d.]+)", line)[1]) for line in edges]
    assert widths[-1] == max(widths) == pytest.approx(7 * 0.72, abs=0.01)
    for node in circuit:
        assert any(line.endswith(f"{{{node}}};") for line in lines)


def test_tikz_text_is_ascii_and_cannot_leave_its_braces():
    circuit = make_circuit(task=HOSTILE, model=HOSTILE, metric=HOSTILE)
    circuit = nx.relabel_nodes(circuit, {"L0H0": "\\x{$"})
    text = to_tikz(circuit, title=HOSTILE)
    assert text.isascii() and text.count(r"\end{document}") == 1
    body = text.partition("useasboundingbox")[2].partition("\n")[2].partition("\\end{tikz")[0]
    assert all(line.endswith(";") for line in body.splitlines())
    for line in body.splitlines():
        plain = re.sub(r"\\[{}]", "", line)
        depth = np.cumsum([{"{": 1, "}": -1}.get(letter, 0) for letter in plain])
        assert depth.min() == 0 == depth[-1]
    assert r"\textbackslash{}end\{document\}\$\textasciicircum{}\_\textasciitilde{}\#" in body
    assert r"[U+6F22]" in body and r"\'{e}" in body and "-{}-{}" in body and "[U+001B]" in body


@pytest.mark.outside
@pytest.mark.parametrize(
    "circuit",
    [make_circuit(edges=30, heads=4, kv_heads=2, task=HOSTILE, model="<" + HOSTILE * 3),
     by_position(100, task=HOSTILE), make_circuit(edges=500, layers=30, heads=8)],
    ids=["hostile", "lanes", "many"],
)  # fmt: skip
def test_tikz_compiles(circuit, tmp_path):
    if circuit.graph["positions"]:
        circuit.graph["places"] = json.dumps([HOSTILE] * 5)
    (tmp_path / "c.tex").write_text(to_tikz(circuit, title=HOSTILE))
    done = subprocess.run(
        ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "c.tex"],
        cwd=tmp_path, capture_output=True, text=True, errors="replace",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    assert "(1 page" in done.stdout and "Overfull" not in done.stdout


# -- in a browser ---------------------------------------------------------------------------------


@pytest.mark.outside
def test_the_figure_answers_the_pointer(tmp_path):
    from playwright.sync_api import sync_playwright

    circuit = make_circuit(edges=500, layers=6, heads=8)
    figure = draw(circuit)
    figure.write_html(tmp_path / "c.html", include_plotlyjs=True)
    places, notes = layout(circuit), edge_notes(circuit)
    scores = [abs(d["score"]) for *_, d in circuit.edges(data=True)]
    strongest = int(np.argmax(scores))
    edge = list(circuit.edges(keys=True))[strongest]
    path = bezier(np.array(routes(circuit, places)[edge])[:, None], np.linspace(0.1, 0.9, 9))[0]
    ways = """([x, y]) => {
        const figure = document.querySelector('.plotly-graph-div'), all = figure._fullLayout;
        const box = figure.getBoundingClientRect();
        return [
            box.left + all._size.l + all.xaxis.c2p(x), box.top + all._size.t + all.yaxis.c2p(y),
        ];
    }"""
    said = "() => [...document.querySelectorAll('.hovertext')].map((e) => e.textContent)"
    with sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        size = {"width": int(figure.layout.width) + 20, "height": int(figure.layout.height) + 20}
        page = browser.new_page(viewport=size)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"file://{tmp_path}/c.html")
        page.wait_for_selector(".main-svg")

        def at(point) -> list[str]:
            page.mouse.move(1, 1)
            page.mouse.move(*page.evaluate(ways, [float(x) for x in point]))
            page.wait_for_timeout(100)
            return page.evaluate(said)

        for node in ("embed", "L0.mlp", "logits"):
            assert at(places[node]) == [node_note(circuit, node)]
        boxes = np.array(list(places.values()))
        free = [p for p in path if not (np.abs(p - boxes) < np.array(BOX) / 2).all(-1).any()]
        assert len(free) > 4 and all(at(point) == [notes[strongest]] for point in free)
        browser.close()
    assert errors == []


def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("google-chrome")
    assert found, "the gate installs chromium"
    return found
