"""A model that is linear in all that is patched: scores are the exact effects, cell by cell.

First-order estimates are exact where nothing is of higher order. Such a model, with all its parts
at work: a norm whose ε is huge beside any variance only takes the mean off and scales; ReLUs whose
inputs are large and positive hand them on; and queries and keys read some entries of the stream
that all tokens have alike and nobody writes to, so that attention patterns are far from uniform,
but the same in every run. (So no patch of an edge into q or k does anything, and their scores must
be 0 although coefficients do arrive there.) What is left for a score to be wrong in is its sign,
its sums, its place in the table, and the rules: each of them is exact here, whatever it does
elsewhere. Left out are those that halve the products with a constant pattern (`ATTN_LRP`, `GIM`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from conftest import boot, random_task, save_tokenizer, warm
from torch import Tensor

from circuits import patch
from relp import CP_LRP, DEEPLIFT, GRADIENT, RELP, Scores, attribute
from relp.bridge import Sites, bias, weight

EPS = 1e12
LIFT = 30.0
FIXED = 6
"""Entries of the stream that all tokens have alike; queries and keys read no others."""
WIDE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": "relu"}
MODELS: dict[str, dict[str, Any]] = {
    "GPT2": {
        "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 16, "activation_function": "relu",
        "layer_norm_epsilon": EPS,
    },
    # grouped queries, rotary positions
    "Starcoder2": {
        **WIDE, "intermediate_size": 48, "num_key_value_heads": 2, "norm_epsilon": EPS,
    },
    # attention and MLP in parallel, with a norm each
    "GPTNeoX": {**WIDE, "intermediate_size": 48, "layer_norm_eps": EPS},
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("linear")
    ids = {"vocab_size": save_tokenizer(folder), "bos_token_id": 0, "eos_token_id": 0}
    config = getattr(transformers, f"{request.param}Config")(**ids, **MODELS[request.param])
    head = {"GPT2": "LMHeadModel"}.get(request.param, "ForCausalLM")
    torch.manual_seed(0)
    getattr(transformers, f"{request.param}{head}")(config).save_pretrained(folder)
    bridge = warm(boot(folder, torch.float64))
    blocks = Sites.of(bridge).blocks
    with torch.no_grad():
        for parameter in bridge.parameters():
            parameter.normal_(0, 0.2)
        tokens = bridge.embed.weight
        tokens[:, :FIXED] = tokens[0, :FIXED]
        tokens[:, FIXED:] -= tokens[:, FIXED:].mean(1, keepdim=True)
        for norm in (*(m.norm for b in blocks for m in b.modules), bridge.ln_final):
            norm.original_component.weight.normal_(1.0, 0.3).mul_(EPS**0.5)
            norm.config.eps = EPS  # a bridge that computes the norm itself overlooks the model's
        for block in blocks:
            mlp = bridge.blocks[block.layer].mlp
            queries, keys, _ = (slot.through[0].module for slot in block.mixer.slots)
            for matrix in (weight(queries), weight(keys)):
                matrix[:, FIXED:] = 0
                matrix *= 8  # patterns far from uniform
            for matrix in (weight(block.mixer.out.module), weight(mlp.out)):
                matrix[:FIXED] = 0
                matrix[FIXED:] -= matrix[FIXED:].mean(0)  # what a norm takes off stays the same
            bias(getattr(mlp, "in")).add_(LIFT)
            bias(mlp.out).sub_(LIFT * weight(mlp.out).sum(1))
    return bridge


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("level", ["node", "edge"])
def test_every_score_is_the_exact_effect(model: Any, level: str, direction: str) -> None:
    task = random_task(model, pairs=3, length=4)
    options: dict[str, Any] = {"level": level, "direction": direction}
    options |= {"positions": True} if level == "edge" else {}

    def table(result: Scores) -> Tensor:
        found = result.nodes if level == "node" else result.edges
        assert found is not None
        return found

    effect = patch(model, task, progress=False, **options)
    size = table(effect).abs().max()
    if level == "edge":  # what is nowhere 0: an effect of each writer on each v, MLP and the logits
        reads = torch.tensor([r.endswith((".v", ".in")) for r in effect.readers])
        there = table(effect).abs().amax(0) > 1e-4 * size
        assert torch.equal(there, effect.layout.exists & reads)
    for rules in (GRADIENT, RELP, CP_LRP, DEEPLIFT):
        scores = attribute(model, task, rules=rules, **options)
        assert float((table(scores) - table(effect)).abs().max()) < 1e-6 * size, rules.name
