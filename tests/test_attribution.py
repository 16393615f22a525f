"""Scores: completeness, plain gradients, edges against nodes, directions, batches, errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import boot, on, precedes, random_task, save_tokenizer, state, without_a_difference
from replica import Replica
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from circuits import assemble
from relp import ATTN_LRP, CP_LRP, DEEPLIFT, GIM, GRADIENT, RELP, Rules, Scores, attribute, register
from relp.layout import Component
from relp.propagation import UnknownOperationError
from tasks import KLDivergence, Task, ioi

ALL = (GRADIENT, RELP, CP_LRP, ATTN_LRP, GIM, DEEPLIFT)
ids = [r.name for r in ALL]


def node_totals(scores: Scores, names: tuple[str, ...]) -> Tensor:
    """Mean over pairs, sum over positions, for some components."""
    assert scores.nodes is not None
    at = [scores.components.index(n) for n in names]
    return scores.nodes.mean(0).sum(-1)[at]


@on("shipped", "ioi-llama", "ioi-gpt2")
@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("metric", ["logit_difference", "probability_difference"])
def test_deeplift_sums_to_the_gap_at_every_layer(shipped: Any, direction: str, metric: str) -> None:
    task = ioi(shipped.tokenizer, pairs=8, seed=1, corruption="abc").with_metric(metric)
    scores = attribute(shipped, task, rules=DEEPLIFT, direction=direction)
    names, residual = scores.of_kind("resid")
    assert len(names) == len(shipped.blocks)
    for layer in range(len(names)):
        error = (residual[:, layer].sum(-1) - scores.gap).abs() / scores.gap.abs()
        assert float(error.max()) < 1e-4, names[layer]
    edges = attribute(shipped, task, rules=DEEPLIFT, direction=direction, level="edge")
    assert edges.edges is not None
    gap = float(scores.gap.mean())
    assert float(edges.edges[0].sum()) == pytest.approx(gap, rel=1e-4)
    assert float(edges.edges[:, -1].sum()) == pytest.approx(gap, rel=1e-4)


def test_gradient_is_torchs_own(shipped: Any) -> None:
    """The plain way: hooks, autograd, a product; no package code but the task's metric."""
    task = ioi(shipped.tokenizer, pairs=4, seed=2)
    points = {"L0.resid": shipped.blocks[0].hook_in}
    for layer, block in enumerate(shipped.blocks):
        points[f"L{layer}.mlp"] = block.mlp.hook_out
        points[f"L{layer}.attn"] = block.attn.hook_out
    runs: dict[str, dict[str, Tensor]] = {"clean": {}, "corrupt": {}}
    for side, kept in runs.items():
        handles = [
            p.register_forward_hook(lambda _, __, v, n=n, kept=kept: kept.__setitem__(n, v))
            for n, p in points.items()
        ]
        metric = task.metric(shipped(getattr(task, side))).sum()
        for h in handles:
            h.remove()
    corrupt = runs["corrupt"]
    grads = dict(zip(corrupt, torch.autograd.grad(metric, list(corrupt.values())), strict=True))
    scores = attribute(shipped, task, rules=GRADIENT)
    assert scores.nodes is not None
    for name in points:
        expected = ((runs["clean"][name] - runs["corrupt"][name]) * grads[name]).sum(-1).detach()
        found = scores.nodes[:, scores.components.index(name)]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@on("shipped", "ioi-llama", "ioi-gpt2")
@pytest.mark.parametrize("rules", ALL, ids=ids)
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_a_writers_edges_sum_to_its_node(shipped: Any, rules: Rules, direction: str) -> None:
    task = ioi(shipped.tokenizer, pairs=6, seed=4)
    nodes = attribute(shipped, task, rules=rules, direction=direction)
    edges = attribute(shipped, task, rules=rules, direction=direction, level="edge")
    expected = node_totals(nodes, edges.writers)
    assert edges.edges is not None
    error = (edges.edges.sum(1) - expected).abs() / expected.abs().clamp(min=1e-2)
    assert float(error.max()) < 1e-4


def test_edges_exist_only_from_earlier_to_later(tiny: Any) -> None:
    edges = attribute(tiny, random_task(tiny), rules=RELP, level="edge")
    assert edges.edges is not None
    layers, heads = len(tiny.blocks), tiny.cfg.n_heads
    kv = getattr(tiny.cfg, "n_key_value_heads", None) or heads
    assert len(edges.writers) == 1 + layers * (heads + 1)
    assert len(edges.readers) == layers * (heads + 2 * kv + 1) + 1
    for w, writer in enumerate(edges.writers):
        for r, reader in enumerate(edges.readers):
            exists = precedes(Component.parse(writer), Component.of_reader(reader)[0])
            assert (float(edges.edges[w, r]) != 0) == exists, (writer, reader)


@pytest.mark.parametrize("rules", [GRADIENT, RELP], ids=["GRADIENT", "RELP"])
def test_edges_are_what_each_reader_alone_would_see(tiny: Any, rules: Rules) -> None:
    """In the float64 replica every reader gets its own copy of the residual stream."""
    task = random_task(tiny, pairs=2, length=5)
    edges = attribute(tiny, task, rules=rules, level="edge")
    assert edges.edges is not None
    replica = Replica(tiny, rules)
    with torch.no_grad():
        clean = replica.run(task.clean).writers
    copies: dict[str, Tensor] = {}

    def read(reader: str, residual: Tensor) -> Tensor:
        if reader not in copies:  # keys and values of a group are read once per query head
            copies[reader] = torch.zeros_like(residual, requires_grad=True)
        return residual + copies[reader]

    trace = replica.run(task.corrupt, read=read)
    grads = torch.autograd.grad(task.metric(trace.logits).sum(), list(copies.values()))
    coefficients = dict(zip(copies, grads, strict=True))
    for w, writer in enumerate(edges.writers):
        delta = clean[writer] - trace.writers[writer].detach()
        for r, reader in enumerate(edges.readers):
            if precedes(Component.parse(writer), Component.of_reader(reader)[0]):
                expected = float((delta * coefficients[reader]).sum()) / len(task)
                assert float(edges.edges[w, r]) == pytest.approx(expected, rel=1e-3, abs=2e-6)


def test_positions_sum_to_the_edges(tiny: Any) -> None:
    task = random_task(tiny)
    flat = attribute(tiny, task, rules=RELP, level="edge")
    kept = attribute(tiny, task, rules=RELP, level="edge", positions=True)
    assert kept.edges is not None and flat.edges is not None
    assert kept.edges.shape == (7, *flat.edges.shape)
    torch.testing.assert_close(kept.edges.sum(0), flat.edges, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rules", ALL, ids=ids)
@pytest.mark.parametrize("level", ["node", "edge"])
def test_identical_pairs_score_zero(tiny: Any, rules: Rules, level: str) -> None:
    same = without_a_difference(random_task(tiny))
    scores = attribute(tiny, same, rules=rules, level=level)
    values = scores.nodes if level == "node" else scores.edges
    assert values is not None
    assert torch.equal(values, torch.zeros_like(values))


@pytest.mark.parametrize("rules", ALL, ids=ids)
def test_noise_is_denoise_with_the_sides_swapped(tiny: Any, rules: Rules) -> None:
    task = random_task(tiny)
    swapped = Task.from_tokens(task.corrupt, task.clean, task.answers, task.foils)
    noise = attribute(tiny, task, rules=rules, direction="noise")
    denoise = attribute(tiny, swapped, rules=rules, direction="denoise")
    assert noise.nodes is not None and denoise.nodes is not None
    torch.testing.assert_close(noise.nodes, denoise.nodes)
    if rules is DEEPLIFT:  # the same path both ways, walked backwards
        there = attribute(tiny, task, rules=rules, direction="denoise")
        assert there.nodes is not None
        torch.testing.assert_close(there.nodes, -noise.nodes, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("level", ["node", "edge"])
def test_batches_are_the_mean_of_single_pairs(tiny: Any, level: str) -> None:
    task = random_task(tiny, pairs=5)
    whole = attribute(tiny, task, rules=RELP, level=level)
    parts = attribute(tiny, task, rules=RELP, level=level, batch_size=2, progress=False)
    for name in ("nodes", "edges"):
        one, two = getattr(whole, name), getattr(parts, name)
        if one is not None:
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_pairs_of_different_lengths(tiny: Any) -> None:
    one, two = random_task(tiny, pairs=2, length=5), random_task(tiny, pairs=3, length=8, seed=1)
    mixed = Task.from_tokens(
        [*one.clean, *two.clean], [*one.corrupt, *two.corrupt],
        torch.cat([one.answers, two.answers]), torch.cat([one.foils, two.foils]),
    )  # fmt: skip
    scores = attribute(tiny, mixed, rules=RELP)
    short, long = attribute(tiny, one, rules=RELP), attribute(tiny, two, rules=RELP)
    assert scores.nodes is not None and short.nodes is not None and long.nodes is not None
    torch.testing.assert_close(scores.nodes[:2, :, :5], short.nodes)
    assert torch.equal(scores.nodes[:2, :, 5:], torch.zeros(2, len(scores.components), 3))
    torch.testing.assert_close(scores.nodes[2:], long.nodes)


@on("tiny", "llama", "gpt2")
def test_steps_approach_the_path_integral(tiny: Any) -> None:
    task = random_task(tiny)
    errors = []
    for steps in (1, 8, 40):
        scores = attribute(tiny, task, rules=GRADIENT, steps=steps)
        assert scores.nodes is not None
        embed = scores.nodes[:, 0].sum(-1)
        errors.append(float((embed - scores.gap).abs().max() / scores.gap.abs().max()))
    # at the embedding, integrated gradients are complete
    assert errors[2] < errors[0]
    assert errors[2] < 2e-2, errors
    assert scores.rules == "GRADIENT (40 steps)"


@on("tiny", "llama", "gpt2")
@pytest.mark.parametrize(
    ("rules", "path"), [(GRADIENT, "activations"), (RELP, "inputs")], ids=["GRADIENT", "RELP"]
)
def test_steps_hold_for_edges_as_for_nodes(tiny: Any, rules: Rules, path: str) -> None:
    task = random_task(tiny, pairs=2, length=4)
    nodes = attribute(tiny, task, rules=rules, steps=2, path=path)
    edges = attribute(tiny, task, rules=rules, steps=2, path=path, level="edge")
    assert edges.edges is not None
    torch.testing.assert_close(
        edges.edges.sum(1), node_totals(nodes, edges.writers), rtol=1e-4, atol=1e-6
    )


def test_activations_move_one_site_at_a_time(tiny: Any) -> None:
    """EAP-IG on activations as its definition reads: hooks, autograd, a mean over all runs."""
    task = random_task(tiny, pairs=2, length=5)
    sites = [tiny.blocks[0].hook_in]
    for block in tiny.blocks:
        sites += [block.attn.o.hook_in, block.mlp.hook_out]

    def run(tokens: Tensor, moved: Any = None, value: Any = None) -> tuple[Tensor, list[Tensor]]:
        kept: list[Tensor] = []

        def visit(point: Any, _: Any, output: Tensor) -> Tensor:
            output = value.detach().requires_grad_() if point is moved else output
            kept.append(output)
            return output

        handles = [p.register_forward_hook(visit) for p in sites]
        metric = task.metric(tiny(tokens)).sum()
        for h in handles:
            h.remove()
        return metric, kept

    clean, corrupt = run(task.clean)[1], run(task.corrupt)[1]
    mlp = len(sites) - 1  # the last: what it writes is read by the final norm alone
    total = torch.zeros_like(clean[mlp])
    for i, site in enumerate(sites):
        for alpha in (0.25, 0.75):
            value = (1 - alpha) * corrupt[i] + alpha * clean[i]
            metric, kept = run(task.corrupt, site, value)
            total += torch.autograd.grad(metric, kept[mlp])[0] / (2 * len(sites))
    expected = ((clean[mlp] - corrupt[mlp]) * total).sum(-1).detach()
    scores = attribute(tiny, task, rules=GRADIENT, steps=2, path="activations")
    assert scores.nodes is not None
    torch.testing.assert_close(scores.nodes[:, -1], expected, rtol=1e-4, atol=1e-6)
    assert scores.rules == "GRADIENT (2 steps of activations)"


def test_spans_gather_positions_of_every_pair(shipped: Any) -> None:
    """Prompts of several templates and lengths, pair by pair against the whole."""
    task = ioi(shipped.tokenizer, pairs=6, seed=3)
    assert len({tuple(int(v[i]) for v in task.spans.values()) for i in range(6)}) > 1
    nodes = attribute(shipped, task)
    spans = nodes.by_span()
    assert nodes.nodes is not None and spans.nodes is not None
    assert spans.places == (*task.spans, "other") == spans.tokens
    torch.testing.assert_close(spans.nodes.sum(-1), nodes.nodes.sum(-1), rtol=1e-4, atol=1e-5)
    for name, at in task.spans.items():
        expected = torch.stack([nodes.nodes[i, :, int(p)] for i, p in enumerate(at)])
        torch.testing.assert_close(spans.nodes[..., spans.places.index(name)], expected)
    edges = attribute(shipped, task, level="edge", positions="spans")
    flat = attribute(shipped, task, level="edge")
    assert edges.edges is not None and flat.edges is not None
    torch.testing.assert_close(edges.edges.sum(0), flat.edges, rtol=1e-4, atol=1e-5)
    by_writer = torch.stack(
        [spans.nodes.mean(0)[spans.components.index(w)] for w in edges.writers], 1
    )
    torch.testing.assert_close(edges.edges.sum(2), by_writer, rtol=1e-3, atol=1e-5)
    assert set(edges.to_dataframe()["span"]) == set(spans.to_dataframe()["span"])
    graph, of_all = assemble(edges), assemble(flat)
    for node, data in of_all.nodes(data=True):  # spans split edges, and change no node
        assert graph.nodes[node]["score"] == pytest.approx(data["score"], rel=1e-3, abs=1e-4)
    with pytest.raises(AttributeError, match="'by_span' is of node scores; these are of edges"):
        flat.by_span()


def test_operations_without_a_rule_are_the_callers_choice(tiny: Any) -> None:
    handle = tiny.blocks[1].mlp.hook_out.register_forward_hook(lambda _, __, v: torch.lgamma(v + 3))
    try:
        with pytest.raises(UnknownOperationError, match="'lgamma'"):
            attribute(tiny, random_task(tiny))
        assert attribute(tiny, random_task(tiny), strict=False).nodes is not None
        with register(torch.lgamma, "linear"):
            for level in ("node", "edge"):
                assert attribute(tiny, random_task(tiny), level=level).rules == (
                    "RELP + lgamma=linear"
                )
            assert attribute(tiny, random_task(tiny), steps=2, rules=GRADIENT).rules == (
                "GRADIENT + lgamma=linear (2 steps)"
            )
        rules = RELP.with_operation(torch.lgamma, "linear")
        assert attribute(tiny, random_task(tiny), rules=rules).rules == rules.name
    finally:
        handle.remove()
    with register(torch.lgamma, "linear"):  # which nothing meets now
        assert attribute(tiny, random_task(tiny)).rules == "RELP"


@pytest.mark.parametrize("field", ["clean", "answers"])
def test_tokens_that_the_model_has_not_are_refused(tiny: Any, field: str) -> None:
    task = random_task(tiny)
    ids = getattr(task, field).clone()
    ids[-1] = tiny.cfg.d_vocab
    with pytest.raises(ValueError, match=f"`{field}` must hold token ids below the model's d_voc"):
        attribute(tiny, replace(task, **{field: ids}))


def test_prompts_longer_than_the_model_reads_are_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match="no more tokens than the model's n_ctx 64; the longest"):
        attribute(tiny, random_task(tiny, length=tiny.cfg.n_ctx + 1))


def test_a_callers_grad_mode_changes_nothing(tiny: Any) -> None:
    task = random_task(tiny)
    for level in ("node", "edge"):
        plain = attribute(tiny, task, level=level)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                other = attribute(tiny, task, level=level)
            one, two = (s.nodes if level == "node" else s.edges for s in (plain, other))
            assert one is not None and two is not None
            assert torch.equal(one, two)


def test_hooks_that_change_what_readers_get_are_noticed(tiny: Any) -> None:
    task = random_task(tiny)
    point = tiny.blocks[1].mlp.hook_in
    handle = point.register_forward_hook(lambda _, __, value: value * 0.5)
    try:
        with pytest.raises(RuntimeError, match="must sum to the stream's own coefficient"):
            attribute(tiny, task, level="edge")
    finally:
        handle.remove()


def test_metrics_that_cannot_be_differentiated_are_refused(tiny: Any) -> None:
    task = random_task(tiny).with_metric(lambda logits: logits[:, -1].argmax(-1).float())
    with pytest.raises(ValueError, match="must be differentiable in the logits"):
        attribute(tiny, task)


def test_deeplift_is_complete_for_divergences(tiny: Any) -> None:
    task = random_task(tiny)
    task = task.with_metric(KLDivergence.of(tiny, task))
    scores = attribute(tiny, task, rules=DEEPLIFT)
    _, residual = scores.of_kind("resid")
    for layer in range(residual.shape[1]):
        torch.testing.assert_close(residual[:, layer].sum(-1), scores.gap, rtol=1e-3, atol=1e-5)


def test_means_count_only_pairs_that_have_the_position(tiny: Any) -> None:
    one, two = random_task(tiny, pairs=2, length=5), random_task(tiny, pairs=3, length=8, seed=1)
    mixed = Task.from_tokens(
        [*one.clean, *two.clean], [*one.corrupt, *two.corrupt],
        torch.cat([one.answers, two.answers]), torch.cat([one.foils, two.foils]),
    )  # fmt: skip
    long = attribute(tiny, two)
    assert long.nodes is not None
    torch.testing.assert_close(attribute(tiny, mixed).mean[:, 7], long.nodes.mean(0)[:, 7])


def test_a_users_own_metric_works(tiny: Any) -> None:
    task = random_task(tiny)
    plain = attribute(tiny, task, rules=RELP)

    def mine(logits: Tensor) -> Tensor:
        rows = torch.arange(len(task))
        return logits[rows, -1, task.answers] - logits[rows, -1, task.foils]

    own = attribute(tiny, task.with_metric(mine), rules=RELP)
    assert own.nodes is not None and plain.nodes is not None
    torch.testing.assert_close(own.nodes, plain.nodes)
    assert own.metric == "mine"
    kl = attribute(tiny, task.with_metric(KLDivergence.of(tiny, task)), rules=RELP)
    torch.testing.assert_close(kl.clean, torch.zeros(len(task)), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": "head"}, "`level` must be 'node' or 'edge'; got 'head'"),
        ({"direction": "forward"}, "`direction` must be 'denoise' or 'noise'; got 'forward'"),
        ({"steps": 0}, "`steps` must be a whole number of at least 1; got 0"),
        (
            {"steps": 3, "rules": DEEPLIFT},
            "`steps` must be 1 for rules that compare two runs; got 3 with",
        ),
        (
            {"steps": 2, "path": "line"},
            "`path` must be one of 'inputs', 'activations', 'site'; got 'line'",
        ),
        ({"path": "activations"}, "`path='activations'` needs `steps` above 1; got 1"),
        ({"positions": "all", "level": "edge"}, "`positions` must be True, False or 'spans'; got"),
        ({"positions": True}, "`positions` is for edge scores; got level='node'"),
        ({"batch_size": -1}, "`batch_size` must be at least 1; got -1"),
    ],
)
def test_wrong_arguments(tiny: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        attribute(tiny, random_task(tiny), **arguments)
    assert message in str(error.value)


def test_a_model_in_train_mode_is_refused(tiny: Any) -> None:
    part = tiny.blocks[1]
    part.training = True
    try:
        with pytest.raises(ValueError, match=r"in train mode; call model\.eval\(\)"):
            attribute(tiny, random_task(tiny))
    finally:
        part.training = False


def test_a_plain_module_is_refused() -> None:
    model = torch.nn.Linear(2, 2)
    task = Task.from_tokens([[1]], [[2]], [0], [1])
    with pytest.raises(TypeError, match="must be a TransformerBridge"):
        attribute(model, task)


def test_errors_leave_the_model_as_it_was(tiny: Any) -> None:
    def bad(logits: Tensor) -> Tensor:
        return logits.mean()

    task = random_task(tiny).with_metric(bad)
    for level in ("node", "edge"):
        with pytest.raises(ValueError, match=r"must return shape \[4\], one number per pair"):
            attribute(tiny, task, level=level)
    nan = random_task(tiny).with_metric(lambda logits: logits[:, -1, 0] * float("nan"))
    with pytest.raises(ValueError, match="must return finite numbers"):
        attribute(tiny, nan)
    # the autouse fixture compares every hook, flag, mode and weight


@pytest.mark.parametrize("flag", ["use_split_qkv_input", "use_attn_result"])
def test_the_bridges_flags_change_nothing(tiny: Any, flag: str) -> None:
    """They send the bridge along other paths; scores must follow or refuse, never drift."""
    task = random_task(tiny)
    plain = attribute(tiny, task, level="edge")
    getattr(tiny, f"set_{flag}")(True)
    try:
        flagged = attribute(tiny, task, level="edge")
    finally:
        getattr(tiny, f"set_{flag}")(False)
    assert plain.edges is not None and flagged.edges is not None
    torch.testing.assert_close(flagged.edges, plain.edges, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("level", ["node", "edge"])
def test_rules_hold_in_one_block_at_both_levels(tiny: Any, level: str) -> None:
    task = random_task(tiny)
    rules = RELP.at("blocks.1", norm="derivative", activation="derivative")
    nodes, plain = (attribute(tiny, task, rules=r) for r in (rules, RELP))
    assert nodes.nodes is not None and plain.nodes is not None
    after = [i for i, c in enumerate(nodes.components) if c.startswith("L2")]
    before = [i for i, c in enumerate(nodes.components) if c.startswith("L0.resid")]
    assert torch.equal(nodes.nodes[:, after], plain.nodes[:, after])
    assert not torch.allclose(nodes.nodes[:, before], plain.nodes[:, before], rtol=1e-2)
    if level == "edge":
        edges = attribute(tiny, task, rules=rules, level="edge")
        assert edges.edges is not None
        at = [nodes.components.index(w) for w in edges.writers]
        torch.testing.assert_close(
            edges.edges.sum(1), nodes.nodes.mean(0).sum(-1)[at], rtol=1e-4, atol=1e-6
        )


def test_what_routers_leave_unexplained_is_in_the_scores(tmp_path: Path) -> None:
    size = save_tokenizer(tmp_path)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=size, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        hidden_size=32, intermediate_size=48, num_local_experts=4, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    model = boot(tmp_path)
    task = random_task(model, pairs=5)
    before = state(model)
    scores = attribute(model, task, rules=DEEPLIFT)
    assert state(model) == before
    assert len(scores.remainder) == 2 and all(": topk" in k for k in scores.remainder)
    # at each layer's input, what the later blocks leave unexplained is missing
    _, residual = scores.of_kind("resid")
    for layer in range(2):
        later = sum(v for k, v in scores.remainder.items() if int(k.split(".")[1]) >= layer)
        total = float(residual[:, layer].sum(-1).mean()) + later
        assert total == pytest.approx(float(scores.gap.mean()), rel=1e-4, abs=1e-5)
    path = scores.save(tmp_path / "scores.safetensors")
    assert Scores.load(path).remainder == scores.remainder
    assert f"remainder={sum(scores.remainder.values()):+.4f}" in repr(scores)
    assert "not explained (the runs branch differently)" in scores._repr_html_()
    in_batches = attribute(model, task, rules=DEEPLIFT, batch_size=2, progress=False)
    assert in_batches.remainder == pytest.approx(scores.remainder, rel=1e-4, abs=1e-6)
    assert attribute(model, task, rules=RELP).remainder == {}
