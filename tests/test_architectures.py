"""Tiny random models of many architectures, booted from folders in the hub's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import boot, random_task, save_tokenizer, state, warm

from circuits import assemble, faithfulness, patch, top
from relp import ATTN_LRP, CP_LRP, DEEPLIFT, GIM, GRADIENT, RELP, attribute

WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {**WIDE, "intermediate_size": 48}
GROUPED = {**GATED, "num_key_value_heads": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "GPTNeo": {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64,
        "attention_types": [[["global", "local"], 1]],
    },
    "GPTJ": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},  # parallel, one norm
    "GPTNeoX": {**GATED},  # parallel, two norms
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},  # ALiBi, its own GELU
    "Falcon": {**WIDE},  # parallel, multi-query
    "Phi": {**GATED},
    "Phi3": {**GROUPED},
    "Mistral": {**GROUPED},
    "Qwen2": {**GROUPED},
    "Qwen3": {**GROUPED, "head_dim": 8},  # QK-norm
    "Gemma": {**GATED, "num_key_value_heads": 1, "head_dim": 8},
    "Mixtral": {**GROUPED, "num_local_experts": 4},  # router, experts
    "Gemma2": {**GROUPED, "head_dim": 8},  # post-norm, soft-caps
    "Olmo2": {**GATED},  # post-norm only
}  # fmt: skip
ROUTED = ("Mixtral",)
POST_NORM = ("Gemma2", "Olmo2")
ONE_RUN = (GRADIENT, RELP, CP_LRP, ATTN_LRP, GIM)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[str, Any]:
    name = request.param
    folder: Path = tmp_path_factory.mktemp("architectures") / name.lower()
    size = save_tokenizer(folder)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=size, bos_token_id=0, eos_token_id=0, pad_token_id=0, **ARCHITECTURES[name]
    )
    torch.manual_seed(0)
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)
    return name, warm(boot(folder))


def test_nodes_under_every_preset(architecture: tuple[str, Any]) -> None:
    name, model = architecture
    task, before = random_task(model, pairs=3), state(model)
    plain = model(task.clean).detach()
    for rules in ONE_RUN:
        scores = attribute(model, task, rules=rules)
        assert scores.nodes is not None
        assert float(scores.nodes.abs().max()) > 0
    if name in ROUTED:
        with pytest.raises(ValueError, match=r"chooses differently|overwrites it in place"):
            attribute(model, task, rules=DEEPLIFT)
    else:
        scores = attribute(model, task, rules=DEEPLIFT)
        _, residual = scores.of_kind("resid")
        error = (residual.sum(-1) - scores.gap[:, None]).abs().max() / scores.gap.abs().max()
        assert float(error) < 1e-4
    assert state(model) == before
    assert torch.equal(model(task.clean), plain)


def test_edges_sum_to_nodes_and_circuits_are_faithful(architecture: tuple[str, Any]) -> None:
    name, model = architecture
    task = random_task(model, pairs=3)
    if name in POST_NORM:
        with pytest.raises(ValueError, match=r"\(post-norm\); use level='node'"):
            attribute(model, task, level="edge")
        return
    for rules in (GRADIENT, RELP):
        nodes = attribute(model, task, rules=rules)
        edges = attribute(model, task, rules=rules, level="edge")
        assert nodes.nodes is not None and edges.edges is not None
        at = [nodes.components.index(w) for w in edges.writers]
        expected = nodes.nodes.mean(0).sum(-1)[at]
        error = (edges.edges.sum(1) - expected).abs().max() / expected.abs().max()
        assert float(error) < 1e-4
    graph = assemble(edges)
    shares = faithfulness(model, task, [graph, top(graph, edges=0)], progress=False)
    assert shares == pytest.approx([1, 0], abs=1e-4)


def test_patching_everything_closes_the_gap(architecture: tuple[str, Any]) -> None:
    """Only the last token differs, so patching block 1's input there is the whole other run."""
    _, model = architecture
    task = random_task(model, pairs=2, length=5)
    same = task.clean.clone()
    same[:, -1] = task.corrupt[:, -1]
    task = type(task).from_tokens(task.clean, same, task.answers, task.foils)
    before = state(model)
    effects = patch(model, task, components=["resid"], progress=False)
    assert effects.nodes is not None
    for layer in range(2):
        torch.testing.assert_close(effects.nodes[:, layer, -1], effects.gap, rtol=1e-3, atol=1e-6)
        assert torch.equal(effects.nodes[:, layer, :-1], torch.zeros(2, 4))
    assert state(model) == before
