"""The documentation says what is so: its code runs, its commands exist, its lists are whole.

Blocks of a page run from top to bottom in one namespace, in a folder of its own, as a reader would
type them. What a block prints may stand behind it as a block of the language `output`: words must
come as they stand there, numbers nearly so. The line before a block may say what it needs:

    <!-- needs: smollm2-135m -->    a model that is fetched: it runs with `pytest -m real`
    <!-- run -->                    its `relp …` lines are run too, not only read
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer.main
from test_house import ROOT

from circuits.choices import SUFFIXES
from circuits.cli import COMMANDS, app
from relp.rulebook import KINDS, PRESETS
from tasks import zoo

DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
}
LANGUAGES = {"python", "bash", "output", "text", "csv", "json"}
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^>]*) -->\n+)?^```(?P<language>.*)\n(?P<code>(?s:.*?))^```$", re.M)  # fmt: skip # noqa: E501
NUMBER = re.compile(r"(?<![A-Za-z_\d.])-?(?:\d[\d,]*\.?\d*|\.\d+)(?:e-?\d+)?")
OTHERS = {"pip", "pytest", "mkdocs", "python3", ".", "cd"}
"""What commands of a page may be beside ours and `python`."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    code: str
    needs: str
    """The model that must be fetched for it, or empty."""
    run: bool
    """Of commands: they are run."""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    text, found = PAGES[page].read_text(), []
    for match in BLOCK.finditer(text):
        mark = match["mark"] or ""
        line = text.count("\n", 0, match.start("code"))
        assert mark == "run" or mark.startswith("needs: ") or not mark, f"{page}:{line}: {mark}"
        needs = mark.removeprefix("needs: ") if mark.startswith("needs: ") else ""
        found.append(
            Block(page, line, match["language"], match["code"], needs, mark == "run")
        )  # fmt: skip
    return found


BLOCKS = {page: blocks_of(page) for page in PAGES}
RUN = [page for page, found in BLOCKS.items() if any(b.language == "python" or b.run for b in found)]  # fmt: skip # noqa: E501
REAL = [page for page in RUN if any(block.needs for block in BLOCKS[page])]


# -- the blocks ------------------------------------------------------------------------------------


def test_blocks_are_found_and_none_is_of_no_kind() -> None:
    assert {"README.md", "docs/start.md", "docs/recipes/task.md"} <= set(RUN)
    for page, path in PAGES.items():
        fences = re.findall(r"^ *```.*$", path.read_text(), re.M)
        assert len(fences) == 2 * len(BLOCKS[page]), f"{page}: a fence is indented or not closed"
    for block in (b for found in BLOCKS.values() for b in found):
        assert block.language in LANGUAGES, f"{block.place}: {block.language!r}"
        assert block.language in ("python", "bash") or not (block.needs or block.run), block.place
        assert block.needs in ("", *zoo.names()), block.place


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command of the pages: those of blocks, and `relp …` in running text."""
    for page, found in BLOCKS.items():
        for block in found:
            if block.language == "bash":
                for line in block.code.replace("\\\n", "").splitlines():
                    for part in re.split(r" && ", line):
                        if words := shlex.split(part, comments=True):
                            yield block.place, words
        prose = BLOCK.sub("", PAGES[page].read_text())
        for line in re.findall(r"(?<!`)`(relp [a-z-][^`…]*)`", prose):
            yield page, shlex.split(line)


def test_commands_and_their_options_exist() -> None:
    ours = typer.main.get_command(app)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    seen = set()
    for place, (program, *words) in commands():
        if program == "relp" and words and not words[0].startswith("--"):
            name, *options = words
            command = ours.commands.get(name)  # type: ignore[attr-defined]
            assert command is not None, f"{place}: relp {name}"
            seen.add(name)
            # in running text a command may stand without what it must get
            command.make_context(name, options, resilient_parsing=not options)
        elif program == "relp":
            assert words[0] in ("--help", "--install-completion", "--show-completion"), place
        elif program == "python":
            there = find_spec(words[1]) if words[0] == "-m" else (ROOT / words[0]).exists()
            assert there, f"{place}: python {' '.join(words)}"
        else:
            assert program in OTHERS, f"{place}: {program}"
        for extras in re.findall(r"\.\[([\w,]+)\]", " ".join(words)):
            assert set(extras.split(",")) <= set(known["optional-dependencies"]), place
    assert seen == {function.__name__ for function in COMMANDS}


@pytest.mark.long
@pytest.mark.parametrize("page", RUN)
@pytest.mark.usefixtures("annotations_unchecked")
def test_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(BLOCKS[page])


@pytest.mark.real
@pytest.mark.parametrize("page", REAL)
@pytest.mark.usefixtures("annotations_unchecked")
def test_a_page_runs_with_its_model(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(BLOCKS[page], fetched=True)


def run(found: list[Block], *, fetched: bool = False) -> None:
    """Runs what a reader would type, and compares what it prints."""
    namespace: dict[str, Any] = {"__name__": "page"}
    said: str | None = None
    for block in found:
        if block.language == "output":
            assert said is None or alike(block.code, said), f"{block.place} printed\n{said}"
        elif block.needs and not fetched:
            said = None
        elif block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                source = "\n" * block.line + block.code
                exec(compile(source, str(PAGES[block.page]), "exec"), namespace)
            said = out.getvalue()
        elif block.run or (block.needs and block.language == "bash"):
            said = typed(block)
        else:
            said = None


def typed(block: Block) -> str:
    """What the `relp` lines of a block print."""
    from test_cli import plain
    from test_cli import relp as command

    said = ""
    for line in block.code.splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "relp":
            result = command(*words[1:])
            assert result.exit_code == 0, f"{block.place}: {result.output}"
            said += plain(result.stdout)
    return said


def alike(wanted: str, got: str) -> bool:
    """The same words, and numbers that are nearly the same; `…` as the last line: and so on."""
    lines, given = wanted.strip().splitlines(), got.strip().splitlines()
    if lines and lines[-1].strip() == "…":
        lines, given = lines[:-1], given[: len(lines) - 1]
    wanted, got = "\n".join(lines), "\n".join(given)
    if NUMBER.sub("#", wanted).split() != NUMBER.sub("#", got).split():
        return False
    pairs = zip(*(map(number, NUMBER.findall(text)) for text in (wanted, got)), strict=True)
    return all(abs(a - b) <= 0.02 * max(1.0, abs(a)) for a, b in pairs)


def number(text: str) -> float:
    return float(text.replace(",", ""))


def test_outputs_are_compared_by_words_and_nearly_by_numbers() -> None:
    assert alike("r  0.98 of 3,628 edges\n…", "r 0.97 of 3,628 edges\nand more")
    assert not alike("L1H3 0.98", "L1H2 0.98") and not alike("r 0.98", "r 0.88")
    assert not alike("one\n", "one\ntwo") and alike("-.5 (1e-3)", "-0.5 (0.001)")


# -- the lists -------------------------------------------------------------------------------------


def test_the_reference_has_every_public_name() -> None:
    listed = " ".join(p.read_text() for p in (DOCS / "api").glob("*.md"))
    shown = {line.rpartition(".")[2] for line in re.findall(r"^::: ([\w.]+)$", listed, re.M)}
    inner = "circuits.draw circuits.engines circuits.exact tasks.planted tasks.zoo"
    rooms = ["relp", "circuits", "tasks", *inner.split()]
    public = {name for room in rooms for name in import_module(room).__all__} - {"planted", "zoo"}
    assert public <= shown, public - shown


def test_the_command_line_has_every_option() -> None:
    text = PAGES["docs/cli.md"].read_text()
    sections = dict(re.findall(r"^## `relp (\w+)`$(.*?)(?=^## |\Z)", text, re.M | re.S))
    assert set(sections) == {function.__name__ for function in COMMANDS}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        for parameter in command.params:
            for option in (*parameter.opts, *parameter.secondary_opts):
                shared = option in ("--help", "--json", "--device", "--dtype", "--device-map")
                assert not option.startswith("--") or shared or option in sections[name], option


def test_the_formats_are_all_there() -> None:
    text = PAGES["docs/files.md"].read_text()
    assert [suffix for suffix in SUFFIXES if f"`{suffix}`" not in text] == []


def test_the_table_of_the_rule_book_is_that_of_the_code() -> None:
    rows = [
        [cell.strip(" `*") for cell in line.strip("|").split("|")]
        for line in PAGES["docs/rules.md"].read_text().splitlines()
        if line.startswith("|")
    ]
    heads = next(row for row in rows if row[0] == "kind" and "GRADIENT" in row)
    table = {row[0]: row[1:] for row in rows if row[0] in KINDS and len(row) == len(heads)}
    assert heads[1:] == list(PRESETS) and list(table) == list(KINDS)
    for kind, cells in table.items():
        assert cells == [getattr(rules, kind) for rules in PRESETS.values()], kind
    formulas = {row[1] for row in rows if len(row) > 2 and row[0] in KINDS}
    assert {rule for kind in KINDS.values() for rule in kind} - {"derivative"} <= formulas


def test_what_the_readme_points_to_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)", PAGES["README.md"].read_text())
    here = [link for link in links if not link.startswith("http")]
    assert len(here) > 5 and [link for link in here if not (ROOT / link).exists()] == []


# -- the site --------------------------------------------------------------------------------------


@pytest.mark.outside
def test_the_site_is_built_and_read_without_a_network(tmp_path: Path) -> None:
    """No warning while it is built; its pages ask for nothing, and what is searched is found."""
    from playwright.sync_api import Page, sync_playwright

    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert (built.returncode, built.stderr) == (0, "")
    asked, said = list[str](), list[str]()

    def opened(page: Page) -> Page:
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: said.append(str(error)))
        return page

    with sync_playwright() as play:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        for width in (1280, 420):
            page = opened(browser.new_page(viewport={"width": width, "height": 800}))
            for name in PAGES:
                if name != "README.md":
                    path = Path(name).relative_to("docs").with_suffix(".html")
                    page.goto((tmp_path / path).as_uri())
                    assert page.evaluate("document.documentElement.scrollWidth") == width, name
        page = opened(browser.new_page(viewport={"width": 1280, "height": 800}))
        page.goto((tmp_path / "recipes" / "task.html").as_uri())
        page.click("input.md-search__input")
        page.keyboard.type("midpoint", delay=20)
        page.wait_for_selector(".md-search-result__item")
        browser.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
