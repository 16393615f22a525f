"""What the README says of the shipped models, measured."""

from __future__ import annotations

from typing import Any

import pytest

from circuits import agreement, assemble, faithfulness, patch, top
from circuits.graph import size
from relp import CP_LRP, DEEPLIFT, GRADIENT, RELP, attribute
from tasks import ioi

PRESETS = (GRADIENT, RELP, CP_LRP, DEEPLIFT)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_deeplift_follows_exact_patching(shipped: Any, seed: int) -> None:
    task = ioi(shipped.tokenizer, pairs=16, seed=seed)
    effects = patch(shipped, task, components=["resid", "mlp"], progress=False)
    table = agreement([attribute(shipped, task, rules=r) for r in PRESETS], effects)
    r = table.pivot(index="kind", columns="rules", values="pearson")
    assert list(r.columns) == sorted(p.name for p in PRESETS)
    assert (table["pairs"] == len(task)).all()
    assert r.loc["resid", "DEEPLIFT"] >= 0.97, r
    assert r.loc["mlp", "DEEPLIFT"] >= 0.97, r
    # and the gradient is the worse estimate of the residual stream: why the package exists
    assert r.loc["resid", "GRADIENT"] < r.loc["resid", "RELP"], r


def test_a_tenth_of_the_edges_does_the_task(shipped: Any) -> None:
    task = ioi(shipped.tokenizer, pairs=8, seed=0)
    graph = assemble(attribute(shipped, task, rules=RELP, level="edge"))
    circuit = top(graph, edges=size(graph) // 10)
    assert size(circuit) <= size(graph) // 10
    assert faithfulness(shipped, task, circuit) > 0.9
    # an equally large circuit of the worst edges does not
    worst = assemble(attribute(shipped, task, rules=RELP, level="edge"))
    for _, _, data in worst.edges(data=True):
        data["score"] = 1 / (1e-9 + abs(data["score"])) if not data["structural"] else 0.0
    assert faithfulness(shipped, task, top(worst, edges=size(graph) // 10)) < 0.5
