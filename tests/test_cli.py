"""The `relp` command, from end to end on a tiny model, and what it says when it cannot."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from conftest import boot
from test_export import make_circuit, same
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner, Result

from circuits import load, patch, save
from circuits.cli import SHOWN, app
from circuits.draw import lined_up
from circuits.graph import size
from circuits.rerun import Rerun
from relp import PRESETS, Scores
from tasks import ioi, zoo

NUMBER = r"-?\d+\.\d{3}"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default output folders are relative, so that nothing lands in the repository."""
    monkeypatch.chdir(tmp_path)


def relp(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def plain(text: str) -> str:
    """Without the colours that typer adds to its own help and errors, for instance on CI."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.fixture(scope="module")
def model(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers and the shared model's tokenizer: few cells to patch."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((gpt2_folder / name).read_bytes())
    shape = GPT2Config.from_pretrained(gpt2_folder)
    shape.n_layer, shape.n_head = 2, 2
    torch.manual_seed(714)  # right on the pairs of either seed, if only by chance
    GPT2LMHeadModel(shape).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def discovered(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    out = (
        tmp_path_factory.mktemp("out") / "a[b] folder with a long name" / "that does not exist yet"
    )
    return relp("discover", "ioi", "--model", model, "--pairs", 2, "--edges", 20, "--out", out), out


def test_discover_writes_one_circuit_in_three_forms(discovered: tuple[Result, Path]) -> None:
    result, out = discovered
    assert result.exit_code == 0, result.output
    assert files(out) == ["ioi.html", "ioi.json", "ioi.svg"]
    circuits = [load(out / name) for name in files(out)]
    assert all(same(one, other) for one, other in pairwise(circuits))
    circuit = circuits[0]
    assert 0 < size(circuit) <= 20 and nx.has_path(circuit, "embed", "logits")
    labels = {k: circuit.graph[k] for k in ("task", "rules", "direction", "metric")}
    assert labels == {
        "task": "ioi",
        "rules": "RELP",
        "direction": "denoise",
        "metric": "logit_difference",
    }
    for name in ("ioi.svg", "ioi.html"):
        assert "ioi circuit of tiny · RELP · " in (out / name).read_text()


def test_discover_says_what_it_found(discovered: tuple[Result, Path]) -> None:
    result, out = discovered
    said = result.stdout
    assert re.search(r"^tiny on Task\('ioi', 2 pairs, \d+ tokens, .*'end'\]\)$", said, re.M)
    assert re.search(rf"^logit_difference: clean {NUMBER}, corrupt {NUMBER}; ", said, re.M)
    for kind in ("embed", "resid", "head", "attn", "mlp"):
        (row,) = [line for line in said.splitlines() if re.search(rf"^\W*{kind}\b", line)]
        assert len(re.findall(rf"(?:–|{NUMBER}) \(\d+\.\d\d\)", row)) == len(SHOWN) == 4
    assert re.search(r"\W+".join(("kind", "GRADIENT", "RELP", "CP_LRP", "DEEPLIFT")), said)
    circuit = load(out / "ioi.json")
    # 2 layers, 2 heads: q k v of 4 heads read 1 and 4 writers, the MLPs 3 and 6, logits 7
    assert re.search(
        rf"^circuit by RELP: {size(circuit)} of 46 edges \({size(circuit) / 46:.1%}\), "
        rf"{circuit.number_of_nodes()} nodes, faithfulness {NUMBER}$",
        said,
        re.M,
    )
    wrote = [line.removeprefix("wrote ") for line in said.splitlines() if "wrote" in line]
    assert wrote == [str(out / f"ioi.{suffix}") for suffix in ("html", "svg", "json")]


def test_discover_searches_as_it_is_told(model: Path) -> None:
    common = ("discover", "--model", model, "--pairs", 2, "--out")
    greedily = relp(*common, "g", "--search", "greedy", "--edges", 20)
    assert greedily.exit_code == 0, greedily.output
    assert "circuit by RELP, greedy: " in greedily.stdout and 0 < size(load("g/ioi.json")) <= 20
    exactly = relp(*common, "a", "--search", "acdc", "--tau", 1e-4)
    assert exactly.exit_code == 0, exactly.output
    circuit = load("a/ioi.json")
    assert f"circuit by ACDC tau=0.0001: {size(circuit)} of 46 edges" in exactly.stdout
    assert 0 < size(circuit) < 46 and nx.has_path(circuit, "embed", "logits")


@pytest.mark.parametrize(("level", "column"), [("node", "component"), ("edge", "writer")])
def test_patch_writes_exact_effects_and_goes_on(
    model: Path, level: str, column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = boot(model)
    task = ioi(bridge.tokenizer, pairs=2, seed=3)
    options: dict[str, Any] = {"level": level, "direction": "noise", "ablation": "mean"}
    expected = patch(bridge, task, resume="e.part.safetensors", **options)
    monkeypatch.setattr(Rerun, "__call__", None)  # all is measured: nothing may run again
    result = relp(
        *("patch", "--model", model, "--level", level, "--pairs", 2, "--seed", 3),
        *("--direction", "noise", "--ablation", "mean", "--out", "e.safetensors"),
    )
    assert result.exit_code == 0, result.output
    assert files(Path.cwd()) == ["e.safetensors"]
    found = Scores.load("e.safetensors")
    pairs = [(found.nodes, expected.nodes), (found.edges, expected.edges)]
    assert all(a is b or torch.equal(a, b) for a, b in pairs)
    shown = lined_up(expected) if level == "node" else expected
    first = shown.top(1).iloc[0]
    assert re.search(rf"{column}\W.*effect", result.stdout)
    assert re.search(rf"\W{re.escape(first[column])}\W.*\W{first['effect']:.3f}\W", result.stdout)
    assert result.stdout.endswith("wrote e.safetensors\n")


def test_compare_gives_both_tables(model: Path) -> None:
    result = relp("compare", "--model", model, "--pairs", 2)
    assert result.exit_code == 0, result.output
    before, after = result.stdout.split("faithfulness by share of edges, on the pairs of seed 1")
    assert "agreement with exact patching" in before
    shares = ("0.2", "0.5", "1.0", "2.0", "5.0")
    assert re.search(r"\W+".join(("rules", "CPR", "CMD", *map(re.escape, shares))), after)
    for rules in (*PRESETS, "random"):
        (row,) = [line for line in after.splitlines() if re.search(rf"^\W*{rules}\b", line)]
        assert len(re.findall(NUMBER, row)) == 7
    assert files(Path.cwd()) == []


def test_coverage_lists_operations_and_adds_up(model: Path) -> None:
    result = relp("coverage", model, "--rules", "CP_LRP")
    assert result.exit_code == 0, result.output
    (row,) = [line for line in result.stdout.splitlines() if re.search(r"^\W*softmax\b", line)]
    assert re.findall(r"\w+", row)[:3] == ["softmax", "softmax", "constant"]
    rows = re.findall(r"(\d+) +│\s*$", result.stdout, re.M)
    total = sum(map(int, rows))
    last = f"{total} of {total} operations that carry relevance have a rule (100.0%)"
    assert result.stdout.splitlines()[-1] == last


def test_tasks_lists_tasks_and_models() -> None:
    result = relp("tasks")
    assert result.exit_code == 0
    for name in ("ioi", *zoo.names()):
        assert re.search(rf"^\W*{name}\s", result.stdout, re.M)
    assert zoo.names() == ["ioi-gpt2", "ioi-llama"]


def test_export_there_and_back() -> None:
    circuit = make_circuit()
    save(circuit, "a.json")
    for source, target in (("a.json", "b[1].svg"), ("b[1].svg", "c.json"), ("c.json", "d.mmd")):
        result = relp("export", source, target)
        assert (result.exit_code, result.output) == (0, f"wrote {target}\n")
    assert same(load("c.json"), circuit)
    assert Path("a.json").read_bytes() == Path("c.json").read_bytes()


def test_export_to_other_libraries_and_back(discovered: tuple[Result, Path], model: Path) -> None:
    source = discovered[1] / "ioi.json"
    for arguments in (
        (source, "c.mib.json", "--model", model),
        ("c.mib.json", "all.json"),
        ("c.mib.json", "marked.json", "--in-graph", "--model", model),
    ):
        result = relp("export", *arguments)
        assert (result.exit_code, result.stdout) == (0, f"wrote {arguments[1]}\n")
    circuit, whole, marked = (load(p) for p in (source, "all.json", "marked.json"))
    assert size(whole) == 46 and set(json.loads(Path("c.mib.json").read_text())) >= {"cfg", "edges"}
    assert set(marked.edges(keys=True)) == set(circuit.edges(keys=True))
    for edge in circuit.edges(keys=True):
        assert marked.edges[edge]["score"] == pytest.approx(circuit.edges[edge]["score"])


def test_help_tells_where_files_go() -> None:
    said = " ".join(plain(relp("discover", "--help").output).replace("│", " ").split())
    assert "if not given, runs/MODEL" in said


# -- errors ----------------------------------------------------------------------------------------


def refused(*arguments: Any) -> str:
    """The one sentence on stderr; nothing else is printed or written."""
    before = files(Path.cwd())
    result = relp(*arguments)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert result.stdout == "" and files(Path.cwd()) == before
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert result.stderr.count("error:") == 1 and last.startswith("error: ")
    return last.removeprefix("error: ")


@pytest.mark.parametrize("command", ["discover", "compare"])
def test_an_unknown_task_is_an_error(command: str) -> None:
    assert refused(command, "[red]") == (
        "the task must be one of ioi; got '[red]'; `relp tasks` lists them"
    )


@pytest.mark.parametrize("command", ["discover", "compare"])
def test_an_unknown_model_is_an_error(command: str, tmp_path: Path) -> None:
    folder = tmp_path / "no model"
    folder.mkdir()
    message = refused(command, "--model", folder)
    assert message.startswith(
        "the model must be one of ioi-gpt2, ioi-llama, or a name or folder that TransformerBridge "
        f"can boot; {str(folder)!r} could not be booted ("
    )
    assert message.endswith(
        "; check the spelling, or that the folder has config.json, weights and a saved tokenizer"
    )


def test_unknown_rules_are_an_error() -> None:
    assert refused("discover", "--rules", "LRP-0") == (
        "rules must be one of GRADIENT, RELP, CP_LRP, ATTN_LRP, GIM, DEEPLIFT; got 'LRP-0'; "
        "build your own with Rules(...) or RELP.with_(...)"
    )


def test_a_file_in_the_way_of_the_output_is_an_error(model: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    for out, reason in (("taken", "File exists"), ("taken/deeper", "Not a directory")):
        assert refused("discover", "--model", model, "--pairs", 2, "--out", out) == (
            f"`--out` must be a folder that can be written; {out!r} cannot be made ({reason}); "
            "choose another"
        )
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_model_that_cannot_do_the_task_leaves_no_folder(model: Path, tmp_path: Path) -> None:
    """A tokenizer that knows no names: the error comes before the output folder."""
    folder = tmp_path / "nameless"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = refused("discover", "--model", folder)
    assert message.startswith("the tokenizer must keep at least 5 of 64 common names as one token")


def test_a_search_gets_its_own_option() -> None:
    assert refused("discover", "--search", "best").startswith(
        "`--search` must be one of top, greedy, acdc; got 'best'; "
    )
    for arguments, got in (
        (("--search", "acdc"), "--search acdc with --edges None and --tau None"),
        (("--search", "acdc", "--tau", 1, "--edges", 9), "acdc with --edges 9 and --tau 1.0"),
        (("--tau", 1), "--search top with --edges None and --tau 1.0"),
    ):
        assert got in refused("discover", *arguments)


def test_a_search_that_finds_nothing_is_an_error(model: Path) -> None:
    result = relp("discover", "--model", model, "--pairs", 2, "--out", ".", "--edges", 1)
    assert result.exit_code == 1 and files(Path.cwd()) == []
    assert result.stderr.splitlines()[-1] == (
        "error: the circuit must connect the embedding to the logits; what top found with "
        "--edges 1 does not; give more edges"
    )


def test_effects_that_cannot_be_written_or_measured(model: Path) -> None:
    assert refused("patch", "--out", "e.json") == (
        "`--out` must be a .safetensors file; got 'e.json'; change the suffix"
    )
    for arguments, message in (
        (("--level", "nodes"), "`level` must be 'node' or 'edge'; got 'nodes'"),
        (("--ablation", "one"), "`ablation` must be one of"),
        (("--out", "none/e.safetensors"), "`path` must lie in an existing folder; 'none' is none"),
    ):
        result = relp("patch", "--model", model, "--pairs", 2, *arguments)
        assert result.exit_code == 1 and files(Path.cwd()) == []
        assert result.stderr.splitlines()[-1].startswith(f"error: {message}")


def test_exports_that_cannot_be_made_are_errors() -> None:
    save(make_circuit(), "a.json")
    for option in ("--in-graph",), ("--model", "ioi-gpt2"):
        assert refused("export", "a.json", "b.svg", *option).startswith(
            "`--in-graph` is for reading .mib.json and `--model` for reading or writing it; got "
        )
    assert refused("export", "a.json", "b.png") == (
        "the suffix must be one of .json .graphml .gexf .dot .svg .html .mmd .mib.json; got "
        "'b.png'; choose another name"
    )
    assert refused("export", "a.json", "none/b.svg") == (
        "`path` must lie in an existing folder; 'none' is none; create it first"
    )
    assert refused("export", "none.json", "b.svg") == (
        "`path` must be a circuit's file; there is no file 'none.json'; check the name"
    )
    Path("scores.json").write_text('{"nodes": []}')
    message = refused("export", "scores.json", "b.svg")
    assert message.startswith("'scores.json' must be a circuit written by circuits.save; it is not")
    Path("a.mmd").write_text("graph LR")
    assert "got 'a.mmd'; .mmd can only be written" in refused("export", "a.mmd", "b.svg")


@pytest.mark.parametrize("option", ["--edges", "--pairs"])
def test_counts_below_one_are_wrong_usage(option: str) -> None:
    result = relp("discover", option, 0)
    assert result.exit_code == 2 and option in plain(result.stderr) and files(Path.cwd()) == []
