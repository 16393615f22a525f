"""Circuits alone: against TransformerLens' own measure, and against themselves one at a time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from architectures import ARCHITECTURES
from conftest import able_task, boot, ragged_task, random_task
from test_edges import MODELS, Reference, build
from torch import Tensor
from transformer_lens.tools.analysis import attribution_patching as lens

from circuits import (
    acdc,
    agreement,
    assemble,
    compare,
    completeness,
    connect,
    evaluate,
    faithfulness,
    minimality,
    random,
    top,
)
from circuits.graph import real_edges, size
from circuits.kept import Edges, circuit_masks, cut
from circuits.masked import circuit_metrics, endpoints
from circuits.masked import doubt as doubt_of
from relp import RELP, Component, Layout, attribute
from relp.bridge import Basis, Place, span_index
from relp.bridge.memory import Call
from relp.bridge.run import OURS
from relp.bridge.sites import Sites
from tasks import Task
from tasks.metrics import KLDivergence


def graph_of(model: Any, task: Task, *, positions: bool = False) -> nx.MultiDiGraph:
    scores = attribute(model, task, rules=RELP, level="edge", positions=positions)
    return assemble(scores)


def theirs(edge: tuple[str, dict[str, Any]]) -> tuple[lens.Node, lens.Node]:
    """One of our edges by position as a pair of TransformerLens' nodes."""
    writer, data = Component.parse(edge[0]), edge[1]
    reader, slot = Component.of_reader(data["reader"])
    at = {"position": data["pos"]}
    if writer.kind == "embed":
        source = lens.Node("embed", **at)
    elif writer.kind == "head":
        source = lens.Node("attn_head_out", layer=writer.layer, head=writer.head, **at)
    else:
        source = lens.Node("mlp_out", layer=writer.layer, **at)
    if reader.kind == "logits":
        return source, lens.Node("logits", layer=2, **at)
    if reader.kind == "mlp":
        return source, lens.Node("mlp_in", layer=reader.layer, **at)
    kind: Any = f"{slot}_input"
    return source, lens.Node(kind, layer=reader.layer, head=reader.head, **at)


def test_equals_transformer_lens(gpt2_folder: Path) -> None:
    model = boot(gpt2_folder)
    task = able_task(model, pairs=1, length=4)
    graph = graph_of(model, task, positions=True)
    circuits = [random(graph, edges=n, connected=False) for n in (60, 300, 500)]
    ours = faithfulness(model, task, circuits, progress=False)
    assert len(set(ours)) == 3
    for circuit, share in zip(circuits, ours, strict=True):
        edges = [theirs((u, data)) for u, _, _, data in real_edges(circuit)]
        found = lens.faithfulness(
            model, task.clean, task.corrupt, lambda logits: task.metric(logits)[0], edges
        )
        assert found.total_edges == graph.graph["total_edges"]
        assert share == pytest.approx(found.recovered, abs=1e-4)


def test_the_complement_is_the_rest_of_the_graph(tiny: Any) -> None:
    task = able_task(tiny, pairs=2, length=4)
    graph = graph_of(tiny, task)
    circuit = top(graph, edges=size(graph) // 3)
    rest = graph.copy()
    rest.remove_edges_from([(u, v, key) for u, v, key, _ in real_edges(circuit)])
    assert completeness(tiny, task, circuit) == pytest.approx(faithfulness(tiny, task, rest))
    nothing = top(graph, edges=0)
    assert completeness(tiny, task, [graph, nothing], progress=False) == pytest.approx(
        [0, 1], abs=1e-4
    )


@pytest.mark.parametrize("positions", [False, True])
def test_minimality_cuts_one_edge_at_a_time(tiny: Any, positions: bool) -> None:
    task = able_task(tiny, pairs=2, length=3)
    circuit = top(graph_of(tiny, task, positions=positions), edges=12)
    table = minimality(tiny, task, circuit, progress=False)
    assert len(table) == size(circuit)
    assert table["contribution"].is_monotonic_decreasing
    found = {(r.writer, r.reader, r.pos): r.contribution for r in table.itertuples()}
    edges = list(real_edges(circuit))
    circuits = [circuit.copy() for _ in (None, *edges)]
    for without, (u, v, key, _) in zip(circuits[1:], edges, strict=True):
        without.remove_edge(u, v, key)
    whole, *shares = faithfulness(tiny, task, circuits, progress=False)
    for (u, _, _, data), share in zip(edges, shares, strict=True):
        assert found[u, data["reader"], data["pos"]] == pytest.approx(whole - share, abs=1e-5)


def prefers_the_foil(model: Any, *, pairs: int = 4, wrong: int = 4) -> Task:
    """A task that `model` can do, but for the first pairs, whose answer is the other's foil."""
    task = able_task(model, pairs=pairs, length=4)
    turned = torch.arange(pairs) < wrong
    answers, foils = (
        torch.where(turned, one, other)
        for one, other in ((task.foils, task.answers), (task.answers, task.foils))
    )
    return replace(task, answers=answers, foils=foils)


def doubt(clean: list[float], gap: list[float], metric: Any = "logit_difference") -> str:
    pairs = len(clean)
    task = Task.from_tokens(
        [[1, 1]] * pairs, [[0, 0]] * pairs, [0] * pairs, [1] * pairs, metric=metric
    )
    values = torch.tensor(clean, dtype=torch.float32)
    return doubt_of(task, values, values - torch.tensor(gap))


def own(logits: Tensor) -> Tensor:
    return logits[:, -1, 0]


def test_what_is_doubted_is_a_gap_of_noise_or_a_model_that_is_wrong() -> None:
    right = [1.0, 2.0, 3.0, 4.0]
    # mean 0.5, standard error 0.5; and mean 2, standard error 1, which is two of them
    assert doubt(right, [1, 1, 1, -1]) and not doubt(right, [3, 3, 3, -1])
    assert not doubt([1, 2], [0.1, 10])  # one pair does most of it, but both say the same
    assert not doubt([1, 1, 1, -0.5], [1, 1, 1, 1])
    assert doubt([1, 1, -0.5, -0.5], [1, 1, 1, 1])  # half is what a coin gets right
    assert doubt([1, 1, 1, -4], [1, 1, 1, 1])  # the foil on average
    assert doubt([1, 1, 1, 0, 0, 0], [1] * 6)  # a tie is not right
    assert doubt([-2] * 12, [3] * 12)  # the foil on all, however clear the gap
    assert doubt(right, [-1, -1, -1, -1]) and not doubt(right, [-1, -1, -1, -1], own)
    assert doubt(right, [-1, -1, -1, 1], own)
    assert not doubt([-1, -2], [1, 1], own) and not doubt([1], [0.1]) and doubt([-1], [0.1])
    assert doubt([1, 1, -0.5, -0.5], [1, 1, 1, 1], "probability_difference")


def test_the_doubt_says_how_many_pairs_are_right() -> None:
    assert doubt([1, 1, 1, -0.5], [1, 1, 1, -1]) == (
        "the model must be able to do the task, or circuits explain noise; it is right on 3 of 4 "
        "clean prompts, and the gap in 'logit_difference' between clean and corrupt prompts is "
        "0.5 ± 0.5 (standard error over pairs); use task.filter_correct(model), or a model that "
        "can do the task"
    )
    assert doubt([-1], [0.25]) == (
        "the model must be able to do the task, or circuits explain noise; it is right on 0 of 1 "
        "clean prompts, and the gap in 'logit_difference' between clean and corrupt prompts is "
        "0.25; use task.filter_correct(model), or a model that can do the task"
    )
    divergence = KLDivergence(torch.zeros(2, 3))
    assert doubt([0.0, 0.0], [1, -1.5], divergence).startswith(
        "the model must be able to do the task, or circuits explain noise; the gap in "
        "'KLDivergence' between clean and corrupt prompts is -0.25 ± 1.2 (standard error"
    )


@pytest.mark.parametrize("tiny", ["gpt2"], indirect=True)
def test_each_verb_warns_its_caller_once(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # what checks annotations in tests stands between a verb and its caller
    monkeypatch.setattr("relp.bridge.run.OURS", (*OURS, "checking", "jaxtyping", "beartype"))
    task = prefers_the_foil(tiny)
    scores = attribute(tiny, task, level="edge")
    circuit = top(assemble(scores), edges=3, connected=False)
    for verb in (
        lambda: faithfulness(tiny, task, circuit),
        lambda: completeness(tiny, task, [circuit, circuit], progress=False),
        lambda: minimality(tiny, task, circuit, progress=False),
        lambda: evaluate(tiny, task, scores, sizes=[0.5], progress=False),
        lambda: compare(tiny, task, circuit, circuit),
        lambda: acdc(tiny, task, tau=0.1, graph=circuit, progress=False),
        lambda: endpoints(Sites.of(tiny), task),
    ):
        with pytest.warns(UserWarning, match="it is right on 0 of 4 clean prompts") as record:
            verb()
        assert [Path(warning.filename).name for warning in record] == [Path(__file__).name]


def test_the_pairs_that_the_model_gets_right_raise_no_doubt(tiny: Any) -> None:
    task = prefers_the_foil(tiny, wrong=2)
    circuit = graph_of(tiny, task)
    with pytest.warns(UserWarning, match="it is right on 2 of 4 clean prompts"):
        faithfulness(tiny, task, circuit)
    assert faithfulness(tiny, task.filter_correct(tiny), circuit) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("tiny", ["gpt2"], indirect=True)
def test_a_metric_without_a_gap_is_refused(tiny: Any) -> None:
    task = able_task(tiny, length=3)
    circuit = graph_of(tiny, task)
    with pytest.raises(ValueError, match=r"both average 2; use prompts whose answers differ"):
        faithfulness(tiny, task.with_metric(lambda logits: 0 * logits[:, -1, 0] + 2), circuit)


def test_loose_ends_change_nothing(tiny: Any) -> None:
    task = able_task(tiny, pairs=2, length=4)
    graph = graph_of(tiny, task)
    loose = random(graph, edges=size(graph) // 4, connected=False)
    assert size(connect(loose)) < size(loose)
    one, other = faithfulness(tiny, task, [loose, connect(loose)], progress=False)
    assert one == pytest.approx(other, abs=1e-5)


def mixed_lengths(model: Any) -> Task:
    one, two = random_task(model, pairs=2, length=4), random_task(model, pairs=1, length=6, seed=1)
    return Task.from_tokens(
        [*one.clean, *two.clean], [*one.corrupt, *two.corrupt],
        torch.cat([one.answers, two.answers]), torch.cat([one.foils, two.foils]),
    )  # fmt: skip


def test_batches_of_one_run_give_the_same(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task, sites = mixed_lengths(tiny), Sites.of(tiny)
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(2, 1, len(sites.writers), len(sites.readers), generator=generator) < 0.5
    together = circuit_metrics(sites, task, masks)
    # entries that are no edge of the model do not matter
    torch.testing.assert_close(circuit_metrics(sites, task, masks & sites.layout.exists), together)
    by_position, short = masks.expand(-1, 4, -1, -1), task.select([0, 1])
    torch.testing.assert_close(circuit_metrics(sites, short, by_position), together[:, :2])
    monkeypatch.setattr("relp.bridge.memory.CIRCUITS", Call(pace=1, share=0.6))
    torch.testing.assert_close(circuit_metrics(sites, task, masks), together)
    monkeypatch.setattr("circuits.masked.ROW_BYTES", 0)
    monkeypatch.setattr("circuits.masked.READ_BYTES", 1)
    torch.testing.assert_close(circuit_metrics(sites, task, masks), together)
    torch.testing.assert_close(circuit_metrics(sites, short, by_position), together[:, :2])


def test_where_memory_runs_out_batches_become_smaller(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, sites = able_task(tiny, pairs=3, length=4), Sites.of(tiny)
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(4, 1, len(sites.writers), len(sites.readers), generator=generator) < 0.5
    expected, ends = circuit_metrics(sites, task, masks), endpoints(sites, task)
    monkeypatch.setattr("circuits.masked.circuit_runs", lambda *_: 12)
    rows: list[int] = []

    def note(_: Any, __: Any, output: Tensor) -> None:
        rows.append(len(output))
        if len(output) > (5 if len(rows) <= 6 else 2):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    handle = sites.points["final"].register_forward_hook(note)
    try:
        torch.testing.assert_close(circuit_metrics(sites, task, masks), expected)
        # 12 rows do not fit, nor 6; then one circuit is done, the next one must run pair by pair
        assert rows == [3, 12, 3, 6, 3, 3, 3] + 3 * [1, 1, 1, 1]
        torch.testing.assert_close(torch.stack(endpoints(sites, task)), torch.stack(ends))
    finally:
        handle.remove()


def test_a_circuit_takes_no_more_than_its_edges() -> None:
    """In the shape of Llama-3.1-8B, by position: a mask for each cut would be 683 GB."""
    layers, heads = range(32), range(32)
    writers = [f"L{i}{part}" for i in layers for part in (*(f"H{h}" for h in heads), ".mlp")]
    read = [f"L{i}{part}" for i in layers for part in (
        *(f"H{h}.q" for h in heads), *(f"KV{h}.{s}" for s in "kv" for h in range(8)), ".mlp.in"
    )]  # fmt: skip
    layout = Layout.of(("embed", *writers), (*read, "logits.in"), False)
    assert layout.exists.shape == (1057, 1569)
    n = torch.arange(200)
    edges = Edges(layout, 2048, 10 * n, 5 * n, torch.full_like(n, 1568))
    last = Place(Basis("logits", None, entry="final"), 32, "final", slice(1057), slice(0),
                 slice(1568, 1569))  # fmt: skip
    whole = edges(last)
    assert whole.shape == (2048, 1057, 1) and int(whole.sum()) == 200
    assert int(replace(edges, rest=True)(last).sum()) == 2048 * 1057 - 200
    for i in (0, 7, 199):
        lost = whole & ~cut(edges, (10 * i, 5 * i, 1568))(last)
        assert lost.nonzero().tolist() == [[10 * i, 5 * i, 0]]
    before = replace(last, heard=slice(1024), columns=slice(1519, 1551))
    assert not edges(before).any() and not cut(edges, (0, 0, 1568))(before).any()


def test_many_circuits_take_one_corrupt_run_and_one_batch(tiny: Any) -> None:
    task, sites = random_task(tiny), Sites.of(tiny)
    runs: list[int] = []

    def note(_: Any, __: Any, output: Tensor) -> None:
        runs.append(len(output))

    handle = sites.points["final"].register_forward_hook(note)
    try:
        masks = torch.zeros(6, 1, len(sites.writers), len(sites.readers), dtype=torch.bool)
        masks[1:] = sites.layout.exists
        metrics = circuit_metrics(sites, task, masks)
    finally:
        handle.remove()
    assert metrics.shape == (6, len(task)) and runs == [len(task), 6 * len(task)]


def test_a_block_that_was_replaced_stays_so(tiny: Any) -> None:
    task, sites = random_task(tiny), Sites.of(tiny)
    late = torch.tensor([reader == "logits.in" for reader in sites.readers])
    masks = torch.stack([sites.layout.exists, sites.layout.exists & ~late])[:, None]
    expected = circuit_metrics(sites, task, masks)
    block = tiny.blocks[0]
    usual = type(block).forward

    def own(*args: Any, **kwargs: Any) -> Any:
        return usual(block, *args, **kwargs)

    object.__setattr__(block, "forward", own)
    try:
        torch.testing.assert_close(circuit_metrics(sites, task, masks), expected)
        assert vars(block)["forward"] is own
    finally:
        vars(block).pop("forward")


def test_masks_are_in_the_layout_of_scores(tiny: Any) -> None:
    task, sites = random_task(tiny, length=3), Sites.of(tiny)
    scores = attribute(tiny, task, level="edge", positions=True)
    circuit = top(assemble(scores), edges=20, connected=False)
    (mask,) = circuit_masks(sites, task, circuit)
    assert scores.edges is not None
    worst = scores.edges[mask].abs().min()
    assert int(mask.sum()) == 20 and int((scores.edges.abs() >= worst).sum()) == 20
    assert int(sites.layout.exists.sum()) * 3 == circuit.graph["total_edges"]
    with pytest.raises(ValueError, match="got none; pass at least one"):
        circuit_masks(sites, task, [])
    with pytest.raises(ValueError, match=r"has lengths \[4, 6\]; use a task of one length"):
        circuit_masks(sites, mixed_lengths(tiny), circuit)


# -- other blocks than the tiny models' ------------------------------------------------------------


OTHERS = (
    "GPTNeoX", "GPTJ", "OPT", "Qwen3", "Gemma2", "Gemma3", "Olmo2", "Mixtral", "DeepseekV3",
    "Mamba", "Mamba2",
)  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_all_edges_are_the_clean_run_and_none_the_corrupt(name: str, tmp_path: Path) -> None:
    model = ARCHITECTURES[name].build(tmp_path)
    task, sites = able_task(model, pairs=2, length=4), Sites.of(model)
    every = sites.layout.exists
    found = circuit_metrics(sites, task, torch.stack([every, torch.zeros_like(every)])[:, None])
    torch.testing.assert_close(found, torch.stack(endpoints(sites, task)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_blocks_before_the_first_difference_run_once(name: str, tmp_path: Path) -> None:
    model = ARCHITECTURES[name].build(tmp_path)
    task, sites = random_task(model, pairs=2, length=4), Sites.of(model)
    generator = torch.Generator().manual_seed(0)
    last = {*sites.blocks[-1].readers, "logits.in"}
    late = torch.tensor([reader in last for reader in sites.readers])
    masks = torch.rand(3, 1, len(sites.writers), len(late), generator=generator) < 0.7
    masks = torch.where(late, masks, masks[:1]) & sites.layout.exists
    one_by_one = torch.cat([circuit_metrics(sites, task, mask[None]) for mask in masks])
    rows: list[int] = []
    entry = sites.points[sites.blocks[0].name("resid")]
    handle = entry.register_forward_hook(lambda _, __, output: rows.append(len(output)))
    try:
        together = circuit_metrics(sites, task, masks)
    finally:
        handle.remove()
    torch.testing.assert_close(together, one_by_one, atol=1e-5, rtol=1e-4)
    assert rows == [len(task), len(task)]  # the corrupt run, and one for all circuits


def split(norm: Any, before: Tensor, parts: Tensor) -> Tensor:
    """What each part that is added to `before` adds behind an RMS norm, in the order of none.

    x·r changes by r̄·Δx + x̄·Δr, and r = s^-½ by Δr = Δs·(Δr/Δs) with Δs = 2·mean(x̄·Δx).
    """
    eps = norm.config.eps
    gain = norm(torch.ones_like(before)) * (1 + eps) ** 0.5
    after = before + parts.sum(0)
    s, t = (x.square().mean(-1, keepdim=True) + eps for x in (before, after))
    slope = torch.where(t == s, -(s**-1.5) / 2, (t**-0.5 - s**-0.5) / (t - s))
    moved = ((before + after) * parts).mean(-1, keepdim=True) * slope
    return gain * ((s**-0.5 + t**-0.5) * parts + (before + after) * moved) / 2


def alone(reference: Any, kept: set[tuple[str, str]], sites: Sites) -> Tensor:
    """The metric of the edges `kept`: each reader's input is rebuilt, block after block."""
    model, corrupt = reference.model, reference.corrupt
    edits: dict[str, Tensor] = {}
    added = {"embed": reference.clean["0.in"] - corrupt["0.in"]}

    def hear(reader: str) -> None:
        move = torch.zeros_like(corrupt["0.in"])
        for writer, change in added.items():
            move += change * ((writer, reader) in kept)
        for site, value in reference.read(*Component.of_reader(reader), move).items():
            # the heads of a site come one after the other, each in its own part of it
            edits[site] = edits.get(site, corrupt[site]) + value - corrupt[site]

    for i, block in enumerate(sites.blocks):
        names, module = block.writers, model.blocks[i]
        for reader in block.mixer.readers:
            hear(reader)
        now = reference.run("clean", edits)
        if block.heads:
            z = (now[f"{i}.z"] - corrupt[f"{i}.z"]).chunk(block.heads, -1)
            every = torch.eye(now[f"{i}.z"].shape[-1], dtype=torch.float64)[None]
            o = (module.attn.o(every) - module.attn.o(0 * every))[0].chunk(block.heads)
            parts = torch.stack([part @ w for part, w in zip(z, o, strict=True)])
            if hasattr(module, "ln1_post"):
                parts = split(module.ln1_post, corrupt[f"{i}.mixer"], parts)
            added |= zip(names, parts, strict=False)
        else:
            added[names[0]] = now[f"{i}.mixer"] - corrupt[f"{i}.mixer"]
        for reader in block.mlp.readers if block.mlp else ():
            hear(reader)
        if block.mlp:
            now = reference.run("clean", edits)
            neurons = reference.neurons(block, now) if block.mlp.parts else {}
            rest = now[f"{i}.mlp"] - corrupt[f"{i}.mlp"] - sum(neurons.values())
            added |= {**neurons, names[-1]: rest}
    hear("logits.in")
    return reference.run("clean", edits)["metric"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["GPTNeoX", "Gemma2", "Olmo2", "DeepseekV3", "Mamba"])
def test_equals_a_slow_run_on_other_blocks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name, tmp_path, MODELS)
    task, sites = random_task(model, pairs=2, length=4), Sites.of(model)
    generator = torch.Generator().manual_seed(0)
    every = sites.layout.exists
    masks = (torch.rand(3, *every.shape, generator=generator) < 0.5) & every
    found = circuit_metrics(sites, task, masks[:, None])
    monkeypatch.setattr("circuits.masked.ROW_BYTES", 0)  # multiplied out when it is heard
    torch.testing.assert_close(circuit_metrics(sites, task, masks[:, None]), found)
    reference = Reference(model, task)
    for mask, metric in zip(masks, found, strict=True):
        kept = {(sites.writers[w], sites.readers[r]) for w, r in mask.nonzero().tolist()}
        torch.testing.assert_close(
            metric, alone(reference, kept, sites).float(), atol=1e-4, rtol=1e-4
        )


@torch.no_grad()
def test_circuits_by_span_follow_each_pair(tiny: Any) -> None:
    """Against circuits by position, of one pair at a time: there a span is one position."""
    task, sites = ragged_task(tiny), Sites.of(tiny)
    scores = attribute(tiny, task, level="edge", positions="spans")
    circuit = top(scores, edges=60, connected=False)
    assert circuit.graph["by_span"] and json.loads(circuit.graph["places"]) == list(scores.places)
    assert {key.partition("@")[2] for *_, key in circuit.edges(keys=True)} - {""} == {
        "name", "end", "other",
    }  # fmt: skip
    masks = circuit_masks(sites, task, circuit)
    assert masks.shape[1] == 3 and int(masks.sum()) == size(circuit)
    found = circuit_metrics(sites, task, masks, by_span=True)[0]
    for i, metric in enumerate(found):
        one = task.select([i])
        length = int(one.lengths[0])
        where = span_index(one.spans, 1, length)[0]
        alone = circuit_metrics(sites, one, masks[:, where])
        torch.testing.assert_close(metric, alone[0, 0], atol=1e-5, rtol=1e-5)
    whole, none = assemble(scores), top(scores, edges=0)
    every, nothing = circuit_masks(sites, task, [whole, none])
    ends = circuit_metrics(sites, task, torch.stack([every, nothing]), by_span=True)
    expected = torch.stack([scores.clean, scores.corrupt])
    torch.testing.assert_close(ends, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(
        ValueError, match=r"need a task with the same spans, .* has \['end', 'other"
    ):
        faithfulness(tiny, able_task(tiny), circuit)
    with pytest.raises(ValueError, match="and others that are so too"):
        faithfulness(tiny, task, [circuit, graph_of(tiny, task.select([0]), positions=True)])


@pytest.mark.filterwarnings("ignore:the model must be able to do the task")
def test_a_span_may_be_called_as_the_rest_is(tiny: Any) -> None:
    """As in agreement across a phrase, whose noun is the other one."""
    task = ragged_task(tiny)
    named = replace(task, spans={**task.spans, "other": task.spans["name"] + 1})
    scores = attribute(tiny, named, level="edge", positions="spans")
    assert scores.places == ("name", "end", "other", "other positions")
    assert attribute(tiny, named).by_span().places == scores.places
    whole = assemble(scores)
    assert size(whole) == int(scores.layout.exists.sum()) * 4 and len(set(whole.edges)) == size(
        whole
    ) + sum(d["structural"] for *_, d in whole.edges(data=True))
    assert faithfulness(tiny, named, whole) == pytest.approx(1, abs=1e-3)


@pytest.mark.usefixtures("annotations_unchecked")
def test_what_is_no_circuit_is_told_what_is(tiny: Any) -> None:
    task = able_task(tiny)
    edges = attribute(tiny, task, level="edge")
    by_span = assemble(attribute(tiny, task, level="edge", positions="spans"))
    for judge in (faithfulness, completeness, minimality):
        for wrong in (edges, None, "circuit"):
            with pytest.raises(TypeError, match="must be a graph or a sequence of graphs; got "):
                judge(tiny, task, wrong)
        mixed = nx.compose(assemble(edges), by_span)  # each has edges that the other lacks
        with pytest.raises(ValueError, match="edges of a circuit must be kept by position, as its"):
            judge(tiny, task, mixed)
    for wrong in (by_span, [by_span], None):
        with pytest.raises(TypeError, match="`scores` must be Scores, or a list of them; got "):
            evaluate(tiny, task, wrong)
        with pytest.raises(TypeError, match="circuits are judged by faithfulness"):
            agreement(wrong, edges)


def test_positions_of_prompts_of_several_lengths_make_no_circuit(tiny: Any) -> None:
    """A position is there in some pairs only: their sum would be no mean."""
    edges = attribute(tiny, ragged_task(tiny), level="edge", positions=True)
    for choose in (assemble, lambda scores: top(scores, edges=5)):
        with pytest.raises(ValueError, match=r"if all prompts have one length; .* \[4, 6, 7\], so"):
            choose(edges)
