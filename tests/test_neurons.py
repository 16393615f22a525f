"""MLP neurons as components of their own: as nodes, as ends of edges, and in circuits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_task
from test_edges import MODELS, build

from circuits import agreement, patch
from relp import DEEPLIFT, GRADIENT, RELP, Scores, attribute

# -- nodes -----------------------------------------------------------------------------------------


def test_a_neurons_score_is_its_activations_move_times_its_coefficient(tiny: Any) -> None:
    """Hooks, autograd, a product; no package code but the task's metric."""
    task = random_task(tiny, pairs=3, length=5)
    point = tiny.blocks[1].mlp.out.hook_in
    kept = []

    def run(tokens: torch.Tensor) -> torch.Tensor:
        handle = point.register_forward_hook(lambda _, __, value: kept.append(value))
        try:
            return task.metric(tiny(tokens)).sum()
        finally:
            handle.remove()

    run(task.clean)
    metric = run(task.corrupt)
    (c,) = torch.autograd.grad(metric, kept[1])
    expected = ((kept[0] - kept[1]) * c).detach()  # [pair, pos, neuron]
    found = attribute(tiny, task, rules=GRADIENT, components=["neuron", "L1.mlp", "L2H3"])
    names, scores = found.of_kind("neuron")
    assert names[0] == "L0N0" and len(names) == 3 * tiny.cfg.d_mlp
    assert {"L1.mlp", "L2H3"} == set(found.components) - set(names)
    at = [names.index(f"L1N{n}") for n in range(tiny.cfg.d_mlp)]
    torch.testing.assert_close(scores[:, at].mT, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scores[:, at].sum(1), found.of_kind("mlp")[1][:, 0])


def test_chosen_components_are_those_of_all(tiny: Any) -> None:
    task = random_task(tiny, pairs=3)
    every = attribute(tiny, task, rules=DEEPLIFT)
    assert every.nodes is not None
    for asked in (["L2H3", "L1.mlp", "embed", "L2H0"], ["head"], "resid"):
        some = attribute(tiny, task, rules=DEEPLIFT, components=asked, batch_size=2, progress=False)
        at = [every.components.index(c) for c in some.components]
        assert at == sorted(at) and some.nodes is not None
        torch.testing.assert_close(some.nodes, every.nodes[:, at], rtol=1e-4, atol=1e-6)


def test_behind_a_norm_neurons_sum_to_what_it_reads(tmp_path: Path) -> None:
    model = build("Gemma2", tmp_path, MODELS)
    task = random_task(model, pairs=2, length=4)
    point, kept = model.blocks[1].ln2_post.hook_in, []
    handle = point.register_forward_hook(lambda _, __, value: kept.append(value))
    try:
        metric = [task.metric(model(tokens)).sum() for tokens in (task.clean, task.corrupt)]
    finally:
        handle.remove()
    (c,) = torch.autograd.grad(metric[1], kept[1])
    expected = ((kept[0] - kept[1]) * c).sum(-1).detach().float()
    scores = attribute(model, task, rules=GRADIENT, components=["neuron", "mlp"])
    names, neurons = scores.of_kind("neuron")
    found = neurons[:, [name.startswith("L1") for name in names]].sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found, scores.of_kind("mlp")[1][:, 1], rtol=1e-2)


def test_neurons_agree_with_exact_effects_and_keep_their_names(tiny: Any, tmp_path: Path) -> None:
    task = random_task(tiny, pairs=2, length=4)
    asked = ["neuron", "L0.mlp"]
    scores = attribute(tiny, task, rules=RELP, components=asked)
    effect = patch(tiny, task, components=[f"L2N{n}" for n in range(24)], progress=False)
    (row,) = agreement(scores, effect).to_dict("records")
    assert row["kind"] == "neuron" and row["pearson"] > 0.5
    assert set(scores.top(500)["kind"]) == {"neuron", "mlp"}
    frame = scores.to_dataframe()
    one = frame[(frame["component"] == "L1N7") & (frame["pos"] == 2)]
    assert (one["layer"].item(), one["head"].item()) == (1, 7)
    column = scores.components.index("L1N7")
    assert one["score"].item() == pytest.approx(float(scores.mean[column, 2]))
    path = scores.save(tmp_path / "s.safetensors")
    assert Scores.load(path).components == scores.components


def test_components_are_of_nodes_and_neurons_of_edges(tiny: Any) -> None:
    task = random_task(tiny, pairs=2)
    for wrong in ({"components": ["head"], "level": "edge"}, {"neurons": ["L0N1"]}):
        with pytest.raises(ValueError, match="`components` is for node scores and `neurons` for "):
            attribute(tiny, task, **wrong)
    with pytest.raises(ValueError, match="got 'heads'; see Scores.components"):
        attribute(tiny, task, components=["heads"])
    with pytest.raises(ValueError, match="got 'none'"):
        attribute(tiny, task, components=[])
