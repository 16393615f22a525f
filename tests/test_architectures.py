"""The claims that hold on every architecture: each is tiny, random, and in the table next door."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, DECODERS, Architecture, conservation, measure
from conftest import able_task, boot, random_task, state
from torch.nn.modules import module as hooks

from circuits import assemble, faithfulness, patch, top
from relp import (
    CP_LRP,
    DEEPLIFT,
    GRADIENT,
    PARTWAY,
    PRESETS,
    RELP,
    UnknownOperationError,
    attribute,
    propagate,
)
from relp.bridge.captures import capture
from relp.bridge.rerun import Rerun
from relp.bridge.sites import Sites

OPAQUE = ("LSTM",)
FROM_THE_START = ("OPT", "Mamba", "Mamba2")
"""Runs of these cannot begin at a later position: no keys and values, or positions and pairs are
one axis in the MLP."""
ROUTED = ("Mixtral", "Qwen3Moe", "GptOss", "DeepseekV2", "DeepseekV3")
HALVED = ("GPT2", "Gemma2", "Mamba")
IN_EACH_RUN = ("GPT2", "Llama", "Gemma2", "Mixtral", "DeepseekV3", "Mamba", "BERT", "VGG16", "LSTM")
"""What differs most; the others are long proofs."""
ONE_RUN_EACH = [r for r in PRESETS.values() if not r.partway]  # to `propagate` it is DEEPLIFT
each_preset = pytest.mark.parametrize("rules", ONE_RUN_EACH, ids=lambda r: r.name)


pytestmark = pytest.mark.usefixtures("annotations_unchecked")


def some(names: Iterable[str]) -> list[Any]:
    return [n if n in IN_EACH_RUN else pytest.param(n, marks=pytest.mark.long) for n in names]


@pytest.fixture(scope="module", params=some(ARCHITECTURES))
def built(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Architecture, Any, Path]:
    architecture = ARCHITECTURES[request.param]
    folder = tmp_path_factory.mktemp("architectures")
    return architecture, architecture.build(folder), folder


def everything(model: Any) -> tuple[Any, ...]:
    """`state`, and what a model does not own: global hooks, modes."""
    return (
        state(model),
        len(hooks._global_forward_hooks),
        len(hooks._global_forward_pre_hooks),
        torch._C._len_torch_function_stack(),
        torch.is_grad_enabled(),
    )


@each_preset
def test_every_operation_has_a_rule_and_the_forward_pass_is_torchs(
    built: tuple[Architecture, Any, Path], rules: Any
) -> None:
    architecture, model, _ = built
    before = everything(model)
    if architecture.name in OPAQUE and rules is not GRADIENT:
        with pytest.raises(UnknownOperationError, match="'lstm' before or in 'LSTM' hides its"):
            measure(model, architecture, rules)
        assert everything(model) == before
        return
    found = measure(model, architecture, rules)
    assert everything(model) == before
    assert found.same
    assert (found.covered == found.operations > 0) or architecture.name in OPAQUE
    assert found.coefficients.isfinite().all()
    assert found.coefficients.abs().max() > 0
    if rules is DEEPLIFT:
        assert found.completeness is not None
        assert found.completeness <= 1e-3


def test_relevance_is_conserved(built: tuple[Architecture, Any, Path]) -> None:
    """What the output holds arrives at the inputs, or stays at biases."""
    architecture, model, _ = built
    if architecture.name not in OPAQUE:
        assert conservation(model, architecture, CP_LRP) <= 1e-4


def test_a_model_is_as_before_after_an_error(built: tuple[Architecture, Any, Path]) -> None:
    architecture, model, _ = built
    before = everything(model)
    inputs = architecture.inputs(torch.Generator().manual_seed(0))

    def fail(*_: Any) -> None:
        raise KeyError("a hook of the caller's")

    handle = model.register_forward_hook(fail)
    with pytest.raises(KeyError), propagate(RELP, strict=False, root=model):
        model(**inputs)
    handle.remove()
    assert everything(model) == before


@pytest.mark.parametrize("built", HALVED, indirect=True)
def test_half_precision_gives_the_coefficients_of_single(
    built: tuple[Architecture, Any, Path],
) -> None:
    architecture, model, folder = built
    rounded = [boot(folder, dtype) for dtype in (torch.bfloat16, torch.float16)]
    for rules in ONE_RUN_EACH:
        full, *halves = (measure(m, architecture, rules).coefficients for m in (model, *rounded))
        for half in halves:
            assert half.isfinite().all()
            assert float(torch.corrcoef(torch.stack([full, half]))[0, 1]) >= 0.99


# -- through the front door ------------------------------------------------------------------------


@pytest.mark.parametrize("built", some(DECODERS), indirect=True)
def test_nodes(built: tuple[Architecture, Any, Path]) -> None:
    architecture, model, _ = built
    task, before = random_task(model, pairs=3), everything(model)
    plain = model(task.clean).detach()
    scores = attribute(model, task, rules=RELP)
    assert scores.nodes is not None
    assert float(scores.nodes.abs().max()) > 0
    if architecture.name not in ROUTED:
        scores = attribute(model, task, rules=DEEPLIFT)
        _, residual = scores.of_kind("resid")
        error = (residual.sum(-1) - scores.gap[:, None]).abs().max() / scores.gap.abs().max()
        assert float(error) < 1e-4
    assert everything(model) == before
    assert torch.equal(model(task.clean), plain)


@pytest.mark.parametrize("built", some(DECODERS), indirect=True)
def test_compared_with_itself_a_run_has_its_derivatives(
    built: tuple[Architecture, Any, Path],
) -> None:
    """PARTWAY takes derivatives and secants from one run: every secant has the right limit."""
    _, model, _ = built
    task, sites = random_task(model, pairs=2), Sites.of(model)
    names = tuple(site for c in sites.components for site in [sites.part(c)[0]])
    both = capture(sites, task, PARTWAY, names, own="corrupt")
    start = capture(sites, task, GRADIENT, names, own="corrupt")
    for name in dict.fromkeys(names):
        expected = start.coefficients[name]
        error = (both.slopes[name] - expected).abs().max() / expected.abs().max()
        assert float(error) < 1e-4, name


@pytest.mark.parametrize("built", some(DECODERS), indirect=True)
def test_edges_sum_to_nodes_and_circuits_are_faithful(
    built: tuple[Architecture, Any, Path],
) -> None:
    _, model, _ = built
    task = able_task(model, pairs=3)
    nodes = attribute(model, task)
    edges = attribute(model, task, level="edge")
    assert nodes.nodes is not None and edges.edges is not None
    at = [nodes.components.index(w) for w in edges.writers]
    expected = nodes.nodes.mean(0).sum(-1)[at]
    error = (edges.edges.sum(1) - expected).abs().max() / expected.abs().max()
    assert float(error) < 1e-4
    graph = assemble(edges)
    shares = faithfulness(model, task, [graph, top(graph, edges=0)], progress=False)
    assert shares == pytest.approx([1, 0], abs=1e-4)


@pytest.mark.parametrize("built", some(DECODERS), indirect=True)
def test_patching_everything_closes_the_gap(built: tuple[Architecture, Any, Path]) -> None:
    """Only the last token differs, so patching block 1's input there is the whole other run."""
    _, model, _ = built
    task = random_task(model, pairs=2, length=5)
    same = task.clean.clone()
    same[:, -1] = task.corrupt[:, -1]
    task = type(task).from_tokens(task.clean, same, task.answers, task.foils)
    before = everything(model)
    effects = patch(model, task, components=["resid"], progress=False)
    assert effects.nodes is not None
    for layer in range(2):
        torch.testing.assert_close(effects.nodes[:, layer, -1], effects.gap, rtol=1e-3, atol=1e-6)
        # experts get other batches of tokens, so their sums round differently
        assert float(effects.nodes[:, layer, :-1].abs().max()) < 1e-5
    assert everything(model) == before


@pytest.mark.parametrize("built", some([*DECODERS, "BERT"]), indirect=True)
def test_runs_begin_where_the_change_is(built: tuple[Architecture, Any, Path]) -> None:
    """The bridge hears of a cache by the name that this transformers has for it; no warning."""
    architecture, model, _ = built
    task, before = random_task(model, pairs=2, length=6), everything(model)
    rerun = Rerun.of(Sites.of(model), task, (), side="clean")
    later = architecture.name not in (*FROM_THE_START, "BERT")
    assert (len(rerun.past), rerun.start(4)) == ((2, 4) if later else (0, 0))
    assert everything(model) == before


@pytest.mark.parametrize("built", ["OPT"], indirect=True)
def test_a_pair_alone_is_patched_as_with_others(built: tuple[Architecture, Any, Path]) -> None:
    """One row, or one position, must not hide that an MLP takes both for one axis."""
    _, model, _ = built
    for length in (2, 5):
        task = random_task(model, pairs=2, length=length)
        both = patch(model, task, progress=False).nodes
        alone = patch(model, task.select([1]), progress=False).nodes
        assert both is not None and alone is not None
        torch.testing.assert_close(alone, both[1:], rtol=1e-3, atol=1e-5)
