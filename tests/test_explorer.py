"""The explorer: what its page holds, and in Chromium what it does."""

import base64
import html
import inspect
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
from test_graph import circuit_of, make_scores

from circuits.draw.lanes import strongest
from circuits.draw.paint import NEGATIVE, POSITIVE
from circuits.explorer import Explorer, explore, inline
from circuits.explorer.page import json_text, page_of
from circuits.files.formats import load, save
from circuits.graph import assemble, real_edges, size
from circuits.search.prune import connect, threshold, top

FOLDER = Path(__file__).parent.parent / "circuits" / "explorer"
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
).split()
HOSTILE = [
    "</script><script>window.broken=1</script>",
    "<!--<script>",
    '"><img src=x onerror=window.broken=1>',
    "]]>&amp;'\\u003c\u2028\u202e",
    "</svg><script>window.broken=1</script>",
    "{{data}} $& $1",
]


def make_circuit(edges: int = 40, **options: Any) -> nx.MultiDiGraph:
    return top(assemble(make_scores(**{"layers": 4, "heads": 4} | options)), edges=edges)


def hostile() -> nx.MultiDiGraph:
    """A circuit whose every text tries to break out of where it stands."""
    circuit = make_circuit(task=HOSTILE[0], model=HOSTILE[2], metric=HOSTILE[4])
    circuit.graph["prompt"] = json.dumps(HOSTILE)
    heads = [node for node, kind in circuit.nodes(data="kind") if kind == "head"]
    return nx.relabel_nodes(circuit, dict(zip(heads, HOSTILE, strict=False)))


def data_of(page: str) -> dict[str, Any]:
    text = page.partition('<script type="application/json" id="relp-view">')[2]
    return json.loads(text.partition("</script>")[0])


# -- without a browser ----------------------------------------------------------------------------


def test_the_page_needs_nothing_and_is_small() -> None:
    page = page_of(make_circuit())
    data = json.dumps(data_of(page))
    assert len(page.encode()) - len(data) < 150_000, "of 1.5 MB"
    assert "Content-Security-Policy\" content=\"default-src 'none'" in page
    without = re.sub(r'"http://www\.w3\.org/[\w/]+"', "", page)  # names, no addresses
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|import\(|fetch\(|XMLHttp", without)
    assert not re.search(r"\{\{\w+\}\}", page), "each gap of the template is filled"


def test_the_page_holds_each_node_and_edge_and_the_prompt() -> None:
    circuit = make_circuit(heads=4, kv_heads=2)
    circuit.graph["prompt"] = '["When", " Mary"]'
    data = data_of(page_of(circuit))
    assert {node["id"] for node in data["nodes"]} == set(circuit) and data["left_out"] == 0
    scores = [edge["score"] for edge in data["edges"] if not edge["kin"]]
    assert sorted(scores) == sorted(d["score"] for *_, d in real_edges(circuit))
    assert [abs(score) for score in scores] == sorted(map(abs, scores)), "the strongest on top"
    assert sum(edge["kin"] for edge in data["edges"]) == len(circuit.edges) - size(circuit) > 0
    assert data["prompt"] == ["When", " Mary"]
    silent = {node["kind"] for node in data["nodes"] if node["score"] is None}
    assert silent == {"kv", "logits"}, "what writes nothing has no score"


def test_a_circuit_by_position_has_lanes() -> None:
    circuit = make_circuit(positions=3)
    data = data_of(page_of(circuit))
    assert [lane["label"] for lane in data["lanes"]] == ["@0", "@1", "@2"]
    lanes = {lane["label"]: lane for lane in data["lanes"]}
    for node in data["nodes"]:
        lane = lanes[node["place"]]
        assert lane["low"] < node["x"] < lane["high"]
        assert node["id"].replace(".kv@", "@") == node["label"] + node["place"]
    assert sum(not edge["kin"] for edge in data["edges"]) == size(circuit)


def test_names_cannot_break_out_of_the_data() -> None:
    page = page_of(hostile(), title=HOSTILE[0])
    assert page.count("<script") == 1 + 4 and page.count("</script>") == 5
    assert "window.broken=1</script>" not in page and f"<title>{html.escape(HOSTILE[0])}<" in page
    data = data_of(page)
    assert set(HOSTILE) - {HOSTILE[5]} <= {node["id"] for node in data["nodes"]} | set(HOSTILE[5:])
    assert data["prompt"] == HOSTILE and data["title"] == HOSTILE[0]
    assert not set("<>&") & set(json_text(json.dumps(HOSTILE)))


def test_the_saved_page_is_the_explorer_and_comes_back(tmp_path) -> None:
    circuit = hostile()
    path = save(circuit, tmp_path / "c.html", title="mine")
    data = data_of(path.read_text())
    assert data["title"] == "mine"
    assert data["source"].startswith(f"{HOSTILE[0]} · {HOSTILE[2]} · relp · denoise · ")
    assert [sample[0] for sample in data["samples"]] == ["positive", "negative", *3 * ["neutral"]]
    assert nx.utils.graphs_equal(load(path), circuit)


def test_large_circuits_show_the_strongest_and_say_so() -> None:
    graph = assemble(make_scores(layers=6, heads=8))
    assert size(graph) > 1500
    data = data_of(page_of(strongest(graph, 200), total=size(graph)))
    assert 150 < len(data["edges"]) <= 200
    assert len(data["edges"]) + data["left_out"] == size(graph)
    chosen = top(graph, edges=200)  # of which the short way must not differ
    assert nx.utils.graphs_equal(strongest(graph, 200), chosen)
    assert strongest(graph, 5000) is graph
    loose = threshold(graph, 0.0, connected=False)
    loose.remove_node("logits")
    assert size(connect(loose)) == 0 < size(strongest(loose, 100)) <= 100, "no path, still shown"


def test_inline_is_a_frame_over_a_picture() -> None:
    shown = explore(hostile(), title=HOSTILE[2], height=500)
    text = shown._repr_html_()
    frame = re.fullmatch(
        r'<div style="[^"]*height:500px[^"]*"><img alt="([^"]*)"[^>]*'
        r'src="data:image/svg\+xml;base64,([^"]*)"><p>[^<]*</p>'
        r'<iframe title="([^"]*)" style="[^"]*" '
        r'sandbox="allow-scripts allow-downloads" srcdoc="([^"]*)"></iframe></div>',
        text,
    )
    assert frame and html.unescape(frame[4]) == shown.page
    assert html.unescape(frame[1]) == html.unescape(frame[3]) == HOSTILE[2]
    ET.fromstring(base64.b64decode(frame[2]))
    assert repr(explore(make_circuit())) == "Explorer(title='toy · tiny', height=640)"
    assert Explorer("a", "b", "c") == Explorer("a", "b", "c", 640)


def test_a_whole_model_is_shown_in_a_moment() -> None:
    text = inline(assemble(make_scores(layers=6, heads=8)))
    data = data_of(html.unescape(text.partition('srcdoc="')[2]))
    assert 0 < len(data["edges"]) <= 300


def test_what_cannot_be_explored_is_refused() -> None:
    with pytest.raises(ValueError, match="`height` must be 200 pixels or more; got 50; leave it"):
        explore(make_circuit(), height=50)
    with pytest.raises(ValueError, match="this one is empty"):
        explore(make_circuit(edges=0))
    with pytest.raises(ValueError, match="the title has half a surrogate pair"):
        explore(make_circuit(), title="a\ud800b")
    with pytest.raises(TypeError, match=r"must be a networkx.MultiDiGraph; got DiGraph"):
        inspect.unwrap(strongest)(nx.DiGraph(), 5)  # without the tests' type checker


def test_what_is_vendored_says_what_it_is() -> None:
    lock = json.loads((FOLDER / "package-lock.json").read_text())["packages"]
    licences = (FOLDER / "d3.licences.txt").read_text()
    for name, package in lock.items():
        if "/d3-" in name:
            said = (
                f"{name.removeprefix('node_modules/')} {package['version']} ({package['license']})"
            )
            assert said in licences
            assert package["license"] in ("ISC", "BSD-3-Clause")


# -- in a browser ----------------------------------------------------------------------------------


class Opened:
    """A page, and what went wrong in it."""

    def __init__(self, page: Any) -> None:
        self.page, self.complaints, self.asked = page, [], []
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))

    def show(self, path: Path) -> Any:
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]", state="attached")
        return self.page

    def count(self, what: str) -> int:
        return self.page.locator(what).count()

    def edges(self) -> int:
        return self.count("#edges path")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Any) -> Iterator[Opened]:
    """Fails if the page complains, or asks for anything but itself."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    context.set_default_timeout(10_000)
    opened = Opened(context.new_page())
    yield opened
    context.close()
    assert opened.complaints == []
    assert [url for url in opened.asked if not url.startswith(("file:", "blob:", "data:"))] == []


@pytest.mark.outside
def test_it_opens_with_all_of_a_small_circuit(opened, tmp_path) -> None:
    circuit = make_circuit()
    page = opened.show(save(circuit, tmp_path / "c.html"))
    assert opened.edges() == size(circuit) and opened.count(".node") == len(circuit)
    assert page.locator("#shown").inner_text().startswith(f"{size(circuit)} · |s| ≥ ")
    assert page.locator("h1").inner_text() == "toy · tiny"
    boxes = page.locator(".node").evaluate_all(
        "all => all.map(one => one.getBoundingClientRect()).map(({x, y}) => [x, y])"
    )
    assert all(0 < x < 1280 and 0 < y < 800 for x, y in boxes) and page.locator("#map").is_hidden()


@pytest.mark.outside
def test_the_slider_takes_edges_away_and_prunes_dead_ends(opened, tmp_path) -> None:
    """With few edges nothing is shown but the paths that they make."""
    circuit = circuit_of(
        ("embed", "L0H0", "q", 8.0),
        ("L0H0", "logits", "in", 7.0),
        ("embed", "L0.mlp", "in", 6.0),
        ("L0.mlp", "L1H1", "v", 5.0),
        ("L1H1", "logits", "in", -4.0),
        ("embed", "logits", "in", 3.0),
    )
    page = opened.show(save(top(circuit, edges=6), tmp_path / "c.html"))
    slider, counts = page.locator("#threshold"), [opened.edges()]
    slider.focus()
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
        counts.append(opened.edges())
    # without 3, whole; without -4, 5 and 6 lead nowhere
    assert counts == [6, 5, 2, 2, 2]
    assert page.locator("#shown").inner_text() == "2 · |s| ≥ 7"
    assert slider.get_attribute("aria-valuetext") == "2 edges, absolute score at least 7"
    assert opened.count(".node:not([visibility])") == 3
    for _ in range(4):
        page.keyboard.press("]")
    assert opened.edges() == 6


@pytest.mark.outside
def test_large_circuits_open_with_three_hundred_edges(opened, tmp_path) -> None:
    graph = assemble(make_scores(layers=6, heads=8))
    circuit = top(graph, edges=1200)
    page = opened.show(save(circuit, tmp_path / "c.html"))
    assert 200 < opened.edges() <= 300
    page.locator("#threshold").fill(page.locator("#threshold").get_attribute("max"))
    assert opened.edges() == size(circuit)


@pytest.mark.outside
def test_a_click_lights_the_paths_of_a_node(opened, tmp_path) -> None:
    circuit = make_circuit()
    page = opened.show(save(circuit, tmp_path / "c.html"))
    node = max((n for n, kind in circuit.nodes(data="kind") if kind == "head"), key=circuit.degree)
    after, before = nx.descendants(circuit, node) | {node}, nx.ancestors(circuit, node) | {node}
    expected = sum(u in after or v in before for u, v in circuit.edges())
    box = page.locator(".node", has_text=node)
    box.click()
    assert opened.count("#lit path") == expected > circuit.degree(node)
    assert box.get_attribute("aria-pressed") == "true"
    widths = page.locator("#lit path").evaluate_all(
        "all => all.map(one => one.getAttribute('stroke-width') * state.at.k)"
    )
    assert min(widths) >= 1.49
    panel = page.locator("#panel")
    assert panel.locator("h2").inner_text() == node
    rows = panel.locator("li").evaluate_all("all => all.map(one => one.innerText.split(/\\s*\\n/))")
    numbers = sorted(float(row[1].replace("−", "-")) for row in rows)
    scores = [*circuit.in_edges(node, data="score"), *circuit.out_edges(node, data="score")]
    assert numbers == pytest.approx(sorted(score for *_, score in scores), rel=1e-3)
    off = set(circuit) - after - before
    assert opened.count(".node.dim") == len(off) > 0
    panel.locator("li button").first.click()  # its strongest neighbour
    assert panel.locator("h2").inner_text() == rows[0][0].partition(" → ")[0]
    page.keyboard.press("Escape")
    assert panel.is_hidden() and opened.count("#lit path") == opened.count(".node.dim") == 0


@pytest.mark.outside
def test_hovering_shows_numbers(opened, tmp_path) -> None:
    circuit = make_circuit()
    page = opened.show(save(circuit, tmp_path / "c.html"))
    page.locator(".node", has_text="embed").hover()
    assert page.locator("#tip").inner_text().startswith("embed · score ")
    middle = """() => {
        const edge = state.shown.at(-1), at = path(edge), box = stage.getBoundingClientRect();
        const [x, y] = state.at.apply([at[24], at[25]]);
        return [x + box.x, y + box.y];
    }"""
    x, y = page.evaluate(middle)
    page.mouse.move(x, y)
    assert opened.count("#touched path") == 1
    note = page.locator("#tip").inner_text()
    assert note in {edge["note"] for edge in data_of(page_of(circuit))["edges"]}
    page.mouse.move(5, 400)
    assert opened.count("#touched path") == 0 and page.locator("#tip").is_hidden()


@pytest.mark.outside
def test_it_can_be_used_without_a_mouse(opened, tmp_path) -> None:
    page = opened.show(save(make_circuit(), tmp_path / "c.html"))

    def focused() -> str:
        return page.evaluate("document.activeElement.__data__?.id ?? document.activeElement.id")

    page.keyboard.press("j")
    assert focused() == "embed"
    page.keyboard.press("ArrowUp")
    above = focused()
    assert above.startswith("L0")
    page.keyboard.press("ArrowDown")
    assert focused() == "embed"
    page.keyboard.press("ArrowDown")
    assert focused() == "embed", "there is nothing below"
    page.keyboard.press("k")
    assert focused() == "logits", "the one before the first is the last"
    outline = "getComputedStyle(document.activeElement.querySelector('.box')).strokeWidth"
    assert page.evaluate(outline) == "2.5px", "it can be seen where the focus is"
    page.keyboard.press("Enter")
    assert page.locator("#panel h2").inner_text() == "logits"
    assert "edges on its paths" in page.locator("#said").inner_text()
    page.keyboard.press("Escape")
    scale = page.evaluate("state.at.k")
    page.keyboard.press("+")
    page.keyboard.press("+")
    assert page.evaluate("state.at.k") == pytest.approx(scale * 1.25**2)
    page.keyboard.press("0")
    assert page.evaluate("state.at.k") == pytest.approx(scale)
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#help").is_hidden()
    labels = page.locator("button, input, .node").evaluate_all(
        "all => all.map(one => one.getAttribute('aria-label') || one.title || one.innerText"
        " || one.closest('label')?.innerText)"
    )
    assert all(labels), "everything has a name"


@pytest.mark.outside
def test_searching(opened, tmp_path) -> None:
    page = opened.show(save(make_circuit(), tmp_path / "c.html"))
    page.keyboard.press("/")
    page.keyboard.type("L1H")
    names = page.locator(".node.hit .label").all_text_contents()
    assert names and all(name.startswith("L1H") for name in names)
    page.keyboard.press("Enter")
    assert page.locator("#panel h2").inner_text().startswith("L1H")
    page.keyboard.press("/")
    page.keyboard.type("nothing of that name")
    assert opened.count(".node.hit") == 0
    page.keyboard.press("Escape")
    assert page.locator("#search").input_value() == "" and opened.count(".node.chosen") == 1
    page.keyboard.press("Escape")
    assert opened.count(".node.dim") == 0


@pytest.mark.outside
def test_the_slider_searches_again(opened, tmp_path) -> None:
    circuit = make_circuit(positions=3)
    circuit.graph["prompt"] = '["a", "b", "c"]'
    page = opened.show(save(circuit, tmp_path / "c.html"))

    def hits() -> list[str]:
        assert opened.count(".node.hit") == opened.count(".node.hit:not([visibility])")
        return sorted(page.locator(".node.hit").evaluate_all("all => all.map(e => e.__data__.id)"))

    def shown(part: str) -> list[str]:
        ids = page.locator(".node:not([visibility])").evaluate_all(
            "all => all.map(e => e.__data__.id)"
        )
        return sorted(node for node in ids if part in node)

    slider = page.locator("#threshold")
    page.locator("#search").fill("L1H")
    many = hits()
    slider.fill("0")
    few = hits()
    assert few == shown("L1H") and len(few) < len(many)
    slider.fill(slider.get_attribute("max"))
    assert hits() == many == shown("L1H")
    page.locator(".token").nth(1).click()
    many = hits()
    slider.fill("0")
    assert hits() == shown("@1") and len(hits()) < len(many)


@pytest.mark.outside
def test_hostile_names_are_text(opened, tmp_path) -> None:
    circuit = hostile()
    page = opened.show(save(circuit, tmp_path / "c.html", title=HOSTILE[2]))
    assert page.evaluate("window.broken") is None and opened.count("img") == 0
    assert page.locator("h1").inner_text() == HOSTILE[2] == page.title()
    tokens = page.locator(".token").evaluate_all("all => all.map(one => one.firstChild.data)")
    assert tokens == HOSTILE
    labels = page.locator(".node .label").evaluate_all("all => all.map(one => one.textContent)")
    assert set(HOSTILE[:5]) <= set(labels)
    for i in range(opened.count(".node")):
        page.locator(".node").nth(i).dispatch_event("click")
    with page.expect_download() as download:
        page.keyboard.press("s")
    text = Path(download.value.path()).read_text()
    ET.fromstring(text)
    assert page.evaluate("window.broken") is None and opened.count("script") == 6


@pytest.mark.outside
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_view_is_saved_as_a_picture_with_plain_colours(scheme, chromium, tmp_path) -> None:
    context = chromium.new_context(color_scheme=scheme)
    opened = Opened(context.new_page())
    page = opened.show(save(make_circuit(kv_heads=2), tmp_path / "c.html"))
    page.locator(".node", has_text="logits").click()
    with page.expect_download() as download:
        page.locator("#save").click()
    assert download.value.suggested_filename == "toy-tiny.svg"
    text = Path(download.value.path()).read_text()
    root = ET.fromstring(text)
    colours = {e.get(name) for e in root.iter() for name in ("fill", "stroke")} - {None, "none"}
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours)
    assert ({POSITIVE, NEGATIVE} <= colours) == (scheme == "light")
    assert not re.search(r"var\(|color-mix|light-dark|class=|rgb", text)
    words = {e.text for e in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"logits", "embed", "layer 0", "toy · tiny", "positive"} <= words
    context.close()
    assert opened.complaints == []


@pytest.mark.outside
def test_light_and_dark(chromium, tmp_path) -> None:
    context = chromium.new_context(color_scheme="dark")
    page = Opened(context.new_page()).show(save(make_circuit(), tmp_path / "c.html"))
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(paper)
    assert dark == "rgb(13, 17, 23)", "it follows the system"
    page.locator("#theme").click()
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    page.keyboard.press("t")
    assert page.evaluate(paper) == dark
    context.close()


@pytest.mark.outside
def test_paper_gets_the_whole_circuit(opened, tmp_path) -> None:
    page = opened.show(save(make_circuit(), tmp_path / "c.html"))
    page.evaluate("scaleBy(4)")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("#stage").is_hidden() and page.locator("#paper svg").first.is_visible()
    beyond = """() => {
        const around = document.querySelector("#paper svg svg").getBoundingClientRect();
        const boxes = [...document.querySelectorAll("#paper svg svg rect, #paper svg svg path")];
        return boxes.map((one) => one.getBoundingClientRect()).filter((box) =>
          box.x < around.x - 1 || box.y < around.y - 1
          || box.right > around.right + 1 || box.bottom > around.bottom + 1).length;
    }"""
    assert page.evaluate(beyond) == 0, "nothing is cropped"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert opened.count("#paper svg") == 0


@pytest.mark.outside
def test_deep_models_open_so_that_they_can_be_read(opened, tmp_path) -> None:
    circuit = top(assemble(make_scores(layers=30, heads=4)), edges=300)
    page = opened.show(save(circuit, tmp_path / "c.html"))
    sizes = page.locator(".node .label").evaluate_all(
        "all => all.map(one => one.getAttribute('font-size') * state.at.k)"
    )
    assert min(sizes) >= 8 and page.locator("#map").is_visible()
    before = page.evaluate("state.at.y")
    box = page.locator("#map").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] - 3)
    assert page.evaluate("state.at.y") < before - 300, "the overview leads down to the inputs"
    page.keyboard.press("/")
    page.keyboard.type("embed")
    page.keyboard.press("Enter")
    place = page.locator(".node", has_text="embed").bounding_box()
    assert 0 < place["y"] < 800, "what is chosen is brought into view"


@pytest.mark.outside
def test_tokens_mark_their_lane(opened, tmp_path) -> None:
    circuit = make_circuit(positions=3)
    circuit.graph["prompt"] = '["When", " Mary", " and"]'
    page = opened.show(save(circuit, tmp_path / "c.html"))
    page.locator(".token").nth(1).click()
    hits = page.locator(".node.hit").evaluate_all("all => all.map(one => one.__data__.pos)")
    assert hits and set(hits) == {1}
    page.locator(".token").nth(1).click()
    assert opened.count(".node.dim") == 0


@pytest.mark.outside
def test_inside_a_notebook_it_keeps_to_itself(opened, tmp_path) -> None:
    circuit = make_circuit(edges=30)
    host = tmp_path / "host.html"
    host.write_text(
        "<!doctype html><meta charset=utf-8><body><h1>mine</h1>"
        f"{explore(circuit)._repr_html_()}<div style='height:3000px'></div>"
    )
    page = opened.page
    page.goto(host.as_uri())
    frame = page.frame_locator("iframe")
    frame.locator("html[data-ready]").wait_for(state="attached")
    assert frame.locator("#edges path").count() == size(circuit)
    inside = page.frames[1]
    reach = "(() => { try { return String(parent.document.title) } catch (e) { return e.name } })()"
    assert inside.evaluate(reach) == "SecurityError"
    box = page.locator("iframe").bounding_box()
    assert box["height"] == 640

    page.mouse.move(box["x"] + 300, box["y"] + 300)
    scale = inside.evaluate("state.at.k")
    page.mouse.wheel(0, 100)
    page.wait_for_function("scrollY > 0")  # the notebook scrolls
    assert inside.evaluate("state.at.k") == scale and frame.locator("#hint").is_visible()
    page.evaluate("scrollTo(0, 0)")
    page.keyboard.down("Control")
    page.mouse.wheel(0, -100)
    page.keyboard.up("Control")
    inside.wait_for_function(f"state.at.k > {scale}")
    inside.evaluate("fit()")
    frame.locator(".node", has_text="embed").click()
    scale = inside.evaluate("state.at.k")
    page.mouse.move(box["x"] + 300, box["y"] + 300)
    page.mouse.wheel(0, -100)
    inside.wait_for_function(f"state.at.k > {scale}")
    assert page.evaluate("scrollY") == 0
    with page.expect_download() as download:
        frame.locator("#save").click()
    ET.fromstring(Path(download.value.path()).read_text())


@pytest.mark.outside
def test_without_the_frame_there_is_a_picture(opened, tmp_path) -> None:
    """What is left of it where a notebook is not trusted: no frame, and perhaps no styles."""
    text = re.sub(r"<iframe.*</iframe>", "", explore(make_circuit())._repr_html_(), flags=re.S)
    for i, left in enumerate((text, re.sub(r' style="[^"]*"', "", text))):
        path = tmp_path / f"{i}.html"
        path.write_text(left)
        opened.page.goto(path.as_uri())
        picture = opened.page.locator("img")
        assert picture.evaluate("one => one.complete && one.naturalWidth") > 500
        assert opened.page.locator("p").inner_text().startswith("A picture: ")


@pytest.mark.outside
def test_what_is_vendored_is_what_its_lock_gives(tmp_path) -> None:
    for name in ("package.json", "package-lock.json", "d3.entry.mjs", "licences.mjs"):
        shutil.copy(FOLDER / name, tmp_path)
    for command in ("npm ci --no-audit --no-fund", "npm run build"):
        subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True, timeout=300)
    for name in ("d3.js", "d3.licences.txt"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()
