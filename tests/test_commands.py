"""What the command says to programs and shells, and its commands for files."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
from test_cli import plain, refused, relp
from test_draw import make_nodes
from test_files import make_circuit, same
from test_scores import edge_scores
from typer.testing import CliRunner

from circuits import load, save
from circuits.cli import COMMANDS, app
from circuits.graph import size
from relp import Effects

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def answer(*arguments: Any) -> Any:
    """What a command prints with --json: nothing but JSON on stdout."""
    result = relp(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_every_command_has_an_example_that_it_would_take() -> None:
    """An example's options are read by the command itself, whose work is left out."""
    commands = typer.main.get_command(app)
    for function, example in COMMANDS.items():
        name = function.__name__
        words = shlex.split(example)
        assert words[:2] == ["relp", name]
        command = commands.commands[name]  # type: ignore[attr-defined]
        command.make_context(name, words[2:])
        shown = " ".join(plain(relp(name, "--help").output).split())
        assert "--json" in shown and f"Example: {words[0]} {name}" in shown


def test_tasks_models_and_coverage_answer_programs() -> None:
    tasks = {row["name"]: row for row in answer("tasks")["tasks"]}
    assert tasks["ioi"]["preferred"]["ioi-gpt2"] == 1.0 and "Indirect" in tasks["ioi"]["about"]
    assert tasks["docstring"]["preferred"]["ioi-gpt2"] is None  # which it has not the words for
    models = {row["name"]: row for row in answer("models")["models"]}
    assert models["ioi-gpt2"]["parameters"] > 1e6
    found = answer("coverage", "ioi-gpt2")
    assert found["covered"] == found["total"] == sum(op["count"] for op in found["operations"])


def test_a_mistake_prints_nothing_on_stdout() -> None:
    result = relp("coverage", "no/such/model", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: the model must be")
    assert relp("coverage", "--no-such-option").exit_code == 2


def test_a_circuit_is_drawn_in_any_format() -> None:
    save(circuit := make_circuit(edges=12), "c.json")
    assert answer("draw", "c.json") == {"files": ["c.svg"]}
    assert same(load("c.svg"), circuit)
    assert answer("draw", "c.json", "--edges", 5, "--out", "five.html", "--title", "Five")
    assert size(load("five.html")) <= 5 and "Five" in Path("five.html").read_text()
    assert answer("explore", "c.json") == {"files": ["c.html"]}
    assert same(load("c.html"), circuit)
    assert answer("export", "c.json", "c.csv")["files"] == ["c.csv"]


def test_scores_are_drawn_by_themselves_and_against_effects() -> None:
    make_nodes().save("scores.safetensors")
    make_nodes(Effects, seed=1, rules="exact").save("effects.safetensors")
    assert answer("draw", "scores.safetensors")["files"] == ["scores.html"]
    assert "plotly" in Path("scores.html").read_text()
    both = ("draw", "scores.safetensors", "--against", "effects.safetensors", "--out", "f.json")
    figure = json.loads(Path(answer(*both)["files"][0]).read_text())
    assert {trace["type"] for trace in figure["data"]} == {"scatter"}
    edge_scores(positions=True).save("edges.safetensors")
    assert answer("explore", "edges.safetensors", "--edges", 2, "--out", "p.html")
    assert size(load("p.html")) <= 2


def test_what_cannot_be_drawn_is_one_sentence() -> None:
    save(make_circuit(edges=12), "c.json")
    make_nodes().save("scores.safetensors")
    edge_scores().save("edges.safetensors")
    save(make_circuit(edges=12), "page.html")
    before = Path("page.html").read_bytes()
    for said, *words in (
        ("a circuit must be drawn by itself", "draw", "c.json", "--kind", "head"),
        ("the file to write must be another", "draw", "c.json", "--out", "c.json"),
        ("the file to write must be another", "explore", "page.html", "--title", "Other"),
        (
            "the file to write must be another",
            "explore",
            "page.html",
            "--edges",
            "3",
            "--out",
            Path.cwd() / "page.html",
        ),
        ("what is read must be a file; there is no file 'no.json'", "draw", "no.json"),
        ("the file to write must end in one of .json", "draw", "c.json", "--out", "c.xyz"),
        (
            "the file to write must end in one of .json .svg .html .pdf .png; got 'c.dot'",
            "draw",
            "scores.safetensors",
            "--out",
            "c.dot",
        ),
        ("the file to write must lie in an existing folder", "export", "c.json", "no/c.dot"),
        ("of scores `--edges` must say how many", "explore", "edges.safetensors"),
        ("the file to write must end in one of .html", "explore", "c.json", "--out", "page.svg"),
    ):
        assert refused(*words).startswith(said)
    assert Path("page.html").read_bytes() == before


def test_tasks_and_rules_are_completed() -> None:
    """As bash asks: what may stand in place of the last word."""

    def completed(*words: str) -> list[str]:
        line = {"COMP_WORDS": " ".join(["relp", *words]), "COMP_CWORD": str(len(words))}
        asked = {"_RELP_COMPLETE": "complete_bash", **line}
        return CliRunner().invoke(app, [], env=asked, prog_name="relp").stdout.split()

    assert completed("exp") == ["explore", "export"]
    assert completed("discover", "ioi") == ["ioi", "ioi_abc"]
    assert completed("discover", "--rules", "RE") == ["RELP"]
    assert completed("discover", "--search", "g") == ["greedy"]
    assert completed("coverage", "smol") == ["smollm2-135m"]
    assert completed("bench", "--case", "sat") == ["saturation"]
    assert completed("compare", "--model", "ioi-") == ["ioi-gpt2", "ioi-llama"]
    assert "--install-completion" in plain(relp("--help").output)
