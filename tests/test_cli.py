"""The `relp` command, from end to end on a tiny model, and what it says when it cannot."""

import errno
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import sleep
from typing import Any

import networkx as nx
import pandas as pd
import pytest
import torch
from conftest import boot
from filelock import FileLock
from rich.console import Console
from test_files import make_circuit, same
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner, Result

import circuits
from circuits import acdc, cli, connect, load, patch, save, top
from circuits.choices import SUFFIXES
from circuits.cli import app
from circuits.cli.estimates import SHOWN
from circuits.cli.screen import one_line_errors, print_table
from circuits.cli.source import source_of
from circuits.draw.heatmaps import lined_up
from circuits.graph import size
from relp import PRESETS, RELP, Scores, attribute
from relp.bridge.rerun import Rerun
from tasks import Task, ioi
from tasks.registry import TASKS

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
        rows = [line for line in said.splitlines() if re.search(rf"^\W*{kind}\b", line)]
        assert [re.findall(r"\w+", row)[1] for row in rows] == list(SHOWN)
        for row in rows:  # r, r without the largest, ρ, signs, error, overlap, cells
            assert len(re.findall(rf"–|{NUMBER}\*?|\b\d+\b", row.split(kind)[1])) >= 7
    circuit = load(out / "ioi.json")
    # 2 layers, 2 heads: q k v of 4 heads read 1 and 4 writers, the MLPs 3 and 6, logits 7
    assert re.search(
        rf"^circuit by RELP: {size(circuit)} of 46 edges \({size(circuit) / 46:.1%}\), "
        rf"{circuit.number_of_nodes()} nodes, faithfulness {NUMBER}$",
        said,
        re.M,
    )
    wrote = [line.removeprefix("wrote ") for line in said.splitlines() if "wrote" in line]
    assert wrote == [str(out / f"ioi.{suffix}") for suffix in ("json", "svg", "html")]


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


@pytest.mark.filterwarnings("ignore:the model must be able to do the task")
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


SWEEP = ("patch", "--pairs", 2, "--out", "e.safetensors")


def test_a_finished_sweep_is_kept(model: Path) -> None:
    Path("e.safetensors").write_text("mine")
    assert refused(*SWEEP, "--model", model) == (
        "`--out` must be a new file; 'e.safetensors' exists already; give another --out, or "
        "--overwrite"
    )
    assert Path("e.safetensors").read_text() == "mine"
    result = relp(*SWEEP, "--model", model, "--overwrite")
    assert result.exit_code == 0, result.output
    assert files(Path.cwd()) == ["e.safetensors"] and Scores.load("e.safetensors").level == "node"


def test_two_sweeps_do_not_write_one_file(model: Path) -> None:
    with FileLock("e.part.lock"):
        assert refused(*SWEEP, "--model", model) == (
            "`--out` must be a file that no other run writes; one is at work on 'e.safetensors'; "
            "wait for it, or give another --out"
        )
    Path("e.safetensors").write_text("")
    Path("e.part.lock").write_text("left by a run that was killed")
    assert relp(*SWEEP, "--model", model).stderr.startswith("error: `--out` must be a new file")
    assert files(Path.cwd()) == ["e.safetensors"]


def test_what_another_sweep_left_is_an_error(model: Path) -> None:
    bridge = boot(model)
    left = "e.part.safetensors"
    patch(bridge, ioi(bridge.tokenizer, pairs=2, seed=1), components=["embed"], resume=left)
    before = Path(left).read_bytes()
    for content, reason in (
        (before, rf"{left!r} differs in prompts: '\w+', now '\w+'"),
        (b"", rf"{left!r} is not \(.*\)"),
    ):
        Path(left).write_bytes(content)
        result = relp(*SWEEP, "--model", model)
        assert result.exit_code == 1 and files(Path.cwd()) == [left]
        assert re.fullmatch(
            rf"error: {left!r} must be what an interrupted run of the same options left; it is not "
            rf"\({reason}\); give the options of then, another `--out`, or delete the file",
            result.stderr.splitlines()[-1],
        )
        assert Path(left).read_bytes() == content


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_is_one_sentence(model: Path, number: int, monkeypatch: Any) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    result = relp(*SWEEP, "--model", model)
    assert result.exit_code == 1 and files(Path.cwd()) == []
    assert result.stderr.splitlines()[-1] == (
        "error: `--out` must be a place that can be written; 'e.safetensors' cannot "
        f"({os.strerror(number)}); make room there, or choose another"
    )


def test_a_read_only_folder_is_an_error(model: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != Path("runs"))
    Path("runs").mkdir()
    assert refused("discover", "--model", model) == (
        "`--out` must be a folder that can be written; 'runs/tiny' cannot ('runs' is read-only); "
        "choose another"
    )


def test_an_interrupted_sweep_says_how_to_go_on() -> None:
    """A real process and a real signal, which a test run in the background would ignore."""
    command = (*SWEEP[:2], 16, *SWEEP[3:])
    process = subprocess.Popen(
        [sys.executable, "-m", "relp", *map(str, command)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    left = Path("e.part.safetensors")
    while process.poll() is None and not left.exists():
        sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in said
    last = said.splitlines()[-1]
    found = re.fullmatch(
        rf"interrupted: (\d+)% of the effects are measured and kept in {str(left)!r}; run the same "
        "command again to go on",
        last,
    )
    assert found and int(found[1]) < 100
    assert files(Path.cwd()) == [str(left)]


def test_an_interruption_is_not_swallowed_by_a_finalizer(model: Path, monkeypatch: Any) -> None:
    class Garbage:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def swept(*args: Any, **options: Any) -> None:
        Garbage()
        for _ in range(200):
            sleep(0.02)

    monkeypatch.setattr(circuits, "patch", swept)
    # in the background, as a shell starts it, interruptions are ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = relp(*SWEEP, "--model", model)
        assert result.exit_code == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interruption_before_the_first_effect(model: Path, monkeypatch: Any) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    for command, kept in (
        (SWEEP, "nothing was measured yet; run the same command again"),
        (
            ("compare", "--pairs", 2),
            "files that were said to be written are whole, nothing else is kept",
        ),
    ):
        monkeypatch.setattr(circuits, "patch", interrupted)
        result = relp(*command, "--model", model)
        assert result.exit_code == 130 and files(Path.cwd()) == []
        assert result.stderr.splitlines()[-1] == f"interrupted: {kept}"


def test_a_circuit_is_kept_before_it_is_checked(model: Path, monkeypatch: Any) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(circuits, "patch", interrupted)
    result = relp("discover", "--model", model, "--pairs", 2, "--edges", 20)
    assert result.exit_code == 130 and "wrote runs/tiny/ioi.json\n" in result.stdout
    assert files(Path("runs/tiny")) == ["ioi.json"] and size(load("runs/tiny/ioi.json")) > 0


def test_an_interrupted_search_goes_on(model: Path, monkeypatch: Any) -> None:
    module = importlib.import_module("circuits.search.acdc")
    metrics, calls = module.circuit_metrics, []

    def interrupted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return metrics(*args, **options)

    monkeypatch.setattr(module, "circuit_metrics", interrupted)
    common = ("discover", "--model", model, "--pairs", 2, "--search", "acdc", "--out", "a", "--tau")
    result = relp(*common, 1e-4)
    assert result.exit_code == 130 and files(Path("a")) == ["ioi.part.json"]
    left = load("a/ioi.part.json")
    assert result.stderr.splitlines()[-1] == (
        f"interrupted: the search so far, {size(left)} edges that are not cut, is kept in "
        "'a/ioi.part.json'; run the same command again to go on, or delete that file to start anew"
    )
    asked = f"ioi --model {model} --pairs 2 --seed 0 --tau"
    other = relp(*common, 1e-3)
    assert other.exit_code == 1 and files(Path("a")) == ["ioi.part.json"]
    assert other.stderr.splitlines()[-1] == (
        "error: 'a/ioi.part.json' must be what an interrupted search of the same options left; it "
        f"is of '{asked} 0.0001', now '{asked} 0.001'; give the options of then, another `--out`, "
        "or delete the file"
    )
    again = relp(*common, 1e-4)
    assert again.exit_code == 0 and files(Path("a")) == ["ioi.html", "ioi.json", "ioi.svg"]
    took, bridge = len(calls), boot(model)
    whole = connect(acdc(bridge, ioi(bridge.tokenizer, pairs=2, seed=0), tau=1e-4, progress=False))
    assert took - 4 < len(calls) - took  # it went on, and did not begin again
    found = load("a/ioi.json")
    assert set(found.edges(keys=True)) == set(whole.edges(keys=True))
    assert found.graph == whole.graph


def test_compare_gives_both_tables(model: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("circuits.cli.screen.console", Console(width=100))
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


# -- prompts of one's own --------------------------------------------------------------------------


def prompts(name: str, rows: int, model: Path) -> None:
    """The first pairs of a task, as somebody would have typed them."""
    pairs = ioi(boot(model).tokenizer, pairs=rows)
    frame = pd.DataFrame([vars(pair) for pair in pairs])
    for side in ("answers", "foils"):
        frame[side] = [texts[0] for texts in frame[side]]
    frame = frame.drop(columns="spans")
    if name.endswith(".csv"):
        frame.to_csv(name, index=False)
    else:
        frame.to_json(name, orient="records", lines=True)


def test_a_file_of_prompts_is_a_task(model: Path) -> None:
    prompts("my [b] own.csv", 3, model)
    common = ("--model", model, "--pairs", 2)
    result = relp("discover", "my [b] own.csv", *common, "--edges", 20, "--out", "out")
    assert result.exit_code == 0, result.output
    assert files(Path("out")) == [f"my [b] own.{s}" for s in ("html", "json", "svg")]
    assert "'my [b] own.csv': the first 2 of 3 rows (--pairs)\n" in result.stdout
    assert "tiny on Task('my [b] own', 2 pairs, " in result.stdout
    circuit, bridge = load("out/my [b] own.json"), boot(model)
    task = Task.from_csv(bridge.tokenizer, "my [b] own.csv")[:2]
    edges = attribute(bridge, task, rules=RELP, level="edge")
    assert set(circuit.edges(keys=True)) == set(top(edges, edges=20).edges(keys=True))
    assert circuit.graph["task"] == "my [b] own"


def test_a_file_has_its_rows_shuffled_by_the_seed(model: Path) -> None:
    prompts("own.jsonl", 6, model)
    bridge = boot(model)
    whole = Task.from_jsonl(bridge.tokenizer, "own.jsonl")
    texts = [pair.clean for pair in whole]
    source = source_of("own.jsonl")
    first, again, other = (source.draw(bridge.tokenizer, 4, seed) for seed in (0, 0, 1))
    assert [p.clean for p in first] == [p.clean for p in again] == texts[:4]
    drawn = [p.clean for p in other]
    assert set(drawn) < set(texts) and drawn != texts[:4]
    for seed, used in ((0, first), (1, other)):
        left, which = source.others(bridge.tokenizer, 4, seed)
        assert {p.clean for p in left} == set(texts) - {p.clean for p in used}
        assert which == "2 other rows of 'own.jsonl'"
    assert [p.clean for p in source.draw(bridge.tokenizer, 99, 0)] == texts
    before = source.identity
    prompts("own.jsonl", 5, model)
    assert source_of("own.jsonl").identity != before


def test_compare_judges_circuits_on_other_rows(model: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("circuits.cli.screen.console", Console(width=100))
    prompts("own.csv", 4, model)
    result = relp("compare", "own.csv", "--model", model, "--pairs", 2)
    assert result.exit_code == 0, result.output
    assert "faithfulness by share of edges, on 2 other rows of 'own.csv'" in result.stdout
    prompts("own.csv", 2, model)
    result = relp("compare", "own.csv", "--model", model)
    assert result.exit_code == 0 and "'own.csv': all 2 rows\n" in result.stdout
    assert (
        "no circuits: 'own.csv' has no rows but those that the edges were scored on; give fewer "
        "--pairs, or more rows\n"
    ) in result.stdout


def test_patch_takes_a_file(model: Path) -> None:
    prompts("own.csv", 2, model)
    result = relp("patch", "own.csv", "--model", model, "--out", "e.safetensors")
    assert result.exit_code == 0, result.output
    bridge = boot(model)
    effect = patch(bridge, Task.from_csv(bridge.tokenizer, "own.csv"), progress=False)
    assert torch.equal(Scores.load("e.safetensors").nodes, effect.nodes)


@pytest.mark.parametrize("command", ["discover", "compare", "patch"])
def test_files_that_hold_no_prompts_are_errors(command: str) -> None:
    assert refused(command, "none.csv").endswith(
        ", or a file of prompts; there is no file 'none.csv'; check the path"
    )
    Path("a.csv").write_text("clean,corrupt,answer\na,b,c\n")
    assert refused(command, "a.csv") == (
        "'a.csv' must have a column foil or foils; it has clean, corrupt, answer; rename one, or "
        'say which it is: columns={"foil": …}'
    )
    Path("b.txt").write_text("a")
    assert refused(command, "b.txt") == (
        "a file of prompts must end in .csv or .jsonl; got 'b.txt'; save it as one of these, in "
        "UTF-8"
    )


def test_coverage_lists_operations_and_adds_up(model: Path) -> None:
    result = relp("coverage", model, "--rules", "CP_LRP")
    assert result.exit_code == 0, result.output
    (row,) = [line for line in result.stdout.splitlines() if re.search(r"^\W*softmax\b", line)]
    assert re.findall(r"\w+", row)[:3] == ["softmax", "softmax", "constant"]
    rows = re.findall(r"(\d+) +│\s*$", result.stdout, re.M)
    total = sum(map(int, rows))
    last = f"{total} of {total} operations that carry relevance have a rule (100.0%)"
    assert result.stdout.splitlines()[-1] == last


@pytest.mark.parametrize("width", [40, 60, 80, 100])
@pytest.mark.parametrize("columns", [2, 5, 8])
def test_no_table_cuts_a_number(width: int, columns: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("circuits.cli.screen.console", Console(width=width))
    rows = [[f"kind{i}", *(f"{i}.{k}89 ({k}.{i}7)" for k in range(columns))] for i in range(3)]
    names = [f"RULE_{k}[x]" for k in range(columns)]

    @cli.app.command(hidden=True)
    def table() -> None:
        print_table("a [b] title of more than forty letters, as they are", ["", *names], rows)

    try:
        said = relp("table").stdout
    finally:
        cli.app.registered_commands.pop()
    drawn = "━" in said
    assert drawn == (columns < {40: 5, 60: 5, 80: 8, 100: 8}[width])
    words = said.split()
    for row in rows:
        for word in " ".join(row).split():
            assert words.count(word) == 1
    for name in names:
        assert words.count(name) == (1 if drawn else 3)
    assert not drawn or max(map(len, said.splitlines())) <= width


def test_tasks_says_what_models_can_do() -> None:
    result = relp("tasks")
    assert result.exit_code == 0
    words = result.stdout.split()
    for name in (*TASKS, "smollm2-135m"):
        assert name in words
    assert "induction" in words and "84%" in words and "as measured before" in result.stdout
    now = relp("tasks", "--model", "ioi-gpt2")
    assert now.exit_code == 0 and "measured now" in now.stdout
    assert "84%" in now.stdout.split() and "smollm2-135m" not in now.stdout
    assert refused("tasks", "--model", "a/b/c").startswith("the model must be one of")


@pytest.mark.filterwarnings("always")
def test_who_cannot_do_a_task_is_told_first_and_right_pairs_can_be_kept() -> None:
    command = ("patch", "gendered_pronoun", "--pairs", 4, "--out", "e.safetensors")
    result = relp(*command)
    assert result.exit_code == 0 and plain(result.stderr).startswith(
        "warning: the model must be able to do the task, or circuits explain noise; it is right "
    )
    assert result.stdout.index("the answer is preferred in") < result.stdout.index("strongest: ")
    right = re.search(r"it is right on (\d) of 4 clean prompts", plain(result.stderr))
    assert right and 0 < int(right.group(1)) < 3
    kept = relp(*command, "--filter-correct", "--overwrite")
    assert kept.exit_code == 0, kept.output
    assert f"{right.group(1)} of 4 pairs are kept, on which the answer is" in kept.stdout
    assert "the answer is preferred in 100.0% of the clean prompts" in kept.stdout


def test_bench_judges_keeps_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine_for_the_command.py").write_text(
        "from relp import RELP, attribute\n"
        "def mine(model, task, level, direction):\n"
        "    return attribute(model, task, rules=RELP, level=level, direction=direction)\n"
    )
    own = "mine_for_the_command:mine"
    command = ("bench", "--case", "or_gate", "--method", "GRADIENT", "--method", own,
               "--pairs", 2, "--distractors", 1, "--out", "b")  # fmt: skip
    result = relp(*command)
    assert result.exit_code == 0, result.output
    assert "planted: mean over 1 cases" in result.stdout and "wrote b/bench.html" in result.stdout
    *common, mine = files(Path("b"))
    assert common == [
        "bench.csv", "bench.html", "bench.json", "bench.md", "or_gate", "or_gate/GRADIENT.json",
        "or_gate/effects.safetensors",
    ]  # fmt: skip
    assert re.fullmatch(r"or_gate/mine-[0-9a-f]{8}\.json", mine)  # another file, another entry
    table = pd.read_csv("b/bench.csv")
    assert set(table["method"]) == {"GRADIENT", "mine"} and set(table["case"]) == {"or_gate"}
    assert "| mine | 1.00 " in Path("b/bench.md").read_text()
    kept = [Path("b", name) for name in (*common[5:], mine)]
    before = [path.stat().st_mtime_ns for path in kept]
    assert relp(*command).exit_code == 0
    assert [path.stat().st_mtime_ns for path in kept] == before
    other = refused(*command, "--pairs", 3)
    assert other.startswith("`folder` must hold entries of the same options; 'b' has pairs 2 there")
    assert refused("bench", "--case", "no").startswith("`--case` must be a task or one of induct")
    assert refused("bench", "--method", "no").startswith("a method must be one of GRADIENT, ")


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
        f"the task must be one of {', '.join(TASKS)}; got '[red]'; `relp tasks` lists them"
    )


MODELS = (
    "the model must be one of ioi-gpt2, ioi-llama, smollm2-135m, a folder or GGUF file that holds "
    "one, or a name on the Hugging Face hub; "
)


@pytest.mark.parametrize(
    "name", ["./gpt2", "~/no such folder", "/none", "a/b/c", "gpt2/", "-x", "../gpt2", "a\\b"]
)
def test_a_folder_that_is_none_is_an_error(name: str) -> None:
    assert refused("coverage", "--", name) == (
        f"{MODELS}there is no folder {name!r}; check the path"
    )


def test_a_file_is_no_model() -> None:
    Path("model.safetensors").write_text("")
    assert refused("compare", "--model", "model.safetensors") == (
        f"{MODELS}'model.safetensors' is another file; give the folder that the model lies in"
    )


@pytest.mark.parametrize(
    ("missing", "mend"),
    [
        ("config.json", "save the model there with model.save_pretrained"),
        ("weights", "save the model there with model.save_pretrained"),
        ("tokenizer", "save its own there with tokenizer.save_pretrained"),
    ],
)
def test_a_model_without_a_part_is_an_error(model: Path, missing: str, mend: str) -> None:
    parts = {"config.json": "config", "weights": "model", "tokenizer": "token"}
    for file in model.iterdir():
        if not file.name.startswith((parts[missing], "generation")):
            Path(file.name).write_bytes(file.read_bytes())
    assert refused("compare", "--model", ".") == (
        "a model's folder must hold config.json, weights (*.safetensors or *.bin) and a "
        f"tokenizer; '.' has no {missing}; {mend}"
    )


def test_a_model_that_does_not_boot_is_an_error(model: Path) -> None:
    for file in model.iterdir():
        Path(file.name).write_bytes(file.read_bytes())
    Path("config.json").write_text("{}")
    result = relp("compare", "--model", ".")
    said = result.stderr.splitlines()[-1]
    assert said.startswith(f"error: {MODELS}'.' could not be booted (") and result.exit_code == 1
    assert said.endswith(
        "); check that TransformerBridge knows its architecture and that its files are whole"
    )


@pytest.mark.parametrize("name", ["gpt2", "models/gpt2"])
def test_a_model_that_is_not_fetched_is_an_error(name: str, monkeypatch: Any) -> None:
    def offline(name: str) -> None:
        raise OSError("\n We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr(TransformerBridge, "boot_transformers", offline)
    assert refused("compare", "--model", name) == (
        f"{MODELS}{name!r} is no folder here and could not be fetched (We couldn't connect to the "
        "hub.); check the spelling and the connection, or give the path of a folder"
    )


def test_a_folder_may_lie_below_home(model: Path, monkeypatch: Any) -> None:
    def boot_transformers(name: str) -> None:
        raise OSError(f"asked for {name}")

    monkeypatch.setenv("HOME", str(model.parent))
    monkeypatch.setattr(TransformerBridge, "boot_transformers", boot_transformers)
    assert f"'~/tiny' could not be booted (asked for {model})" in refused("coverage", "~/tiny")


def test_unknown_rules_are_an_error() -> None:
    assert refused("discover", "--rules", "LRP-0") == (
        "rules must be one of GRADIENT, RELP, CP_LRP, ATTN_LRP, GIM, DEEPLIFT, PARTWAY; "
        "got 'LRP-0'; build your own with Rules(...) or RELP.with_(...)"
    )


def test_a_file_in_the_way_of_the_output_is_an_error(model: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    for out, reason in (("taken", "File exists"), ("taken/deeper", "Not a directory")):
        assert refused("discover", "--model", model, "--pairs", 2, "--out", out) == (
            f"`--out` must be a folder that can be written; {out!r} cannot ({reason}); "
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
        (("--out", "none/e.safetensors"), "`--out` must lie in an existing folder; 'none' is none"),
    ):
        assert refused("patch", "--model", model, "--pairs", 2, *arguments).startswith(message)


def test_exports_that_cannot_be_made_are_errors() -> None:
    save(make_circuit(), "a.json")
    for option in ("--in-graph",), ("--model", "ioi-gpt2"):
        assert refused("export", "a.json", "b.svg", *option).startswith(
            "`--in-graph` is for reading .mib.json and `--model` for reading or writing it; got "
        )
    assert refused("export", "a.json", "b.jpg") == (
        f"the file to write must end in one of {' '.join(SUFFIXES)}; got 'b.jpg'; choose another "
        "name"
    )
    assert refused("export", "a.json", "none/b.svg") == (
        "the file to write must lie in an existing folder; 'none' is none; create it first"
    )
    assert refused("export", "none.json", "b.svg") == (
        "what is read must be a file; there is no file 'none.json'; check the name"
    )
    Path("scores.json").write_text('{"nodes": []}')
    message = refused("export", "scores.json", "b.svg")
    assert message.startswith("'scores.json' must be a circuit written by circuits.save; it is not")
    Path("a.mmd").write_text("graph LR")
    assert "got 'a.mmd'; .mmd can only be written" in refused("export", "a.mmd", "b.svg")


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    shown = warnings.showwarning
    with one_line_errors():
        warnings.warn("the model [a] must " + 30 * "be able ", stacklevel=2)
    assert capsys.readouterr().err == f"warning: the model [a] must {30 * 'be able '}\n"
    assert warnings.showwarning is shown


def test_a_search_that_measures_has_no_rules() -> None:
    assert refused("discover", "--search", "acdc", "--tau", 1, "--rules", "gim") == (
        "`--rules` must go with a search that ranks scores; --search acdc measures each edge; got "
        "--rules GIM; leave it out, or give --search top"
    )


@pytest.mark.filterwarnings("default")
def test_a_model_that_cannot_do_the_task_is_told_once_and_first(model: Path) -> None:
    result = relp("compare", "--model", model, "--pairs", 16, "--circuits")
    assert result.exit_code == 0, result.output
    (said,) = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert said.startswith(
        "warning: the model must be able to do the task, or circuits explain noise; it is right on "
        "8 of 16 clean prompts, and the gap in 'logit_difference'"
    )
    assert "filter_correct" in said


@pytest.mark.filterwarnings("default")
def test_only_pairs_that_are_answered_rightly_are_kept(model: Path) -> None:
    """Also among those that circuits are judged on."""
    result = relp("compare", "--model", model, "--pairs", 16, "--filter-correct", "--circuits")
    assert result.exit_code == 0, result.output
    assert "8 of 16 pairs are kept, on which the answer is preferred" in result.stdout
    assert "the answer is preferred in 100.0% of the clean prompts" in result.stdout
    said = " ".join(result.stdout.split())
    assert re.search(r"the pairs of seed 1, the \d+ that are answered rightly", said)


def test_compare_draws_what_it_prints(model: Path) -> None:
    result = relp("compare", "--model", model, "--pairs", 2, "--no-circuits", "--out", "pictures")
    assert result.exit_code == 0, result.output
    assert files(Path("pictures")) == [f"compare.{s}" for s in ("csv", "html", "md", "tex")]
    assert len(pd.read_csv("pictures/compare.csv")) == 5 * 8  # kinds by estimates
    assert "| rules | kind |" in Path("pictures/compare.md").read_text().replace(" Pearson", "|")
    assert "\\begin{tabular}" in Path("pictures/compare.tex").read_text()
    assert "faithfulness" not in result.stdout
    page = Path("pictures/compare.html").read_text()
    assert "wrote pictures/compare.html" in result.stdout
    for text in ("GRADIENT (10 steps)", "PARTWAY", "Spearman", "right signs", "tiny"):
        assert text in page and (text in result.stdout or text in ("Spearman", "right signs"))


@pytest.mark.parametrize("option", ["--edges", "--pairs"])
def test_counts_below_one_are_wrong_usage(option: str) -> None:
    result = relp("discover", option, 0)
    assert result.exit_code == 2 and option in plain(result.stderr) and files(Path.cwd()) == []


def test_large_models_are_verified_within_a_budget(model: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("circuits.cli.cases.LARGE", 0)
    monkeypatch.setattr("circuits.exact.verify.BUDGET", 20)
    result = relp("compare", "--model", model, "--pairs", 2)
    assert result.exit_code == 0, result.output
    (said,) = [line for line in result.stdout.splitlines() if line.startswith("measured ")]
    assert re.match(r"measured 20 of \d+ cells that change anything: for each kind half", said)
    assert re.search(r"^not measured, but .* at most \d+ of \d+ \w+ cells", result.stdout, re.M)
    whole = relp("compare", "--model", model, "--pairs", 2, "--exact")
    assert whole.exit_code == 0 and "measured" not in whole.stdout


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:the model must be able to do the task")
def test_verify_measures_a_sample(model: Path) -> None:
    words = ("verify", "ioi", "--model", model, "--pairs", 2, "--budget", 22)
    words += ("--out", "e.safetensors")
    result = relp(*words, "--json")
    found, effect = json.loads(result.stdout), Scores.load("e.safetensors")
    assert effect.strata is not None and found["files"] == ["e.safetensors"]
    assert {row["rules"] for row in found["agreement"]} >= {"GRADIENT", "RELP"}
    assert found["missed"] and len(found["strongest"]) > 5
    assert refused(*words).startswith("`--out` must be a new file")


def test_shards_from_the_command_line(model: Path, tmp_path: Path) -> None:
    of = ("ioi", "--model", model, "--pairs", 2)
    for i in (1, 2, 3):
        part = relp("patch", *of, "--shard", f"{i}/3", "--out", f"part{i}.safetensors")
        assert part.exit_code == 0 and f"exact, shard {i}/3" in part.output, part.output
    merged = relp("merge", *tmp_path.glob("part*"), "--out", "merged.safetensors")
    assert merged.exit_code == 0 and "wrote merged.safetensors" in merged.output
    assert relp("patch", *of, "--out", "whole.safetensors").exit_code == 0
    one, other = (Scores.load(f"{name}.safetensors") for name in ("merged", "whole"))
    torch.testing.assert_close(one.nodes, other.nodes, rtol=1e-5, atol=2e-6)
    assert one.provenance == other.provenance and one.tokens == other.tokens
    again = relp("merge", "part1.safetensors", "part3.safetensors")
    assert again.exit_code == 1 and "1 are missing, with" in again.output
    assert not (tmp_path / "effects.safetensors").exists()
    assert (
        "must be a new file"
        in relp("merge", "part1.safetensors", "--out", "whole.safetensors").output
    )
    assert "'none.safetensors' is none" in relp("merge", "none.safetensors").output
    sample = relp("verify", *of, "--budget", 60, "--shard", "1/2", "--out", "sample1.safetensors")
    assert sample.exit_code == 0 and "agreement" not in sample.output
    Path("part1.part.safetensors").touch()
    left = relp("merge", "part1.part.safetensors")
    assert left.exit_code == 1 and "'part1.part.safetensors' is what an inter" in left.output
    for command in ("patch", "verify"):
        wrong = relp(command, "ioi", "--shard", "4/3")
        assert wrong.exit_code == 1 and "… '16/16'; got '4/3'; count from 1" in wrong.output
