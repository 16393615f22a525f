"""Exact patching against one plain forward pass per cell, and circuits against the replica."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import random_task
from replica import Replica
from torch import Tensor, nn

from circuits import agreement, assemble, faithfulness, patch, top
from circuits.graph import real_edges, size
from relp import GRADIENT, RELP, Component, Effects, attribute
from tasks import Task, ioi


def plainly(model: Any, task: Task, name: str, pos: int, own: str) -> Tensor:
    """One component at one position, one hook, the whole model: nothing skipped or batched."""
    component = Component.parse(name)
    block = model.blocks[max(component.layer, 0)]
    point = {
        "embed": block.hook_in,
        "resid": block.hook_in,
        "head": block.attn.o.hook_in,
        "attn": block.attn.hook_out,
        "mlp": block.mlp.hook_out,
    }[component.kind]
    kept: list[Tensor] = []

    def note(_: nn.Module, __: Any, value: Tensor) -> None:
        kept.append(value)

    def write(_: nn.Module, __: Any, value: Tensor) -> Tensor:
        value = value.clone()
        part = slice(None)
        if component.kind == "head":
            size = value.shape[-1] // model.cfg.n_heads
            part = slice(component.head * size, (component.head + 1) * size)
        value[:, pos, part] = kept[0][:, pos, part]
        return value

    other = "corrupt" if own == "clean" else "clean"
    results = []
    with torch.no_grad():
        for hook, side in ((note, other), (None, own), (write, own)):
            handle = point.register_forward_hook(hook) if hook else None
            results.append(task.metric(model(getattr(task, side))))
            if handle:
                handle.remove()
    return results[2] - results[1]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_every_cell_equals_a_plain_run(tiny: Any, direction: str) -> None:
    task = random_task(tiny, pairs=3, length=5)
    effects = patch(tiny, task, direction=direction, batch_size=7, progress=False)
    own = {"denoise": "corrupt", "noise": "clean"}[direction]
    assert isinstance(effects, Effects)
    assert effects.nodes is not None
    for row, name in enumerate(effects.components):
        for pos in range(5):
            expected = plainly(tiny, task, name, pos, own)
            torch.testing.assert_close(effects.nodes[:, row, pos], expected, rtol=1e-4, atol=1e-5)


def test_layout_is_that_of_scores(shipped: Any) -> None:
    task = ioi(shipped.tokenizer, pairs=2, seed=0)
    scores = attribute(shipped, task)
    effects = patch(shipped, task, progress=False)
    assert effects.components == scores.components
    assert effects.nodes is not None and scores.nodes is not None
    assert effects.nodes.shape == scores.nodes.shape
    assert torch.equal(effects.clean, scores.clean)
    assert effects.rules == "exact"


def test_chosen_components_and_mixed_lengths(tiny: Any) -> None:
    one, two = random_task(tiny, pairs=2, length=4), random_task(tiny, pairs=2, length=6, seed=1)
    mixed = Task.from_tokens(
        [*one.clean, *two.clean], [*one.corrupt, *two.corrupt],
        torch.cat([one.answers, two.answers]), torch.cat([one.foils, two.foils]),
    )  # fmt: skip
    effects = patch(tiny, mixed, components=["mlp", "L1H2"], progress=False)
    assert effects.components == ("L0.mlp", "L1H2", "L1.mlp", "L2.mlp")
    alone = patch(tiny, one, components=["mlp", "L1H2"], progress=False)
    assert effects.nodes is not None and alone.nodes is not None
    torch.testing.assert_close(effects.nodes[:2, :, :4], alone.nodes)
    assert torch.equal(effects.nodes[:2, :, 4:], torch.zeros(2, 4, 2))
    with pytest.raises(ValueError, match="got 'neuron'; see Scores.components"):
        patch(tiny, mixed, components=["neuron"])


def test_a_metric_that_reads_every_position(tiny: Any) -> None:
    def spread(logits: Tensor) -> Tensor:
        return logits.float().std(-1).mean(1)

    task = random_task(tiny, pairs=2, length=4).with_metric(spread)
    effects = patch(tiny, task, components=["attn"], progress=False)
    assert effects.nodes is not None
    for row, name in enumerate(effects.components):
        expected = plainly(tiny, task, name, 1, "corrupt")
        torch.testing.assert_close(effects.nodes[:, row, 1], expected, rtol=1e-4, atol=1e-5)


def test_hooks_still_fire_after_patching_also_after_an_error(tiny: Any) -> None:
    task = random_task(tiny)
    calls = []

    def fragile(logits: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 3:
            raise KeyError("no more")
        return logits[:, -1, 0]

    with pytest.raises(KeyError, match="no more"):
        patch(tiny, task.with_metric(fragile), components=["L2.mlp"], progress=False)
    fired = []
    names = [f"blocks.{i}.attn.hook_z" for i in range(len(tiny.blocks))]
    tiny.run_with_hooks(task.clean, fwd_hooks=[(n, lambda v, hook: fired.append(1)) for n in names])
    assert len(fired) == len(names)


def test_agreement_is_numpys_and_perfect_with_itself(tiny: Any) -> None:
    task = random_task(tiny)
    scores = attribute(tiny, task, rules=GRADIENT)
    effects = patch(tiny, task, progress=False)
    table = agreement([scores, effects], effects).set_index(["rules", "kind"])
    for kind in effects.kinds():
        row = table.loc[("exact", kind)]
        assert row["pearson"] == pytest.approx(1)
        assert row["spearman"] == pytest.approx(1)
        assert row["relative_error"] == 0
        assert row["pairs"] == len(task)
    _, x = scores.of_kind("mlp")
    _, y = effects.of_kind("mlp")
    rows = [torch.stack([a.flatten(), b.flatten()]) for a, b in zip(x, y, strict=True)]
    rs = [torch.corrcoef(r)[0, 1] for r in rows]
    errors = [(r[0] - r[1]).norm() / r[1].norm() for r in rows]
    row = table.loc[("GRADIENT", "mlp")]
    assert row["pearson"] == pytest.approx(float(torch.stack(rs).mean()), abs=1e-5)
    assert row["relative_error"] == pytest.approx(float(torch.stack(errors).mean()), abs=1e-5)
    noise = patch(tiny, task, components=["mlp"], direction="noise", progress=False)
    with pytest.raises(ValueError, match="must be of the same direction; got 'denoise' and"):
        agreement(scores, noise)
    others = attribute(tiny, random_task(tiny, seed=9))
    with pytest.raises(ValueError, match="must be of the same pairs; their 'clean' differ"):
        agreement(others, effects)
    edges = attribute(tiny, task, level="edge")
    with pytest.raises(ValueError, match="must be of the same level; got 'edge' and 'node'"):
        agreement(edges, effects)


@pytest.mark.parametrize("positions", [False, True])
def test_all_edges_are_faithful_and_none_are_not(shipped: Any, positions: bool) -> None:
    task = ioi(shipped.tokenizer, pairs=2, seed=0)
    graph = assemble(attribute(shipped, task, level="edge", positions=positions))
    empty = top(graph, edges=0)
    assert faithfulness(shipped, task, graph) == pytest.approx(1, abs=1e-4)
    assert faithfulness(shipped, task, empty) == pytest.approx(0, abs=1e-6)


def heard_by(circuit: Any) -> dict[tuple[str, int], set[str]]:
    found: dict[tuple[str, int], set[str]] = {}
    for u, _, _, data in real_edges(circuit):
        found.setdefault((data["reader"], data["pos"]), set()).add(u)
    return found


@pytest.mark.parametrize("positions", [False, True])
def test_circuits_equal_a_slow_run_reader_by_reader(tiny: Any, positions: bool) -> None:
    """The replica gives every reader its own residual stream, in float64."""
    task = random_task(tiny, pairs=2, length=5)
    scores = attribute(tiny, task, rules=RELP, level="edge", positions=positions)
    graph = assemble(scores)
    circuits = [top(graph, edges=size(graph) * share // 10) for share in (1, 3, 6)]
    found = faithfulness(tiny, task, circuits, progress=False)
    assert isinstance(found, list)
    replica = Replica(tiny, GRADIENT)
    with torch.no_grad():
        clean, corrupt = replica.run(task.clean), replica.run(task.corrupt)
        full, none = task.metric(clean.logits).mean(), task.metric(corrupt.logits).mean()
        for circuit, share in zip(circuits, found, strict=True):
            expected = float((alone(replica, task, circuit) - none) / (full - none))
            assert share == pytest.approx(expected, abs=1e-4)


def alone(replica: Replica, task: Task, circuit: Any) -> Tensor:
    heard = heard_by(circuit)
    corrupt = replica.run(task.corrupt)
    now: dict[str, Tensor] = {}

    def read(reader: str, residual: Tensor) -> Tensor:
        component = Component.of_reader(reader)[0]
        if component.kind == "logits":
            x = corrupt.sites["final"].clone()
        elif component.kind == "mlp":
            x = corrupt.sites[f"L{component.layer}.mid"].clone()
        else:
            x = corrupt.sites[f"L{component.layer}.resid"].clone()
        for (name, pos), writers in heard.items():
            at = slice(None) if pos < 0 else slice(pos, pos + 1)
            for writer in writers if name == reader else ():
                x[:, at] += now[writer][:, at] - corrupt.writers[writer][:, at]
        return x

    return task.metric(replica.run(task.clean, read=read, writers=now).logits).mean()


def test_hooks_that_faithfulness_would_overwrite_are_noticed(tiny: Any) -> None:
    task = random_task(tiny)
    graph = assemble(attribute(tiny, task, level="edge"))
    point = tiny.blocks[1].attn.v.hook_out
    handle = point.register_forward_hook(lambda _, __, value: value * 3)
    try:
        with pytest.raises(RuntimeError, match="all edges together must give the clean run"):
            faithfulness(tiny, task, graph)
    finally:
        handle.remove()


def test_circuits_by_position_need_prompts_of_their_length(tiny: Any) -> None:
    graph = assemble(attribute(tiny, random_task(tiny, length=6), level="edge", positions=True))
    with pytest.raises(ValueError, match="is not one of"):
        faithfulness(tiny, random_task(tiny, length=5), graph)


def test_signed_circuits_help_in_either_direction(shipped: Any) -> None:
    task = ioi(shipped.tokenizer, pairs=4, seed=0)
    for direction in ("denoise", "noise"):
        graph = assemble(attribute(shipped, task, level="edge", direction=direction))
        circuit = top(graph, edges=size(graph) // 5, signed=True)
        assert faithfulness(shipped, task, circuit) > 0.8


def test_wrong_circuits_are_refused(tiny: Any) -> None:
    task = random_task(tiny)
    graph = assemble(attribute(tiny, task, level="edge"))
    same = Task.from_tokens(task.clean, task.clean, task.answers, task.foils)
    with pytest.raises(ValueError, match="needs a metric that differs"):
        faithfulness(tiny, same, graph)
    graph.add_edge("L2.mlp", "L0.mlp", key="in", reader="L0.mlp.in", score=1.0, slot="in",
                   structural=False, pos=-1)  # fmt: skip
    with pytest.raises(ValueError, match=r"'L2\.mlp' -> 'L0\.mlp\.in' is not one of 'tiny-"):
        faithfulness(tiny, task, graph)
