"""The examples of the docstrings, as a reader of the README would type them."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import state
from test_house import MODULES, PACKAGES, ROOMS, SOURCES
from test_tasks import byte_level

import circuits
import relp
import tasks

SHOWN = dict(zip(MODULES, (">>> " in path.read_text() for path in SOURCES.values()), strict=True))
pytestmark = pytest.mark.usefixtures("annotations_unchecked")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL


class Checker(doctest.OutputChecker):
    """What an example shows must come; what it does not show may."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


@pytest.fixture(scope="module")
def known(annotations_unchecked: None) -> dict[str, Any]:
    """What somebody has who typed the README's first block, with few pairs."""
    names = {n: getattr(room, n) for room in (relp, circuits, tasks) for n in room.__all__}
    model = tasks.zoo.load("ioi-gpt2")
    task = tasks.ioi(model.tokenizer, pairs=4)
    edges = relp.attribute(model, task, level="edge")
    return names | {
        "torch": torch,
        "model": model,
        "tokenizer": byte_level(),  # has the words of every task, as the shipped ones have not
        "task": task,
        "scores": relp.attribute(model, task),
        "edges": edges,
        "effect": circuits.patch(model, task, progress=False),
        "circuit": circuits.top(edges, edges=200),
        "dictionaries": {
            s: relp.load_dictionary(path)
            for s, path in tasks.zoo.dictionaries("ioi-gpt2").items()
            if s in ("L1.mlp", "L2.resid")
        },  # fmt: skip
    }


@pytest.mark.parametrize("name", [name for name, shown in SHOWN.items() if shown])
def test_examples_run(
    name: str, known: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before, said = state(known["model"]), list[str]()
    runner = doctest.DocTestRunner(Checker(), optionflags=FLAGS)
    found = doctest.DocTestFinder(exclude_empty=True).find(
        importlib.import_module(name), globs=known
    )
    assert any(example.examples for example in found)
    for example in found:
        runner.run(example, out=said.append)
    assert not runner.summarize(verbose=False).failed, "".join(said)
    assert state(known["model"]) == before


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_function_and_class_has_an_example(package: str) -> None:
    module = importlib.import_module(package)
    values = {name: getattr(module, name) for name in module.__all__}
    without = [
        name
        for name, value in values.items()
        if (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__.partition(".")[0] in ROOMS  # a protocol is Any when it runs
        and ">>> " not in (inspect.getdoc(value) or "")
    ]
    assert without == []
