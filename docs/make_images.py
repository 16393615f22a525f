"""The pictures of the README and of the documentation: `python docs/make_images.py` writes them.

They are of the shipped model, so that anybody gets the same. Needs the extras `images` and
`outside`, and a Chrome or Chromium. `--only circuit explorer` makes some of them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plotly.graph_objects import Figure

from circuits import draw, evaluate, explore, patch, save, top
from circuits.draw import attention
from relp import GRADIENT, PARTWAY, RELP, attribute
from tasks import ioi, zoo

FOLDER = Path(__file__).parent / "images"
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
).split()
WIDE, NARROW = (1280, 800), (420, 800)
WIDTH = 780
"""Of figures: as wide as a page has room for, so that letters stay readable."""


class Shipped:
    """The shipped model on its task, and what is known of it; each part is made when asked for."""

    def __init__(self) -> None:
        self.model = zoo.load("ioi-gpt2")
        self.task: Any = ioi(self.model.tokenizer, pairs=16, seed=0)
        self.others: Any = ioi(self.model.tokenizer, pairs=16, seed=1)
        self.rules = (GRADIENT, RELP, PARTWAY)

    def nodes(self) -> list[Any]:
        """Scores of nodes, by each of the rules."""
        return [attribute(self.model, self.task, rules=r, progress=False) for r in self.rules]

    def edges(self, task: Any = None, **options: Any) -> list[Any]:
        """Scores of edges, by each of the rules."""
        options |= {"level": "edge", "progress": False}
        return [attribute(self.model, task or self.task, rules=r, **options) for r in self.rules]

    def effect(self) -> Any:
        """What patching each node really does."""
        return patch(self.model, self.task, progress=False)

    def lanes(self) -> Any:
        """A circuit by position, of the pairs of one template."""
        by_token = self.edges(self.task[:1], positions=True)[1]
        return top(by_token, edges=40)


def main() -> None:
    """Makes the pictures that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=PICTURES, help="pictures to make")
    shipped = Shipped()
    FOLDER.mkdir(exist_ok=True)
    for name in parser.parse_args().only or PICTURES:
        PICTURES[name](shipped, name)


def figure(made: Callable[[Shipped], Any], suffix: str = "svg") -> Callable[[Shipped, str], None]:
    """A picture of what `made` gives: a figure, or a circuit. Many points are smaller as pixels."""

    def write(shipped: Shipped, name: str) -> None:
        what = made(shipped)
        if isinstance(what, Figure):
            what.update_layout(width=WIDTH)
        print(save(what, FOLDER / f"{name}.{suffix}"))

    return write


def explorer(made: Callable[[Shipped], Any], node: str) -> Callable[[Shipped, str], None]:
    """The explorer of a circuit with a node chosen: wide, and narrow."""

    def write(shipped: Shipped, name: str) -> None:
        from playwright.sync_api import sync_playwright

        with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
            page = Path(folder) / "page.html"
            page.write_text(explore(made(shipped)).page, encoding="utf-8")
            found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
            browser = play.chromium.launch(
                executable_path=os.environ.get("BROWSER_PATH") or next(filter(None, found), None),
                args=FLAGS,
            )
            for suffix, (width, height) in {"": WIDE, "-narrow": NARROW}.items():
                tab = browser.new_page(viewport={"width": width, "height": height})
                tab.goto(page.as_uri())
                tab.wait_for_selector("html[data-ready]", state="attached")
                tab.fill("#search", node)
                tab.keyboard.press("Enter")
                tab.wait_for_timeout(1000)  # until it is painted
                target = FOLDER / f"{name}{suffix}.png"
                tab.screenshot(path=target)
                print(target)
            browser.close()

    return write


PICTURES: dict[str, Callable[[Shipped, str], None]] = {
    "lanes": figure(Shipped.lanes),
    "heads": figure(lambda s: draw([*s.nodes()[:2], s.effect()], kind="head")),
    "scatter": figure(lambda s: draw(s.nodes()[:2], s.effect(), kind="mlp"), "png"),
    "sizes": figure(lambda s: draw(evaluate(s.model, s.others, s.edges(), progress=False))),
    "distribution": figure(lambda s: draw(s.edges(), kind="distribution")),
    "attention": figure(lambda s: attention(s.model, s.task, "L1H1")),
    "explorer": explorer(lambda s: top(s.edges()[1], edges=100), "L1H3"),
}

if __name__ == "__main__":
    main()
