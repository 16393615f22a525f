"""What the explorer takes in headless Chromium: `python tests/benchmarks/explorer.py`.

Synthetic circuits at the shape of GPT-2 small, 12 layers of 12 heads. Milliseconds, of three runs
the middle one:

* opened: from asking for the file until the frame after the one that shows the circuit;
* slider, click: from the key or the mouse until what it changed is on the screen, painting included
  (what the browser calls the duration of the event; it counts in steps of 8 ms);
* pan, zoom: between two frames while the mouse drags or the wheel turns, the middle one and the
  longest, and until the circuit is painted anew when that is over.

It says how busy the machine is, as numbers of a busy one are too large.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from playwright.sync_api import Page, sync_playwright

from circuits import assemble, save, top
from relp import Direction, EdgeScores, Layout, Pairs, Provenance

LAYERS, HEADS, RUNS = 12, 12, 3
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
).split()
BUDGETS = {"opened": 1500, "slider": 250, "pan": 100, "zoom": 100}

EVENTS = """
window.durations = [];
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) window.durations.push([entry.name, entry.duration]);
}).observe({ type: "event", durationThreshold: 16, buffered: true });
"""
FRAMES = """
window.gaps = []; window.watching = true;
(function watch(before) {
  requestAnimationFrame((now) => {
    if (before) window.gaps.push(now - before);
    if (window.watching) watch(now);
  });
})();
"""
PAINTED = (
    """() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"""
)


def scores() -> EdgeScores:
    """Random scores with heavy tails, as real ones have."""
    writers, readers = ["embed"], []
    for layer in range(LAYERS):
        heads = [f"L{layer}H{h}" for h in range(HEADS)]
        writers += [*heads, f"L{layer}.mlp"]
        readers += [f"{head}.{slot}" for slot in "qkv" for head in heads]
        readers.append(f"L{layer}.mlp.in")
    readers.append("logits.in")
    shape = len(writers), len(readers)
    return EdgeScores(
        provenance=Provenance(model="gpt2-like", task="synthetic", rules="RELP",
                              direction=Direction.DENOISE, metric="logit difference"),
        pairs=Pairs(clean=torch.ones(1), corrupt=torch.zeros(1), lengths=torch.ones(1).long()),
        layout=Layout.of(tuple(writers), tuple(readers), False),
        edges=torch.randn(shape, generator=torch.Generator().manual_seed(0)) ** 3,
    )  # fmt: skip


def opened(page: Page, url: str) -> float:
    """Milliseconds until the page is there and painted."""
    start = time.perf_counter()
    page.goto(url)
    page.wait_for_selector("html[data-ready]", state="attached")
    page.evaluate(PAINTED)
    return 1000 * (time.perf_counter() - start)


def event(page: Page, name: str, act: Any) -> float:
    """The duration of what `act` does; 16 if it was too short to be told."""
    page.wait_for_timeout(400)
    page.evaluate("window.durations.length = 0")
    act()
    page.wait_for_timeout(1500)
    found = [d for kind, d in page.evaluate("window.durations") if kind.startswith(name)]
    return float(max(found, default=16.0))


def frames(page: Page, act: Any) -> tuple[float, float]:
    """The middle and the longest time between two frames while `act` goes on, and just after."""
    page.wait_for_timeout(400)
    page.evaluate(FRAMES)
    act()
    page.wait_for_timeout(500)
    gaps = page.evaluate("(window.watching = false, window.gaps)")
    return statistics.median(gaps), max(gaps)


def drag(page: Page) -> None:
    """Moves the circuit to and fro."""
    page.mouse.move(640, 300)
    page.mouse.down()
    for i in range(40):
        page.mouse.move(640 + 5 * i, 300 + 3 * (i % 20))
        page.wait_for_timeout(8)
    page.mouse.up()


def wheel(page: Page) -> None:
    """Makes the circuit larger and smaller."""
    page.mouse.move(640, 400)
    for i in range(30):
        page.mouse.wheel(0, -60 if i % 20 < 10 else 60)
        page.wait_for_timeout(16)


def measured(page: Page, url: str) -> dict[str, float]:
    """One run: a page that was not open before."""
    result = {"opened": opened(page, url)}
    page.evaluate(EVENTS)
    result["shown"] = page.evaluate("document.querySelectorAll('#edges path').length")
    slider = page.locator("#threshold")
    slider.focus()
    result["slider"] = event(page, "key", lambda: page.keyboard.press("ArrowLeft"))
    result["all to few"] = event(page, "key", lambda: page.keyboard.press("Home"))
    result["few to all"] = event(page, "key", lambda: page.keyboard.press("End"))
    result["slider, all"] = event(page, "key", lambda: page.keyboard.press("ArrowLeft"))
    for name, step in (("", "opening()"), (", all", "steps.length - 1")):
        page.evaluate(f"threshold({step})")
        page.evaluate("fit()")
        result["pan" + name], result["longest pan" + name] = frames(page, lambda: drag(page))
        page.evaluate("fit()")
        result["zoom" + name], result["longest zoom" + name] = frames(page, lambda: wheel(page))
        page.evaluate("fit()")
        node = page.locator(".node.head:visible").first
        result["click" + name] = event(page, "click", node.click)
        page.keyboard.press("Escape")
    return result


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--edges", type=int, nargs="+", default=[100, 500, 2000])
    sizes = parser.parse_args().edges
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    columns: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        graph = assemble(scores())
        for size in sizes:
            path = save(top(graph, edges=size), Path(folder) / f"{size}.html")
            runs = []
            for _ in range(RUNS):
                browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
                runs.append(measured(browser.new_page(viewport={"width": 1280, "height": 800}),
                                     path.as_uri()))  # fmt: skip
                version = browser.version
                browser.close()
            columns[size] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            columns[size]["kB"] = path.stat().st_size / 1000
    load = ", ".join(f"{part:.1f}" for part in os.getloadavg())
    print(f"Chromium {version}, {os.cpu_count()} cores, load {load}; budget in brackets\n")
    print(f"{'edges':<22}" + "".join(f"{size:>9,}" for size in sizes))
    for key in columns[sizes[0]]:
        budget = f" ({BUDGETS[key.partition(',')[0]]})" if key.partition(",")[0] in BUDGETS else ""
        print(f"{key + budget:<22}" + "".join(f"{columns[size][key]:9.0f}" for size in sizes))


if __name__ == "__main__":
    main()
