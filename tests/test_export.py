"""Files: what comes back equals what went in, names cannot break out, nothing is half written."""

import html
import inspect
import json
import re
import xml.etree.ElementTree as ET

import networkx as nx
import plotly.graph_objects as go
import pydot
import pytest
from test_graph import make_scores

from circuits.draw import NEGATIVE, POSITIVE, draw, node_positions
from circuits.export import load, save
from circuits.graph import assemble, size
from circuits.prune import top

NASTY = {
    "task": "</script><b>&\"' \\N{x} ]]> --> 漢字",
    "model": 'a/b "c"',
    "rules": "007",  # text that looks like a number
    "metric": "true",  # … and like a truth value
    "direction": "",
}
READABLE = [".json", ".graphml", ".gexf", ".dot", ".svg", ".html"]
SVG = "{http://www.w3.org/2000/svg}"


def make_circuit(edges=12, **options) -> nx.MultiDiGraph:
    return top(assemble(make_scores(**options)), edges=edges)


def one_edge() -> nx.MultiDiGraph:
    full = assemble(make_scores())
    full.edges["embed", "logits", "in"]["score"] = 100.0
    return top(full, edges=1)


def same(a: nx.MultiDiGraph, b: nx.MultiDiGraph) -> bool:
    """Equal ids, keys, attributes and graph attributes, and equal types of each."""

    def typed(data):
        return {name: (type(value), value) for name, value in data.items()}

    return (
        type(a) is type(b)
        and typed(a.graph) == typed(b.graph)
        and {n: typed(d) for n, d in a.nodes(data=True)}
        == {n: typed(d) for n, d in b.nodes(data=True)}
        and {(u, v, k): typed(d) for u, v, k, d in a.edges(keys=True, data=True)}
        == {(u, v, k): typed(d) for u, v, k, d in b.edges(keys=True, data=True)}
    )


@pytest.mark.parametrize("suffix", READABLE)
@pytest.mark.parametrize(
    "circuit",
    [
        make_circuit(),
        one_edge(),  # no parallel edges: some readers would give a DiGraph
        make_circuit(heads=4, kv_heads=2, edges=30),
        make_circuit(positions=3, edges=40),
        make_circuit(**NASTY),
    ],
    ids=["plain", "one edge", "grouped queries", "positions", "nasty names"],
)
def test_round_trip(circuit, suffix, tmp_path):
    path = save(circuit, tmp_path / f"circuit{suffix}")
    assert path == tmp_path / f"circuit{suffix}"
    assert same(load(path), circuit)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", READABLE)
def test_own_attributes_survive(suffix, tmp_path):
    circuit = make_circuit()
    circuit.graph["note"] = ' two\nlines, tab\t, "quotes" \\ and # '
    circuit.nodes["embed"].update(rank=3, share=0.1, seen=True, text="5", empty="")
    assert same(load(save(circuit, tmp_path / f"c{suffix}")), circuit)


@pytest.mark.parametrize("suffix", [".json", ".graphml", ".gexf", ".dot"])
def test_an_empty_circuit_can_be_stored(suffix, tmp_path):
    empty = make_circuit(edges=0)
    assert same(load(save(empty, tmp_path / f"c{suffix}")), empty)


@pytest.mark.parametrize("suffix", [".json", ".svg", ".html"])
def test_control_characters_survive_where_json_carries_them(suffix, tmp_path):
    circuit = make_circuit(task="a\x00b\x1b\r\n\u2028c")
    assert same(load(save(circuit, tmp_path / f"c{suffix}")), circuit)


def test_json_is_node_link_data_with_a_version(tmp_path):
    circuit = make_circuit()
    data = json.loads(save(circuit, tmp_path / "c.json").read_text())
    assert data["format"] == "relp-circuit" and data["version"] == 1
    assert same(nx.node_link_graph(data, edges="links"), circuit)


def test_xml_ids_are_unique(tmp_path):
    circuit = make_circuit(edges=30)
    for suffix in (".graphml", ".gexf"):
        root = ET.parse(save(circuit, tmp_path / f"c{suffix}")).getroot()
        ids = [e.get("id") for e in root.iter() if e.tag.endswith("}edge")]
        assert len(ids) == len(set(ids)) == size(circuit)


def test_dot_is_graphviz_language_with_style(tmp_path):
    circuit = make_circuit(**NASTY)
    (dot,) = pydot.graph_from_dot_file(str(save(circuit, tmp_path / "c.dot")))
    assert len(dot.get_edges()) == size(circuit)
    for edge in dot.get_edges():
        colour = POSITIVE if float(edge.get("score").strip('"')) >= 0 else NEGATIVE
        assert edge.get("color") == f'"{colour}"'
    label = html.unescape(dot.get("label")[1:-1])
    assert NASTY["task"] in label.replace(2 * "\\", "\\")  # Graphviz reads two as one


def test_mermaid(tmp_path):
    circuit = make_circuit(heads=4, kv_heads=2, edges=30, **NASTY)
    lines = save(circuit, tmp_path / "c.mmd").read_text().splitlines()
    assert lines[0] == lines[2] == "---" and lines[3] == "flowchart BT"
    assert NASTY["task"] in json.loads(lines[1].removeprefix("title: "))
    assert sum(" --> " in line or " -->|" in line for line in lines[4:]) == size(circuit)
    structural = [d for *_, d in circuit.edges(data=True) if d["structural"]]
    assert structural and sum("-.->" in line for line in lines) == len(structural)
    assert sum(line.startswith("    linkStyle") for line in lines) == circuit.number_of_edges()
    assert sum(bool(re.fullmatch(r'    n\d+\(".+"\)', line)) for line in lines) == len(circuit)
    with pytest.raises(ValueError, match="can only be written"):
        load(tmp_path / "c.mmd")


def test_mermaid_refuses_what_it_would_not_draw(tmp_path):
    full = assemble(make_scores(layers=6, heads=8))
    assert save(top(full, edges=500), tmp_path / "c.mmd").stat().st_size < 50_000
    for circuit in (top(full, edges=501), make_circuit(task=50_000 * "x")):
        with pytest.raises(ValueError, match="Mermaid draws at most 500 edges and 50000 letters"):
            save(circuit, tmp_path / "d.mmd")
    assert [p.name for p in tmp_path.iterdir()] == ["c.mmd"]


def test_svg_draws_every_edge_and_node(tmp_path):
    circuit = make_circuit(heads=4, kv_heads=2, edges=30, **NASTY)
    root = ET.parse(save(circuit, tmp_path / "c.svg", title="<i>mine</i>")).getroot()
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
    assert any("dashed: keys and values" in text for text in texts)
    strongest = max(paths, key=lambda path: float(path.get("stroke-width")))
    scores = {abs(d["score"]) for *_, d in circuit.edges(data=True)}
    assert f"{max(scores):.4g}" in strongest.findtext(f"{SVG}title").replace("-", "+")
    assert not root.findall(f".//{SVG}script") and not root.findall(f".//{SVG}image")


def test_positions_are_shown(tmp_path):
    circuit = make_circuit(positions=3, edges=40)
    root = ET.parse(save(circuit, tmp_path / "c.svg")).getroot()
    shown = [element.text for element in root.iter(f"{SVG}text") if element.text.startswith("@")]
    assert sorted(shown) == sorted(node_positions(circuit, node) for node in circuit)
    drawn = save(circuit, tmp_path / "c.mmd").read_text()
    assert all(f'-->|"{key}"|' in drawn for *_, key in circuit.edges(keys=True))


def test_svg_boxes_stay_in_the_picture(tmp_path):
    root = ET.parse(save(make_circuit(layers=6, heads=6, edges=80), tmp_path / "c.svg")).getroot()
    width, height = (float(root.get(side)) for side in ("width", "height"))
    for path in root.iter(f"{SVG}path"):
        numbers = [float(n) for n in re.findall(r"-?[\d.]+", path.get("d"))]
        (x0, x1, x2, x3), ys = numbers[::2], numbers[1::2]
        curve = [
            (1 - t) ** 3 * x0 + 3 * t * (1 - t) ** 2 * x1 + 3 * t * t * (1 - t) * x2 + t**3 * x3
            for t in (i / 20 for i in range(21))
        ]
        assert min(curve) > 0 and max(curve) < width
        assert min(ys) > 0 and max(ys) < height


def test_html_works_offline_and_cannot_be_broken_out_of(tmp_path):
    circuit = make_circuit(**NASTY)
    page = save(circuit, tmp_path / "c.html", title=NASTY["task"]).read_text()
    assert len(page) > 1_000_000, "plotly's code must be inside"
    assert not re.search(r'<script[^>]+src="http', page)
    assert "<b>&" not in page and NASTY["task"] not in page
    start = page.index('<script type="application/json" id="relp-circuit">')
    data = page[start:].partition(">")[2].partition("</script>")[0]
    assert "<" not in data and json.loads(data)["graph"]["task"] == NASTY["task"]
    assert f"<title>{html.escape(NASTY['task'])}</title>" in page


def test_figures(tmp_path):
    figure = draw(make_circuit())
    path = save(figure, tmp_path / "f.json", title="a < b")
    assert json.loads(path.read_text())["layout"]["title"]["text"] == "a &lt; b"
    assert figure.layout.title.text != "a &lt; b", "the figure itself is left alone"
    assert "plotly" in save(go.Figure(), tmp_path / "f.html").read_text()
    for suffix in (".svg", ".png", ".graphml"):
        with pytest.raises(ValueError, match="a figure must be saved as .html or .json"):
            save(figure, tmp_path / f"f{suffix}")
    for suffix in (".json", ".html"):
        with pytest.raises(ValueError, match=r"must be a circuit written by circuits.save"):
            load(tmp_path / f"f{suffix}")
    assert len(list(tmp_path.iterdir())) == 2


def test_unknown_suffixes_name_the_known_ones(tmp_path):
    for name in ("c.png", "c", "c.SVG"):
        with pytest.raises(
            ValueError, match=r"\.json \.graphml \.gexf \.dot \.svg \.html \.mmd; got"
        ):
            save(make_circuit(), tmp_path / name)
        with pytest.raises(ValueError, match=r"\.json \.graphml \.gexf \.dot \.svg \.html; got"):
            load(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="must lie in an existing folder"):
        save(make_circuit(), tmp_path / "missing" / "c.json")
    (tmp_path / "c.json").mkdir()
    with pytest.raises(OSError):
        save(make_circuit(), tmp_path / "c.json")
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing.json")


@pytest.mark.parametrize("suffix", [*READABLE, ".mmd"])
def test_a_failure_leaves_the_old_file_and_nothing_else(suffix, tmp_path, monkeypatch):
    path = save(make_circuit(), tmp_path / f"c{suffix}")
    before = path.read_bytes()
    broken = make_circuit(edges=20)
    broken.nodes["embed"]["heads"] = [1, 2]
    with pytest.raises(ValueError, match="must be str, int, float or bool"):
        save(broken, path)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        save(make_circuit(edges=20), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_what_a_format_cannot_hold_is_refused(tmp_path):
    def refuse(suffix, match, **attributes):
        circuit = make_circuit()
        circuit.nodes["embed"].update(attributes)
        with pytest.raises(ValueError, match=match):
            save(circuit, tmp_path / f"c{suffix}")

    refuse(".json", "must be finite", weight=float("nan"))
    refuse(".json", "must be named like variables", label="x")
    refuse(".json", "must be named like variables", **{"two words": 1})
    refuse(".graphml", "no control characters", note="a\x00b")
    refuse(".gexf", "must not be named", weight=1.0)
    refuse(".dot", "must not be named", color="red")
    for suffix in (".svg", ".html"):
        with pytest.raises(ValueError, match="this one is empty"):
            save(make_circuit(edges=0), tmp_path / f"c{suffix}")
    for wrong in (make_scores(), nx.DiGraph(), None):
        with pytest.raises(TypeError, match=r"must be a networkx.MultiDiGraph; got"):
            inspect.unwrap(save)(wrong, tmp_path / "c.json")  # without the tests' type checker
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", "null", "<a/>", "digraph { a -> b }", "<svg", '{"format": "relp-circuit"}',
     '{"format": "relp-circuit", "version": 2}', "<html></html>",
     '{"format": "relp-circuit", "version": 1, "nodes": [{}], "links": [7]}'],
)  # fmt: skip
@pytest.mark.parametrize("suffix", READABLE)
def test_foreign_files_are_refused(content, suffix, tmp_path):
    path = tmp_path / f"c{suffix}"
    path.write_text(content)
    with pytest.raises(ValueError, match="must be a circuit written by circuits.save"):
        load(path)


def test_foreign_graphs_are_refused(tmp_path):
    nx.write_graphml(nx.path_graph(3, create_using=nx.DiGraph), tmp_path / "c.graphml")
    nx.write_gexf(nx.path_graph(3, create_using=nx.DiGraph), tmp_path / "c.gexf")
    for suffix in (".graphml", ".gexf"):
        with pytest.raises(ValueError, match="must be a circuit written by circuits.save"):
            load(tmp_path / f"c{suffix}")
    (tmp_path / "c.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="must be a circuit written by circuits.save"):
        load(tmp_path / "c.json")
