"""What others read in our files: pandas, networkx, pydot, and, marked `outside`, other programs."""

import html
import json
import re
import shlex
import shutil
import struct
import subprocess
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from typing import Any

import networkx as nx
import pandas as pd
import plotly.graph_objects as go
import pydot
import pytest
from test_files import NASTY, make_circuit, same, write
from test_graph import make_scores

from circuits.draw import paint
from circuits.draw.lanes import by_lane
from circuits.draw.layout import layout
from circuits.files import images
from circuits.files.attribution_graph import to_attribution_graph
from circuits.files.csv import to_csv
from circuits.files.dot import to_dot
from circuits.files.formats import load, save
from circuits.files.gexf import to_gexf
from circuits.files.layers import frames, rows
from circuits.files.mermaid import to_mermaid
from circuits.graph import assemble, keep, real_edges

HERE = Path(__file__).parent
GROUPED = {"layers": 3, "heads": 4, "kv_heads": 2, "edges": 40}
TOKENS = ["When", " <b>", "\n", " to"]


def in_lanes(edges: int = 40, **options: Any) -> nx.MultiDiGraph:
    """A circuit by position, with the tokens of a prompt."""
    circuit = make_circuit(**{"positions": 4, "layers": 3, "heads": 4, "edges": edges} | options)
    circuit.graph["prompt"] = json.dumps(TOKENS)
    return circuit


def circuit_of(*edges: tuple[str, str, str]) -> nx.MultiDiGraph:
    """The circuit by position of these edges `(u, v, key)`, with the scores 1, 2, 4 …"""
    circuit = keep(assemble(make_scores(positions=4)), edges)
    for i, edge in enumerate(edges):
        circuit.edges[edge]["score"] = float(2**i)
    return circuit


# -- rows and frames -------------------------------------------------------------------------------


def test_rows_go_from_the_embedding_to_the_logits():
    circuit = assemble(make_scores(heads=2, kv_heads=1))
    assert rows(circuit) == [
        ["embed"],
        ["L0KV0"], ["L0H0", "L0H1"], ["L0.mlp"],
        ["L1KV0"], ["L1H0", "L1H1"], ["L1.mlp"],
        ["logits"],
    ]  # fmt: skip
    height = {node: y for y, row in enumerate(rows(circuit)) for node in row}
    assert all(height[u] < height[v] for u, v in circuit.edges())
    assert {name: sorted(nodes) for name, nodes in frames(circuit).items()} == {
        f"layer {n}": [f"L{n}.mlp", f"L{n}H0", f"L{n}H1", f"L{n}KV0"] for n in (0, 1)
    }


def test_lanes_are_the_frames_of_a_circuit_that_has_some():
    circuit = in_lanes()
    circuit.graph["places"] = json.dumps(['"When"@0', "@1", "IO@2", "@3"])
    lanes = by_lane(circuit)
    framed = frames(lanes)
    assert list(framed) == ['"When"@0', "@1", "IO@2", "@3"]
    assert sorted(node for nodes in framed.values() for node in nodes) == sorted(lanes)
    assert {lanes.nodes[node]["pos"] for node in framed["IO@2"]} == {2}


# -- .csv ------------------------------------------------------------------------------------------


def test_pandas_and_networkx_read_the_edges_of_a_csv(tmp_path):
    circuit = make_circuit(**GROUPED, **NASTY)
    for i, (*_, data) in enumerate(circuit.edges(keys=True, data=True)):
        data.update(note=f'#{i}, "quoted"\nand more', seen=bool(i % 2))
    path = save(circuit, tmp_path / "c.csv", title="# mine")
    frame = pd.read_csv(path, comment="#")
    assert list(frame.columns) == [
        "source", "target", "key", "score", "slot", "pos", "structural", "reader", "note", "seen",
    ]  # fmt: skip
    assert (frame["score"].dtype, frame["pos"].dtype, frame["seen"].dtype) == (float, int, bool)
    frame["reader"] = frame["reader"].fillna("")
    read = nx.from_pandas_edgelist(
        frame, edge_attr=True, edge_key="key", create_using=nx.MultiDiGraph
    )
    for u, v, key, data in circuit.edges(keys=True, data=True):
        assert read.edges[u, v, key] == data | {"score": pytest.approx(data["score"], rel=1e-14)}


def test_a_csv_says_what_is_wrong_with_it(tmp_path):
    lines = to_csv(make_circuit(edges=4)).splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith('"source"'))
    for wrong, said in (
        (lines[head:], 'first line must be a comment with "format": "relp-circuit"'),
        ([lines[0].replace('"version": 1', '"version": 9'), *lines[1:]], "must be 1; got 9; inst"),
        ([*lines[: head + 1], "embed,L0H0", *lines[head + 1 :]], "Expecting value"),
        ([*lines[:-1], lines[-1] + '"'], f"line {len(lines)} is no row of text in quotes"),
        ([*lines[:-1], lines[-1] + ",1"], "ValueError"),
    ):
        with pytest.raises(ValueError, match="must be a circuit written by circ") as error:
            load(write(tmp_path / "d.csv", "\n".join(wrong) + "\n"))
        assert said in str(error.value)


def test_a_csv_of_windows_is_read(tmp_path):
    circuit = make_circuit()
    text = to_csv(circuit).replace("\n", "\r\n")
    path = tmp_path / "c.csv"
    path.write_bytes(text.encode())
    assert same(load(path), circuit)


# -- .gexf -----------------------------------------------------------------------------------------


def test_gexf_has_the_hues_and_positions_of_the_figures():
    circuit = make_circuit(**GROUPED)
    root = ET.fromstring(to_gexf(circuit))
    space = {"g": "http://www.gexf.net/1.2draft", "v": "http://www.gexf.net/1.2draft/viz"}
    limit, places = paint.node_limit(circuit), layout(circuit)
    scale = set()
    for node in root.iterfind(".//g:node", space):
        name = node.get("id", "")
        hue = node.find("v:color", space).attrib
        shown = "#" + "".join(f"{int(hue[c]):02x}" for c in "rgb")
        assert shown == paint.tint(circuit.nodes[name]["score"], limit)
        at = node.find("v:position", space).attrib
        for got, wanted in zip((float(at["x"]), float(at["y"])), places[name], strict=True):
            if abs(wanted) > 0.5:
                scale.add(round(got / wanted))
    assert len(scale) == 1
    widths = sorted(float(e.get("weight", "")) for e in root.iterfind(".//g:edge", space))
    strongest = paint.edge_limit(circuit)
    assert widths == sorted(
        round(paint.edge_width(d, strongest), 2) for *_, d in circuit.edges(data=True)
    )


ALLOWED = {
    "gexf": ({"version"}, {"meta", "graph"}),
    "meta": ({"lastmodifieddate"}, {"creator", "keywords", "description"}),
    "graph": ({"defaultedgetype", "mode", "idtype"}, {"attributes", "nodes", "edges"}),
    "attributes": ({"class", "mode"}, {"attribute"}),
    "attribute": ({"id", "title", "type"}, {"default", "options"}),
    "nodes": ({"count"}, {"node"}),
    "edges": ({"count"}, {"edge"}),
    "node": ({"id", "label"}, {"attvalues", "color", "position", "size", "shape"}),
    "edge": (
        {"id", "source", "target", "weight", "label", "type"},
        {"attvalues", "color", "thickness", "shape"},
    ),
    "attvalues": (set(), {"attvalue"}),
    "attvalue": ({"for", "value"}, set()),
    "color": ({"r", "g", "b", "a"}, set()),
    "position": ({"x", "y", "z"}, set()),
    "size": ({"value"}, set()),
    "thickness": ({"value"}, set()),
    "shape": ({"value"}, set()),
}
"""What the schema of GEXF 1.2 allows in each element: attributes and elements."""


@pytest.mark.parametrize("options", [GROUPED, {"positions": 3, "edges": 40, **NASTY}])
def test_gexf_keeps_to_its_schema(options):
    for element in ET.fromstring(to_gexf(make_circuit(**options))).iter():
        attributes, elements = ALLOWED.get(name_of(element), (set(), set()))
        own = {key for key in element.keys() if not key.startswith("{")}  # noqa: SIM118
        assert own <= attributes, name_of(element)
        assert {name_of(child) for child in element} <= elements, name_of(element)
        if name_of(element) == "attribute":
            assert element.get("type") in {"string", "long", "double", "boolean"}


def name_of(element: ET.Element) -> str:
    return element.tag.rpartition("}")[2]


# -- .dot and .mmd ---------------------------------------------------------------------------------


@pytest.mark.parametrize("circuit", [make_circuit(**GROUPED), by_lane(in_lanes())])
def test_dot_has_a_row_for_each_height_and_a_frame_for_each_layer_or_lane(circuit):
    text = re.sub(r', name="[^"]*"', "", to_dot(circuit))  # an argument of pydot's own
    (dot,) = pydot.graph_from_dot_data(text)
    ranks, named = [], {}
    for part in dot.get_subgraphs():
        inner = {node.get_name().strip('"') for node in part.get_nodes()}
        inner = {name for name in inner if not name.startswith((" foot", " head"))}
        if part.get_rank():
            ranks.append(inner)
        else:
            named[part.get_label().strip('"')] = inner
    assert ranks == [set(row) for row in rows(circuit)]
    assert named == {name: set(nodes) for name, nodes in frames(circuit).items()}


def test_dot_says_of_an_edge_what_other_pictures_say():
    circuit = in_lanes()
    circuit.graph["places"] = json.dumps(['"When"@0', "@1", "IO@2", "@3"])
    (dot,) = pydot.graph_from_dot_data(to_dot(circuit))
    said = [html.unescape(edge.get_tooltip().strip('"')) for edge in dot.get_edges()
            if edge.get_tooltip()]  # fmt: skip
    assert sorted(said) == sorted(paint.edge_notes(circuit))
    assert any(' at "When"@0: ' in note for note in said)


def test_lanes_come_back_from_every_format(tmp_path):
    lanes = by_lane(in_lanes())
    for suffix in (".json", ".graphml", ".gexf", ".dot", ".csv"):
        assert same(load(save(lanes, tmp_path / f"c{suffix}")), lanes), suffix


@pytest.mark.parametrize("circuit", [make_circuit(**GROUPED), by_lane(in_lanes())])
def test_mermaid_has_a_frame_for_each_layer_or_lane(circuit):
    lines = to_mermaid(circuit).splitlines()
    boxes = dict(line.split("(", 1) for line in map(str.strip, lines) if line.endswith('")'))
    names = {number: text.removesuffix('")').strip('"') for number, text in boxes.items()}
    found: dict[str, list[str]] = {}
    for line in map(str.strip, lines):
        if line.startswith("subgraph"):
            frame = found.setdefault(line.partition('["')[2].removesuffix('"]'), [])
        elif line == "end":
            frame = []
        elif line.endswith('")'):
            frame.append(names[line.partition("(")[0]])
    assert found == frames(circuit)
    assert sum("~~~" in line for line in lines) == len(rows(circuit)) - 1


# -- .graph.json -----------------------------------------------------------------------------------

REQUIRED = {
    "metadata": {"slug": str, "scan": str, "prompt_tokens": list, "prompt": str},
    "qParams": {},
    "nodes": {"node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str,
              "jsNodeId": str, "clerp": str},
    "links": {"source": str, "target": str, "weight": float},
}  # fmt: skip
"""What Neuronpedia's schema of attribution graphs requires."""


@pytest.mark.parametrize(
    "circuit",
    [in_lanes(), in_lanes(heads=4, kv_heads=2), in_lanes(edges=150), in_lanes(**NASTY)],
    ids=["plain", "grouped queries", "many", "nasty names"],
)
def test_attribution_graphs_have_what_their_viewers_require(circuit, tmp_path):
    path = save(circuit, tmp_path / "c.graph.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    for part, fields in REQUIRED.items():
        for value in data[part] if isinstance(data[part], list) else [data[part]]:
            for name, kind in fields.items():
                assert type(value[name]) is kind, (part, name)
    ids = [node["node_id"] for node in data["nodes"]]
    assert len(ids) == len(set(ids)) == len({node["jsNodeId"] for node in data["nodes"]})
    assert {end for link in data["links"] for end in (link["source"], link["target"])} <= set(ids)
    assert len({(link["source"], link["target"]) for link in data["links"]}) == len(data["links"])
    assert all(link["weight"] for link in data["links"])
    tokens = data["metadata"]["prompt_tokens"]
    assert tokens == ["When", " <b>", "⏎", " to"] and data["metadata"]["prompt"] == "".join(TOKENS)
    assert all(0 <= node["ctx_idx"] < len(tokens) for node in data["nodes"])
    kinds = {node["feature_type"] for node in data["nodes"]}
    assert kinds == {"unknown", "embedding", "logit"}  # no others are shown without a look-up
    for node in data["nodes"]:
        if node["feature_type"] == "logit":
            float_or_nothing = node["clerp"].split("(p=")[1].split(")")[0]
            assert float_or_nothing == "n/a" and node["layer"] == "3"
    assert same(load(path), circuit)


def test_attribution_graphs_carry_the_scores():
    circuit = in_lanes(heads=4, kv_heads=2, edges=60)
    data = json.loads(to_attribution_graph(circuit))
    named = {node["node_id"]: node for node in data["nodes"]}
    into = dict.fromkeys(("unknown", "logit"), 0.0)
    for link in data["links"]:
        source, target = named[link["source"]], named[link["target"]]
        if source["clerp"].partition("KV")[1] == "":  # what key/value heads hand on is no score
            into[target["feature_type"]] += link["weight"]
    scores = [(v, d["score"]) for _, v, _, d in real_edges(circuit)]
    assert into["logit"] == pytest.approx(sum(score for v, score in scores if v == "logits"))
    assert into["unknown"] == pytest.approx(sum(score for v, score in scores if v != "logits"))


def test_what_a_head_carries_from_place_to_place_is_a_link():
    """Keys and values of 1, scores 1 and 2, go to 1 (written there too), 2 and 3: a third each."""
    data = json.loads(
        to_attribution_graph(
            circuit_of(
                ("embed", "L1H1", "k@1"),
                ("embed", "L1H1", "v@1"),
                ("embed", "L1H1", "q@3"),
                ("L1H1", "logits", "in@1"),
                ("L1H1", "logits", "in@2"),
                ("L1H1", "logits", "in@3"),
            )
        )
    )
    assert {(link["source"], link["target"]): link["weight"] for link in data["links"]} == {
        ("E_1_1", "1_1001_1"): 3.0,
        ("E_3_3", "1_1_3"): 4.0,
        ("1_1001_1", "1_1_1"): 1.0,
        ("1_1001_1", "1_1_2"): 1.0,
        ("1_1001_1", "1_1_3"): 1.0,
        ("1_1_1", "2_0_1"): 8.0,
        ("1_1_2", "2_0_2"): 16.0,
        ("1_1_3", "2_0_3"): 32.0,
    }


def test_keys_and_values_that_cancel_are_still_a_link():
    circuit = circuit_of(
        ("embed", "L1H1", "k@1"), ("embed", "L1H1", "v@1"), ("L1H1", "logits", "in@2")
    )
    circuit.edges["embed", "L1H1", "v@1"]["score"] = -1.0
    data = json.loads(to_attribution_graph(circuit))
    assert {(link["source"], link["target"]): link["weight"] for link in data["links"]} == {
        ("E_1_1", "1_1_1"): 1e-9,
        ("1_1_1", "1_1_2"): 1e-9,
        ("1_1_2", "2_0_2"): 4.0,
    }


def test_spans_are_columns_of_an_attribution_graph():
    circuit = in_lanes(edges=20)
    circuit.graph.update(by_span=True, places=json.dumps(["IO", "S1", "S2", "other"]))
    data = json.loads(to_attribution_graph(circuit, title="By span!"))
    assert data["metadata"]["prompt_tokens"] == ["IO", "S1", "S2", "other"]
    assert data["metadata"]["slug"] == "by-span"
    circuit.graph.update(by_span=False, places="[]", prompt="[]")
    tokens = json.loads(to_attribution_graph(circuit))["metadata"]["prompt_tokens"]
    assert tokens == ["@0", "@1", "@2", "@3"]


def test_attribution_graphs_that_could_not_be_shown_are_refused(tmp_path):
    with pytest.raises(ValueError) as error:
        save(make_circuit(), tmp_path / "c.graph.json")
    assert str(error.value) == (
        "an attribution graph must have its edges by position; this circuit's are summed over all; "
        "use attribute(model, task, level='edge', positions=True), or save as .html"
    )
    low = circuit_of(("embed", "L0H0", "v@1"), ("L0H0", "logits", "in@3"))
    with pytest.raises(ValueError, match="must reach above layer 0, or its viewers refuse it; thi"):
        save(low, tmp_path / "c.graph.json")
    for text in ("{}", "[]", '{"relp": {}}', '{"nodes": [], "links": []}'):
        with pytest.raises(ValueError, match="must be an attribution graph written by circuits.sa"):
            load(write(tmp_path / "d.graph.json", text))
    assert [path.name for path in tmp_path.iterdir()] == ["d.graph.json"]


# -- images ----------------------------------------------------------------------------------------


def test_images_say_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    for what, suffix in ((make_circuit(), ".png"), (go.Figure(), ".svg")):
        with pytest.raises(ValueError) as error:
            save(what, tmp_path / f"c{suffix}")
        assert str(error.value) == (
            "images must be drawn with the package kaleido; it is not installed; in a checkout of "
            'relp type pip install -c constraints.txt ".[images]", or save as .html'
        )
    assert not list(tmp_path.iterdir())


def test_a_large_png_is_less_sharp_and_a_huge_one_refused(tmp_path):
    assert images._scale(1000, 600, "png") == 2 and images._scale(600, 5000, "png") == 2
    assert images._scale(8000, 600, "png") == 1.25 and images._scale(90_000, 600, "pdf") == 1
    with pytest.raises(ValueError) as error:
        save(go.Figure(layout={"width": 12_000, "height": 700}), tmp_path / "f.png")
    assert str(error.value) == (
        "a .png must have at most 10,000 pixels from side to side; this picture is 12,000 x 700; "
        "draw less of it, or save as .svg or .html"
    )
    assert not list(tmp_path.iterdir())


def test_an_image_is_not_half_written(tmp_path, monkeypatch):
    path = tmp_path / "c.png"
    path.write_bytes(b"old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    monkeypatch.setattr("circuits.files.formats.circuit_image", lambda *_: b"new")
    with pytest.raises(OSError, match="no space left"):
        save(make_circuit(), path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# -- other programs --------------------------------------------------------------------------------

outside = pytest.mark.outside


def run(*command: object, cwd: Path | None = None) -> str:
    """What a program prints; it must not complain."""
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, cwd=cwd, check=False
    )
    assert done.returncode == 0 and not done.stderr, done.stderr[:2000]
    return done.stdout


@pytest.fixture(scope="session")
def modules(tmp_path_factory) -> Path:
    """Where npm put the readers that `tests/readers` names."""
    folder = tmp_path_factory.mktemp("npm")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(HERE / "readers" / name, folder)
    install = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    subprocess.run(install, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def large() -> nx.MultiDiGraph:
    """200 edges of a model as deep as SmolLM2-135M."""
    return make_circuit(layers=30, heads=9, kv_heads=3, edges=200)


@outside
def test_graphviz_draws_rows_and_lanes(large, tmp_path):
    lanes = by_lane(in_lanes(layers=12, edges=200))
    for name, circuit in (("large", large), ("lanes", lanes), ("nasty", make_circuit(**NASTY))):
        path = save(circuit, tmp_path / f"{name}.dot")
        svg = ET.fromstring(run("dot", "-Tsvg", path))
        drawn = [group.get("class") for group in svg.iter("{http://www.w3.org/2000/svg}g")]
        assert drawn.count("edge") == circuit.number_of_edges()
        assert drawn.count("node") == len(circuit)
        assert drawn.count("cluster") == len(frames(circuit))
        lines = map(shlex.split, run("dot", "-Tplain", path).splitlines())
        at = {line[1]: (float(line[2]), float(line[3])) for line in lines if line[0] == "node"}
        heights = [{at[node][1] for node in row} for row in rows(circuit)]
        assert all(len(height) == 1 for height in heights)
        assert sorted(heights, key=min) == heights
        if circuit is lanes:
            across = [[at[node][0] for node in nodes] for nodes in frames(circuit).values()]
            for left, right in pairwise(sorted(across)):
                assert max(left) < min(right)


@outside
@pytest.mark.parametrize("suffix", [".gexf", ".graphml"])
def test_graphology_reads_graphs_in_xml(suffix, modules, tmp_path):
    circuit = make_circuit(**GROUPED, **NASTY)
    path = save(circuit, tmp_path / f"c{suffix}")
    read = json.loads(run("node", HERE / "readers" / "graph.mjs", modules, path))
    nodes = {node["key"]: node["attributes"] for node in read["nodes"]}
    assert set(nodes) == set(circuit)
    for name, data in circuit.nodes(data=True):
        assert {key: nodes[name][key] for key in data} == data
    edges = {
        (edge["source"], edge["target"], edge["attributes"]["edge_key"]): edge["attributes"]
        for edge in read["edges"]
    }
    assert set(edges) == set(circuit.edges(keys=True)) and len(read["edges"]) == len(edges)
    for u, v, key, data in circuit.edges(keys=True, data=True):
        kept = edges[u, v, key]
        assert {name: kept.get(name, "") for name in data} == data  # empty text may be left out


@outside
def test_mermaid_draws_frames(large, modules, tmp_path):
    from playwright.sync_api import sync_playwright

    script = modules / "node_modules" / "mermaid" / "dist" / "mermaid.min.js"
    lanes = by_lane(in_lanes())
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page()
        page.add_script_tag(path=script)
        page.evaluate("mermaid.initialize({startOnLoad: false, suppressErrorRendering: true})")
        for circuit in (large, lanes, make_circuit(**GROUPED, **NASTY)):
            text = save(circuit, tmp_path / "c.mmd").read_text(encoding="utf-8")
            page.set_content(page.evaluate("async t => (await mermaid.render('c', t)).svg", text))
            shown = page.locator(".node .nodeLabel").all_inner_texts()
            assert sorted(shown) == sorted(circuit)
            assert page.locator(".cluster .nodeLabel").count() == len(frames(circuit))
            assert page.locator("path.flowchart-link").count() == circuit.number_of_edges()
            steps = page.locator("path.edge-thickness-invisible").count()
            assert steps == len(rows(circuit)) - 1
        browser.close()


@outside
def test_images_are_drawn(tmp_path, monkeypatch):
    circuit, figure = make_circuit(), go.Figure(go.Bar(x=["a", "b"], y=[1, 2]))
    figure.update_layout(title_text="$x$")
    for what, size in ((circuit, picture_size(circuit)), (figure, (1000, 600))):
        png = save(what, tmp_path / "c.png").read_bytes()
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", png[16:24]) == tuple(2 * side for side in size)
        pdf = save(what, tmp_path / "c.pdf", title="<b>").read_bytes()
        assert pdf[:5] == b"%PDF-" and pdf.count(b"/Type /Page\n") == 1
        assert b"/Subtype /Image" not in pdf and b"/FontDescriptor" in pdf  # lines and letters
    width, height = picture_size(circuit)
    monkeypatch.setattr(images, "_MOST", round(1.5 * max(width, height)))
    png = save(circuit, tmp_path / "c.png").read_bytes()
    assert struct.unpack(">II", png[16:24]) == pytest.approx((1.5 * width, 1.5 * height), abs=1)
    svg = save(figure, tmp_path / "f.svg").read_text()
    assert svg.startswith("<svg") and "$x$" in svg
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.setenv("BROWSER_PATH", "/nowhere")
    with pytest.raises(ValueError, match="none was found at BROWSER_PATH='/nowhere'; install one"):
        save(circuit, tmp_path / "d.png")
    monkeypatch.setenv("BROWSER_PATH", shutil.which("false") or "")
    with pytest.raises(RuntimeError, match=r"must draw the \.png; it did not \(BrowserFailedErr"):
        save(circuit, tmp_path / "d.png")


def picture_size(circuit: nx.MultiDiGraph) -> tuple[int, int]:
    svg = ET.fromstring(images.picture(circuit))
    return int(svg.get("width", "")), int(svg.get("height", ""))
