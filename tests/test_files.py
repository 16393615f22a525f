"""Files: what comes back equals what went in, names cannot break out, nothing is half written."""

import html
import inspect
import json
import re
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import plotly.graph_objects as go
import pydot
import pytest
from test_graph import make_scores

from circuits import draw
from circuits.choices import FIGURES, MIB, SUFFIXES
from circuits.draw.paint import NEGATIVE, POSITIVE
from circuits.files.dot import from_dot, to_dot
from circuits.files.formats import FORMATS, load, save
from circuits.graph import Circuit, assemble, size
from circuits.search.prune import top


def test_the_table_of_suffixes_is_that_of_the_formats() -> None:
    """The list is apart because the command names its formats before it imports them."""
    assert tuple(FORMATS) == SUFFIXES and MIB in FORMATS
    assert {suffix for suffix, known in FORMATS.items() if known.figure} == set(FIGURES)


NASTY = {
    "task": "</script><b>&\"' \\N{x} ]]> --> 漢字",
    "model": 'a/b "c"',
    "rules": "007",  # text that looks like a number
    "metric": "true",  # … and like a truth value
    "direction": "noise",
}
READABLE = [".json", ".graphml", ".gexf", ".dot", ".csv", ".svg", ".html"]
PIECES = [
    "<", ">", "&", "\"", "'", "\\", "\n", "\t", " ", "</script>", "]]>", "-->", "<!--", "//",
    "/*", "#", "%", "%{x}", "{", "}", "[", "]", ";", "=", "->", "&amp;", "&#65;", "\\N", "$x$",
    "`", "null", "NaN", "1e5", "\"1\"", "\U0001f600", "e\u0301", "\u202e", "\u200f", "\u2028",
    "\x85", "\xa0", "\ufeff",
]  # fmt: skip
HALF = "a\ud800b"
SVG = "{http://www.w3.org/2000/svg}"


def make_circuit(edges=12, **options) -> nx.MultiDiGraph:
    return top(assemble(make_scores(**options)), edges=edges)


def one_edge() -> nx.MultiDiGraph:
    full = assemble(make_scores())
    full.edges["embed", "logits", "in"]["score"] = 100.0
    return top(full, edges=1)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def owners(circuit: nx.MultiDiGraph) -> list[dict[str, Any]]:
    """The attributes of the graph, of a node and of an edge."""
    return [circuit.graph, circuit.nodes["embed"], next(iter(circuit.edges(data=True)))[2]]


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


@pytest.mark.parametrize("suffix", READABLE)
def test_any_text_survives_anywhere(suffix, tmp_path):
    """As a label, a value, a node and a title: each piece alone, and all in a row."""
    circuit = nx.relabel_nodes(make_circuit(edges=4), {"L0H0": "".join(PIECES), "logits": ""})
    circuit.graph["task"] = "".join(PIECES)
    for data in owners(circuit):
        data.update({f"text{i}": piece for i, piece in enumerate(PIECES)})
    assert same(load(save(circuit, tmp_path / f"c{suffix}", title="".join(PIECES))), circuit)


@pytest.mark.parametrize("suffix", [".json", ".graphml", ".gexf", ".dot", ".csv"])
def test_any_name_of_an_attribute_survives_or_is_refused(suffix, tmp_path):
    awkward = (
        "id key label source target edge_key edge_default node_default self u_for_edge v_for_edge "
        "node_for_adding name type weight start end viz pid node edge graph strict nodes edges for "
        "links directed multigraph data title color style src obj_dict x mode version true null"
    )
    kept = 0
    for name in awkward.split():
        circuit = make_circuit(edges=4)
        for data in owners(circuit):
            data[name] = "mine"
        try:
            path = save(circuit, tmp_path / f"c{suffix}")
        except ValueError as error:
            assert re.search(r"must (not )?be named", str(error))
            continue
        assert same(load(path), circuit), name
        kept += 1
    assert kept > 20


@pytest.mark.parametrize("suffix", READABLE)
def test_numbers_and_truth_values_survive(suffix, tmp_path):
    circuit = make_circuit(edges=4)
    numbers = {
        "large": 10**30,
        "small": -1,
        "tiny": 1e-320,
        "minus": -0.0,
        "tenth": 0.1,
        "no": False,
    }
    for data in owners(circuit):
        data.update(numbers)
    back = load(save(circuit, tmp_path / f"c{suffix}"))
    assert same(back, circuit) and str(back.nodes["embed"]["minus"]) == "-0.0"


@pytest.mark.parametrize("suffix", [".json", ".graphml", ".gexf", ".dot", ".csv"])
def test_an_empty_circuit_can_be_stored(suffix, tmp_path):
    empty = make_circuit(edges=0)
    assert same(load(save(empty, tmp_path / f"c{suffix}")), empty)


@pytest.mark.parametrize("suffix", [".json", ".dot", ".csv", ".svg", ".html"])
def test_control_characters_survive_where_they_can_be_escaped(suffix, tmp_path):
    circuit = make_circuit(task="a\x00b\x1b\r\n\u2028c\x80\x9f\x7f")
    assert same(load(save(circuit, tmp_path / f"c{suffix}")), circuit)


def test_json_is_node_link_data_with_a_version(tmp_path):
    circuit = make_circuit()
    data = json.loads(save(circuit, tmp_path / "c.json", title="mine").read_text())
    assert (data["format"], data["version"], data["title"]) == ("relp-circuit", 2, "mine")
    assert same(Circuit(nx.node_link_graph(data, edges="edges")), circuit)
    if nx.__version__ >= "3.6":  # as it is
        assert same(Circuit(nx.node_link_graph(data)), circuit)
    with pytest.raises(
        ValueError, match=r"must be one of \(1, 2\); got 3; install the newer release"
    ):
        load(write(tmp_path / "d.json", json.dumps(data | {"version": 3})))


@pytest.mark.parametrize("suffix", [".json", ".svg", ".html"])
def test_files_of_version_1_are_read(suffix, tmp_path):
    circuit = make_circuit(**NASTY)
    text = save(circuit, tmp_path / f"c{suffix}").read_text()
    old = text.replace('"version": 2', '"version": 1').replace('"edges": [{', '"links": [{')
    assert old.count('"links": [{') == 1
    assert same(load(write(tmp_path / f"d{suffix}", old)), circuit)


def test_the_picture_of_the_documentation_holds_its_circuit():
    circuit = load(Path(__file__).parent.parent / "docs" / "ioi_circuit.svg")
    assert (size(circuit), len(circuit), circuit.graph["total_edges"]) == (100, 33, 3628)


def test_xml_ids_are_unique(tmp_path):
    circuit = make_circuit(edges=30)
    for suffix in (".graphml", ".gexf"):
        root = ET.parse(save(circuit, tmp_path / f"c{suffix}")).getroot()
        ids = [e.get("id") for e in root.iter() if e.tag.endswith("}edge")]
        assert len(ids) == len(set(ids)) == size(circuit)


def test_dot_is_graphviz_language_with_style(tmp_path):
    circuit = make_circuit(**NASTY)
    (dot,) = pydot.graph_from_dot_file(str(save(circuit, tmp_path / "c.dot")))
    drawn = [edge for edge in dot.get_edges() if edge.get("style") != '"invis"']
    assert len(drawn) == size(circuit)
    for edge in drawn:
        colour = POSITIVE if float(edge.get("score").strip('"')) >= 0 else NEGATIVE
        assert edge.get("color") == f'"{colour}"'
    label = html.unescape(dot.get("label")[1:-1])
    assert NASTY["task"].replace("\\", 2 * "\\") in label  # Graphviz reads two as one
    lines = (tmp_path / "c.dot").read_text().splitlines()
    styled = len(circuit.graph) + len(circuit) + size(circuit)
    assert not any(line.startswith("subgraph") for line in lines[: 6 + styled])
    styles = [line.get("style").strip('"') for line in pydot_edges(heads=4, kv_heads=2, edges=30)]
    assert {"dashed", "solid", "invis"} == set(styles)


def pydot_edges(**options) -> list[pydot.Edge]:
    (dot,) = pydot.graph_from_dot_data(to_dot(make_circuit(**options)))
    return dot.get_edges()


def test_dot_can_be_edited_by_hand(tmp_path):
    circuit = make_circuit(edges=4)
    text = save(circuit, tmp_path / "c.dot").read_text()
    for before, after in (
        ('"embed" -> "L0H0" [', "// mine\n  embed->L0H0\n[ /* two\n lines */ note = mine; "),
        ('\n"L0.mlp" [', '\nL0.mlp[say="\\"hi\\" all",'),
        ("];\n", " ]\n"),
        ('label="', 'bgcolor=white label="'),
        ('digraph "circuit" {', "/* made by relp */ digraph {"),
    ):
        assert before in text
        text = text.replace(before, after)
    circuit.edges["embed", "L0H0", "q"]["note"] = "mine"
    circuit.nodes["L0.mlp"]["say"] = '"hi" all'
    circuit.graph["bgcolor"] = "white"
    assert same(load(write(tmp_path / "d.dot", text)), circuit)


def test_files_of_dot_that_pydot_wrote_are_read(tmp_path):
    circuit = make_circuit(edges=4, **NASTY)
    (dot,) = pydot.graph_from_dot_data(to_dot(circuit))
    assert same(load(write(tmp_path / "c.dot", dot.to_string())), circuit)
    old = (
        dot.to_string()
        .replace("&#34;", "&quot;")
        .replace("&#60;", "&lt;")
        .replace("&#38;", "&amp;")
    )
    assert same(load(write(tmp_path / "c.dot", old.replace("'", "&#x27;"))), circuit)


def test_lines_that_are_no_dot_are_named(tmp_path):
    lines = save(make_circuit(edges=4), tmp_path / "c.dot").read_text().splitlines()
    for at, wrong in (
        (1, "graph {"),
        (4, "subgraph -> {"),
        (25, '"embed" [kind=<b>];'),
        (26, '"embed" [kind="embed", '),  # the next line begins with no attribute
    ):
        text = "\n".join([*lines[: at - 1], wrong, *lines[at:]])
        line = at + wrong.endswith(", ")
        with pytest.raises(ValueError, match=rf"line {line} is no node, edge or attri") as error:
            load(write(tmp_path / "d.dot", text))
        assert "must be a circuit written by circuits.save" in str(error.value)
    with pytest.raises(ValueError, match=rf"line {len(lines)} is no node"):
        load(write(tmp_path / "d.dot", "\n".join(lines[:-1]) + "\n"))


def test_large_graphs_of_dot_are_read_in_seconds():
    """A general parser takes more than 5 ms of processor time for an edge."""
    circuit = assemble(make_scores(layers=5, heads=8))
    text = to_dot(circuit)
    started = time.process_time()
    read = from_dot(text)
    spent = time.process_time() - started
    assert same(read, circuit) and spent < 0.0015 * size(circuit)


def test_mermaid(tmp_path):
    circuit = make_circuit(heads=4, kv_heads=2, edges=30, **NASTY)
    lines = save(circuit, tmp_path / "c.mmd").read_text().splitlines()
    assert lines[0] == lines[2] == "---" and lines[3] == "flowchart BT"
    assert NASTY["task"] in json.loads(lines[1].removeprefix("title: "))
    assert sum(" --> " in line or " -->|" in line for line in lines[4:]) == size(circuit)
    structural = [d for *_, d in circuit.edges(data=True) if d["structural"]]
    assert structural and sum("-.->" in line for line in lines) == len(structural)
    styled = [line.split()[1].split(",") for line in lines if line.startswith("    linkStyle")]
    assert sorted(int(i) for links in styled for i in links) == list(range(len(circuit.edges)))
    assert sum(bool(re.fullmatch(r' +n\d+\(".+"\)', line)) for line in lines) == len(circuit)
    save(nx.relabel_nodes(circuit, {"embed": '#1 <"&">\n'}), tmp_path / "c.mmd")
    assert '("#35;1 #lt;#quot;#amp;#quot;#gt; ")' in (tmp_path / "c.mmd").read_text()
    with pytest.raises(ValueError, match="got 'c.mmd'; .mmd can only be written; choose another"):
        load(tmp_path / "c.mmd")


def test_mermaid_refuses_what_it_would_not_draw(tmp_path):
    full = assemble(make_scores(layers=6, heads=8))
    assert save(top(full, edges=500), tmp_path / "c.mmd").stat().st_size < 50_000
    for circuit in (top(full, edges=501), make_circuit(task=50_000 * "x")):
        with pytest.raises(ValueError, match="Mermaid draws at most 500 edges and 50000 letters"):
            save(circuit, tmp_path / "d.mmd")
    assert [p.name for p in tmp_path.iterdir()] == ["c.mmd"]


def test_html_works_offline_and_cannot_be_broken_out_of(tmp_path):
    circuit = make_circuit(**NASTY)
    page = save(circuit, tmp_path / "c.html", title=NASTY["task"]).read_text()
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", page)
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
    for suffix in (".csv", ".graphml", ".mib.json", ".graph.json", ".mmd", ""):
        with pytest.raises(
            ValueError,
            match="the suffix of a figure must be one of .json .svg .html .pdf .png; got",
        ):
            save(figure, tmp_path / f"f{suffix}")
    for suffix in (".json", ".html"):
        with pytest.raises(ValueError, match=r"must be a circuit written by circuits.save"):
            load(tmp_path / f"f{suffix}")
    assert len(list(tmp_path.iterdir())) == 2


def test_unknown_suffixes_name_the_known_ones(tmp_path):
    known = r"\.json \.graphml \.gexf \.dot \.csv \.svg \.html "
    for name in ("c.jpg", "c", "c.SVG"):
        with pytest.raises(
            ValueError, match=known + r"\.pdf \.png \.tex \.mmd \.mib\.json \.graph\.json; got"
        ):
            save(make_circuit(), tmp_path / name)
        with pytest.raises(ValueError, match=known + r"\.mib\.json \.graph\.json; got"):
            load(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [*READABLE, ".tex", ".mmd"])
def test_half_a_surrogate_pair_is_refused_wherever_it_is(suffix, tmp_path):
    def refuse(circuit, where, **options):
        with pytest.raises(ValueError) as error:
            save(circuit, tmp_path / f"c{suffix}", **options)
        assert str(error.value) == (
            f"text must be whole characters, as files are UTF-8; {where} has half a surrogate pair "
            "in 'a\\ud800b'; replace it with text.encode('utf-8', 'replace').decode()"
        )

    refuse(make_circuit(), "the title", title=HALF)
    refuse(make_circuit(task=HALF), "'task' of the graph")
    refuse(nx.relabel_nodes(make_circuit(), {"L0H0": HALF}), "a node or an edge")
    circuit = make_circuit()
    circuit.add_edge("embed", "logits", key=HALF, **circuit.edges["embed", "L0H0", "q"])
    refuse(circuit, "a node or an edge")
    circuit = make_circuit()
    circuit.nodes["embed"]["note"] = HALF
    refuse(circuit, "'note' of node 'embed'")
    circuit = make_circuit()
    circuit.edges["embed", "L0H0", "q"]["note"] = HALF
    refuse(circuit, "'note' of edge 'embed' -> 'L0H0' ('q')")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".html", ".json"])
def test_half_a_surrogate_pair_in_a_figure_is_refused(suffix, tmp_path):
    for figure in (
        go.Figure(layout_title_text=HALF),
        go.Figure(go.Bar(x=[HALF, "b"], y=[1, 2])),
        go.Figure(go.Scatter(x=[1], y=[2], customdata=np.array([HALF], dtype=object))),
    ):
        with pytest.raises(ValueError, match="the figure has half a surrogate pair in 'a"):
            save(figure, tmp_path / f"f{suffix}")
    assert not list(tmp_path.iterdir())


def test_nodes_and_keys_are_text(tmp_path):
    circuit = make_circuit()
    circuit.add_edge("embed", "logits", key=0, **circuit.edges["embed", "L0H0", "q"])
    for wrong in (circuit, nx.relabel_nodes(make_circuit(), {"L0H0": 0})):
        with pytest.raises(ValueError, match="must be str; got 0, int; rename it"):
            save(wrong, tmp_path / "c.graphml")


def test_a_model_is_for_one_format(tmp_path):
    path = save(make_circuit(), tmp_path / "c.json")
    for wrong in (
        lambda: save(make_circuit(), path, model=object()),
        lambda: save(go.Figure(), path, model=object()),
        lambda: load(path, model=object()),
    ):
        with pytest.raises(ValueError) as error:
            wrong()
        assert str(error.value) == (
            "`model` must be left out unless the suffix is .mib.json, the only one that needs it; "
            "got 'c.json'; leave it out or choose another name"
        )


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="must lie in an existing folder"):
        save(make_circuit(), tmp_path / "missing" / "c.json")
    (tmp_path / "c.json").mkdir()
    with pytest.raises(OSError):
        save(make_circuit(), tmp_path / "c.json")
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing.json")


@pytest.mark.parametrize("suffix", [*READABLE, ".tex", ".mmd"])
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
    if suffix in (".json", ".html"):
        with pytest.raises(OSError, match="no space left"):
            save(go.Figure(), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_what_a_format_cannot_hold_is_refused(tmp_path):
    def refuse(suffix, match, **attributes):
        circuit = make_circuit()
        circuit.nodes["logits"]["note"] = 1
        circuit.nodes["embed"].update(attributes)
        with pytest.raises(ValueError, match=match):
            save(circuit, tmp_path / f"c{suffix}")

    refuse(".json", "must be finite", weight=float("nan"))
    refuse(".json", "must be named like variables", label="x")
    refuse(".json", "must be named like variables", **{"two words": 1})
    refuse(".graphml", "no control characters", note="a\x00b")
    for at in range(3):
        circuit = make_circuit()
        owners(circuit)[at]["note"] = "a\x00b"
        with pytest.raises(ValueError, match=r"no control characters; .* has 'a\\x00b'"):
            save(circuit, tmp_path / "c.gexf")
    refuse(".gexf", "must not be named", weight=1.0)
    refuse(".gexf", "of one type in .gexf; 'note' is str and int; convert", note="a")
    circuit = make_circuit()
    for node, rank in (("embed", 1), ("logits", True)):
        circuit.nodes[node]["rank"] = rank
    with pytest.raises(ValueError, match="'rank' is int and bool; convert it or save as"):
        save(circuit, tmp_path / "c.gexf")
    refuse(".dot", r"must not be named .*; got \['color'\]; rename", color="red")
    refuse(".dot", r"must not be named .*; got \['Subgraph'\]; rename", Subgraph="red")
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
     '{"format": "relp-circuit", "version": 2}', "<html></html>", 9999 * "[",
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


@pytest.mark.parametrize("name", ["places", "prompt"])
@pytest.mark.parametrize("text", ["not json", '{"a": 1}', "[1]", "3"])
def test_what_stands_at_positions_must_be_a_list_of_texts(name, text, tmp_path):
    circuit = make_circuit(positions=3)
    circuit.graph[name] = text
    message = (
        rf"attribute '{name}' of the graph must be a list of texts in JSON; got {text!r}; write"
    )
    for use in (lambda c: save(c, tmp_path / "c.svg"), draw):
        with pytest.raises(ValueError, match=re.escape(message)[:60]):
            use(circuit)


def test_a_csv_that_was_cut_is_refused_and_one_without_a_last_line_end_is_not(tmp_path):
    circuit = make_circuit()
    text = save(circuit, tmp_path / "c.csv").read_text()
    assert same(load(write(tmp_path / "d.csv", text.rstrip("\n"))), circuit)
    comments = "".join(line for line in text.splitlines(True) if line.startswith("#"))
    for cut, said in (
        (comments, "there is no row with the names of columns"),
        (text.rstrip("\n") + ",", "the last row ends in a comma"),
    ):
        with pytest.raises(ValueError, match=f"must be a circuit written by .*{said}"):
            load(write(tmp_path / "d.csv", cut))
