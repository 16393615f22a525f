"""MLP neurons as components of their own: as nodes, as ends of edges, and in circuits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from architectures import ARCHITECTURES
from conftest import able_task, boot, on, precedes, random_task
from test_edges import MODELS, Reference, build
from test_faithfulness import alone, split
from torch import Tensor

from circuits import (
    acdc,
    agreement,
    assemble,
    between,
    compare,
    completeness,
    evaluate,
    faithfulness,
    greedy,
    load,
    minimality,
    patch,
    save,
    to_mib,
    top,
    top_nodes,
)
from circuits.draw.layout import layout
from circuits.graph import size
from circuits.masked import circuit_metrics, endpoints
from relp import DEEPLIFT, GRADIENT, RELP, Component, EdgeScores, Scores, attribute
from relp.bridge import Block, Sites

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
    every = attribute(tiny, task, rules=RELP)
    assert every.nodes is not None
    for asked in (["L2H3", "L1.mlp", "embed", "L2H0"], ["head"], "resid"):
        some = attribute(tiny, task, rules=RELP, components=asked, batch_size=2, progress=False)
        at = [every.components.index(c) for c in some.components]
        assert at == sorted(at) and some.nodes is not None
        torch.testing.assert_close(some.nodes, every.nodes[:, at], rtol=1e-4, atol=1e-6)


@on("tiny", "llama", "gpt2")
@pytest.mark.parametrize("path", ["inputs", "activations"])
def test_neurons_sum_to_their_mlp_along_a_path(tiny: Any, path: str) -> None:
    task = random_task(tiny, pairs=2, length=4)
    options = {"rules": GRADIENT, "steps": 2, "path": path}
    scores = attribute(tiny, task, components=["neuron", "mlp"], **options)
    names, neurons = scores.of_kind("neuron")
    layers = neurons.unflatten(1, (3, -1))
    torch.testing.assert_close(layers.sum(2), scores.of_kind("mlp")[1], rtol=1e-4, atol=1e-6)
    edges = attribute(tiny, task, level="edge", neurons=names[:3], **options)
    assert edges.edges is not None
    found = edges.edges.sum(1)[[edges.writers.index(n) for n in names[:3]]]
    expected = neurons[:, :3].sum(-1).mean(0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


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


# -- edges -----------------------------------------------------------------------------------------

NEURONS = ("L0N5", "L1N0", "L1N7")


@pytest.fixture(
    scope="module", params=["GPT2", "Llama", "GPTNeoX", "GPTJ", "OPT", "Gemma2", "Olmo2"]
)
def named(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[str, Any]:
    """A random model in float64."""
    return request.param, build(request.param, tmp_path_factory.mktemp("neurons"), MODELS)


@pytest.mark.parametrize("rules", [GRADIENT, RELP, DEEPLIFT], ids=lambda r: r.name)
def test_neurons_and_the_rest_are_the_mlp(named: tuple[str, Any], rules: Any) -> None:
    _, model = named
    task = random_task(model, pairs=3, length=4)
    options = {"rules": rules, "level": "edge", "positions": True}
    whole = attribute(model, task, **options)
    apart = attribute(model, task, neurons=NEURONS, **options)
    assert whole.edges is not None and apart.edges is not None
    assert apart.writers[-4:] == ("L1H3", "L1N0", "L1N7", "L1.mlp")
    assert apart.readers[-4:] == ("L1N0.in", "L1N7.in", "L1.mlp.in", "logits.in")
    merged = torch.zeros(whole.edges.shape)
    for w, writer in enumerate(apart.writers):
        for r, reader in enumerate(apart.readers):
            row = f"L{writer[1]}.mlp" if writer in NEURONS else writer
            column = f"L{reader[1]}.mlp.in" if reader[:-3] in NEURONS else reader
            at = whole.writers.index(row), whole.readers.index(column)
            merged[:, at[0], at[1]] += apart.edges[:, w, r]
    scale = float(whole.edges.abs().max())
    torch.testing.assert_close(merged, whole.edges, rtol=1e-5, atol=1e-6 * scale)
    if rules is DEEPLIFT:
        gap = float(apart.gap.mean())
        assert float(apart.edges[:, 0].sum()) == pytest.approx(gap, rel=1e-4)
        assert float(apart.edges[..., -1].sum()) == pytest.approx(gap, rel=1e-4)
    if not hasattr(model.blocks[0], "ln2_post"):
        nodes = attribute(model, task, rules=rules, components=NEURONS)
        rows = [apart.writers.index(n) for n in NEURONS]
        found, scores = apart.edges.sum((0, 2))[rows], nodes.nodes
        assert scores is not None
        torch.testing.assert_close(found, scores.mean(0).sum(-1), rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)], ids=str
)
def test_half_precision_rounds_within_the_tolerance(
    gpt2_folder: Path, dtype: torch.dtype, tolerance: float
) -> None:
    task = random_task(model := boot(gpt2_folder), pairs=2, length=4)
    exact = attribute(model, task, level="edge", neurons=NEURONS)
    half = attribute(boot(gpt2_folder, dtype=dtype), task, level="edge", neurons=NEURONS)
    assert half.edges is not None and exact.edges is not None
    for found, expected in (
        (half.edges[exact.writers.index(name)], exact.edges[exact.writers.index(name)])
        for name in NEURONS
    ):
        assert float((found - expected).abs().max() / expected.abs().max()) < tolerance


class Apart(Reference):
    """The running model, with some neurons apart from their MLP."""

    def __init__(self, model: Any, task: Any, sites: Sites) -> None:
        self.blocks = sites.blocks
        super().__init__(model, task)

    def points(self) -> dict[str, Any]:
        found = super().points()
        for i, block in enumerate(self.model.blocks):
            found |= {f"{i}.mlp.{name}": point.hook_out for name, point in self.first(i).items()}
            found[f"{i}.activations"] = block.mlp.out.hook_in
            if hasattr(block, "ln2_post"):
                found[f"{i}.normed"] = block.ln2_post.hook_in
        return found

    def first(self, i: int) -> dict[str, Any]:
        """What the neurons of a block read through."""
        parts = dict(self.model.blocks[i].mlp.named_children())
        return {name: parts[name] for name in ("in", "gate") if name in parts}

    def written(self, block: Block, step: Tensor) -> dict[str, Tensor]:
        """What each neuron adds (to the norm behind it, if there is one) if activations move."""
        out = self.model.blocks[block.layer].mlp.out
        found = {}
        for n in block.mlp.numbers:
            alone = torch.zeros_like(step)
            alone[..., n] = step[..., n]
            added = out(alone) - out(torch.zeros_like(step))
            found[f"L{block.layer}N{n}"] = added.reshape(*step.shape[:2], -1)
        return found

    def change(self, writer: Component) -> Tensor:
        if writer.kind not in ("neuron", "mlp"):
            return super().change(writer)
        i, block = writer.layer, self.model.blocks[writer.layer]
        site = f"{i}.activations"
        written = self.written(self.blocks[i], self.clean[site] - self.corrupt[site])
        if hasattr(block, "ln2_post"):
            here, small = self.corrupt[f"{i}.normed"], 1e-5
            for name, move in written.items():
                ends = [block.ln2_post(here + sign * small * move) for sign in (1, -1)]
                written[name] = (ends[0] - ends[1]) / (2 * small)
        if writer.kind == "neuron":
            return written[writer.name]
        return super().change(writer) - sum(written.values())

    def neurons(self, block: Block, now: dict[str, Tensor]) -> dict[str, Tensor]:
        """What each neuron adds now, less what it added in the corrupt run, behind a norm too."""
        i, module = block.layer, self.model.blocks[block.layer]
        step = now[f"{i}.activations"] - self.corrupt[f"{i}.activations"]
        written = self.written(block, step)
        if not hasattr(module, "ln2_post"):
            return written
        rest = now[f"{i}.normed"] - self.corrupt[f"{i}.normed"] - sum(written.values())
        parts = torch.stack([*written.values(), rest])
        parts = split(module.ln2_post, self.corrupt[f"{i}.normed"], parts)
        return dict(zip(written, parts, strict=False))

    def read(self, reader: Component, slot: str, move: Tensor) -> dict[str, Tensor]:
        i = reader.layer
        if reader.kind not in ("neuron", "mlp"):
            return super().read(reader, slot, move)
        whole = reader._replace(name=f"L{i}.mlp", kind="mlp")
        (x,) = super().read(whole, slot, move).values()
        edits = {}
        for name, projection in self.first(i).items():
            value = projection(x).reshape(*x.shape[:2], -1)  # OPT merges pairs and positions
            chosen = torch.zeros(value.shape[-1], dtype=torch.bool)
            chosen[
                [reader.head] if reader.kind == "neuron" else list(self.blocks[i].mlp.numbers)
            ] = True
            mine = chosen if reader.kind == "neuron" else ~chosen
            site = f"{i}.mlp.{name}"
            edits[site] = torch.where(mine, value, self.corrupt[site])
        return edits


@torch.no_grad()
def test_single_edges_by_finite_differences(
    named: tuple[str, Any], request: pytest.FixtureRequest
) -> None:
    _, model = named
    task = random_task(model, pairs=2, length=5)
    scores = attribute(model, task, rules=GRADIENT, level="edge", neurons=NEURONS)
    request.getfixturevalue("everything_double")
    reference = Apart(model, task, Sites.of(model).splitting(NEURONS))
    scale, count = float(scores.edges.abs().max()), 0
    for w, writer in enumerate(scores.writers):
        for r, reader in enumerate(scores.readers):
            source, (target, _) = Component.parse(writer), Component.of_reader(reader)
            if not precedes(source, target, parallel=scores.parallel):
                assert float(scores.edges[w, r]) == 0
            elif {"neuron", "mlp"} & {source.kind, target.kind} and (w + r) % 2 == 0:
                found, count = float(scores.edges[w, r]), count + 1
                expected = reference.score(writer, reader)
                assert found == pytest.approx(expected, rel=1e-4, abs=1e-5 * scale), (
                    writer,
                    reader,
                )
    assert count >= 20


@torch.no_grad()
@pytest.mark.parametrize("positions", [False, True])
def test_exact_effects_of_edges_are_runs_in_which_a_reader_hears_another_writer(
    tiny: Any, positions: bool
) -> None:
    task = random_task(tiny, pairs=2, length=4)
    edges = [
        *(("L0N5", reader) for reader in ("L1H0.q", "L1N7.in", "L1.mlp.in", "L2.mlp.in")),
        *(
            ("L0N5", "logits.in"),
            ("L1N7", "L2H1.v"),
            ("L0.mlp", "L1N0.in"),
            ("L1.mlp", "logits.in"),
        ),
        *(("embed", "L0N5.in"), ("embed", "L0.mlp.in"), ("L0H1", "L1N7.in"), ("L0H1", "L1.mlp.in")),
    ]
    if tiny.cfg.n_key_value_heads:
        edges = [(w, r.replace("L2H1.v", "L2KV0.v")) for w, r in edges]
    effects = patch(tiny, task, level="edge", edges=edges, neurons=NEURONS, positions=positions,
                    progress=False)  # fmt: skip
    sites = Sites.of(tiny).splitting(NEURONS)
    assert effects.layout == attribute(tiny, task, level="edge", neurons=NEURONS).layout
    reference = Apart(tiny, task, sites)
    for writer, reader in edges:
        move = reference.change(Component.parse(writer))
        for pos, found in enumerate(effects.by_position[:, *place(effects, writer, reader)]):
            at = torch.zeros_like(move)
            at[:, pos if positions else slice(None)] = 1
            edits = reference.read(*Component.of_reader(reader), move * at)
            metric = reference.run("corrupt", edits)["metric"] - reference.corrupt["metric"]
            assert float(found) == pytest.approx(float(metric.mean()), abs=2e-5), (writer, reader)
    assert int(effects.edges.isnan().sum()) + len(edges) * len(effects.by_position) == (
        int(effects.layout.exists.sum()) * len(effects.by_position)
    )


def place(effects: EdgeScores, writer: str, reader: str) -> tuple[int, int]:
    return effects.layout.row[writer], effects.layout.column[reader]


def test_neurons_whose_edges_are_measured_must_be_named(tiny: Any) -> None:
    task = random_task(tiny, pairs=2, length=3)
    for edge in (("L0N3", "L2H0.q"), ("L0H1", "L0N3.in")):
        with pytest.raises(ValueError, match="and name neurons that have edges in `neurons`"):
            patch(tiny, task, level="edge", edges=[edge])
    with pytest.raises(ValueError, match="got the other one with level='node'"):
        patch(tiny, task, neurons=NEURONS)


# -- circuits --------------------------------------------------------------------------------------


@torch.no_grad()
def test_circuits_with_neurons_equal_a_slow_run(
    named: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = named
    task, sites = able_task(model, pairs=2, length=4), Sites.of(model).splitting(NEURONS)
    every = sites.layout.exists
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(3, *every.shape, generator=generator) < 0.5) & every
    masks = torch.cat([masks, every[None], torch.zeros_like(every)[None]])
    *found, full, none = together = circuit_metrics(sites, task, masks[:, None])
    monkeypatch.setattr("circuits.masked.ROW_BYTES", 0)  # multiplied out when it is heard
    torch.testing.assert_close(circuit_metrics(sites, task, masks[:, None]), together)
    clean, corrupt = endpoints(sites, task)
    torch.testing.assert_close(full, clean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(none, corrupt, atol=1e-4, rtol=1e-4)
    reference = Apart(model, task, sites)
    for mask, metric in zip(masks, found, strict=False):
        kept = {(sites.writers[w], sites.readers[r]) for w, r in mask.nonzero().tolist()}
        expected = alone(reference, kept, sites).float()
        torch.testing.assert_close(metric, expected, atol=1e-4, rtol=1e-4)


def test_a_missing_neuron_is_cut_and_not_part_of_its_mlp(tiny: Any) -> None:
    task = able_task(tiny, pairs=2, length=4)
    scores = attribute(tiny, task, level="edge", neurons=NEURONS)
    graph, plain = assemble(scores), assemble(attribute(tiny, task, level="edge"))
    assert graph.graph["neurons"] == "L0N5 L1N0 L1N7" and plain.graph["neurons"] == ""
    assert graph.nodes["L1N7"]["kind"] == "neuron" and graph.nodes["L1N7"]["head"] == 7
    order = [n for n in graph if n.startswith("L1") and "KV" not in n]
    assert order[-3:] == ["L1N0", "L1N7", "L1.mlp"] and order[0] == "L1H0"
    assert set(graph["L1H0"]) & {"L1N0", "L1N7", "L1.mlp", "L1H1"} == {"L1N0", "L1N7", "L1.mlp"}
    assert not graph.has_edge("L1N7", "L1.mlp") and graph.has_edge("L1N7", "L2.mlp")

    without = graph.copy()
    without.remove_nodes_from(NEURONS)
    whole, cut, empty = faithfulness(
        tiny, task, [graph, without, top(graph, edges=0)], progress=False
    )
    assert whole == pytest.approx(1, abs=1e-4) and empty == pytest.approx(0, abs=1e-4)
    assert abs(cut - 1) > 1e-3
    # cut neurons keep the corrupt run's activations
    clean, corrupt = endpoints(Sites.of(tiny), task)
    kept: dict[int, Tensor] = {}

    def keep(layer: int, value: Tensor) -> None:
        kept[layer] = value

    def cut_off(layer: int, value: Tensor) -> Tensor:
        numbers = [int(name[3:]) for name in NEURONS if name.startswith(f"L{layer}")]
        value[..., numbers] = kept[layer][..., numbers]
        return value

    metric = []
    for side, visit in (("corrupt", keep), ("clean", cut_off)):
        handles = [
            block.mlp.out.hook_in.register_forward_hook(lambda _, __, v, i=i, f=visit: f(i, v))
            for i, block in enumerate(tiny.blocks)
        ]
        try:
            with torch.no_grad():
                metric.append(task.metric(tiny(getattr(task, side))))
        finally:
            for handle in handles:
                handle.remove()
    expected = (metric[1].mean() - corrupt.mean()) / (clean.mean() - corrupt.mean())
    assert cut == pytest.approx(float(expected), abs=1e-4)

    with pytest.raises(ValueError, match="the same neurons split off; L0N5 is so in some only"):
        faithfulness(tiny, task, [graph, plain], progress=False)
    with pytest.raises(ValueError, match="those of '2' are .* have other neurons than the first"):
        evaluate(tiny, task, [scores, attribute(tiny, task, level="edge").renamed("2")])
    with pytest.raises(ValueError, match="this graph has neurons split off: L0N5 L1N0 L1N7"):
        to_mib(graph, "importances.json", tiny)


@on("tiny", "llama", "gpt2")
def test_circuits_with_neurons_are_chosen_judged_and_kept(tiny: Any, tmp_path: Path) -> None:
    task = able_task(tiny, pairs=2, length=4)
    scores = attribute(tiny, task, level="edge", neurons=NEURONS)
    graph = assemble(scores)
    some = between(graph, ["L1N7", "L0.mlp", "L2H1"])
    assert set(some) - {"L2KV0"} == {"embed", "L0.mlp", "L1N7", "L2H1", "logits"}
    every = top_nodes(graph, nodes=len(graph) - 2)
    assert nx.utils.graphs_equal(every, graph)
    assert "L1N7" in greedy(graph, edges=size(graph) - 5)
    shares = [faithfulness(tiny, task, c) for c in (some, graph)]
    assert completeness(tiny, task, graph) == pytest.approx(0, abs=1e-4)
    table = minimality(tiny, task, some, progress=False)
    lost = some.copy()
    lost.remove_edge("embed", "L1N7", "in")
    row = table[(table["writer"] == "embed") & (table["reader"] == "L1N7.in")]
    expected = shares[0] - faithfulness(tiny, task, lost)
    assert row["contribution"].item() == pytest.approx(expected, abs=1e-4)
    found = evaluate(tiny, task, scores, sizes=[0.5, 1.0], progress=False)
    assert found.faithfulness[:, -1].tolist() == pytest.approx([1, 1], abs=1e-4)
    assert len(compare(tiny, task, some, graph)) == 1

    searched = acdc(tiny, task, tau=1e-9, graph=some, progress=False)
    assert searched.graph["neurons"] == graph.graph["neurons"] and size(searched) <= size(some)
    for suffix in ("json", "graphml", "gexf", "dot", "svg", "html"):
        for circuit in (some, assemble(attribute(tiny, task, level="edge"))):
            again = load(save(circuit, tmp_path / f"c.{suffix}"))
            assert again.graph == circuit.graph and nx.utils.graphs_equal(again, circuit)
    places = layout(some)
    assert places["L0.mlp"][1] < places["L1N7"][1] < places["L2H1"][1]


def test_neurons_that_cannot_be_split_off_are_refused(tiny: Any, tmp_path: Path) -> None:
    task = random_task(tiny, pairs=2, length=4)
    for name, message in {
        "L0H1": "names such as 'L0N3' of a model of 3 blocks; got 'L0H1'",
        "L3N1": "names such as 'L0N3' of a model of 3 blocks; got 'L3N1'",
        "L1N999": f"`neurons` of block 1 must be below {tiny.cfg.d_mlp}, as many as it has; got L1",
    }.items():
        with pytest.raises(ValueError, match=message):
            attribute(tiny, task, level="edge", neurons=["L0N1", name])
    experts = ARCHITECTURES["Mixtral"].build(tmp_path)
    with pytest.raises(ValueError, match="block 1 has none .*; leave L1N4 out"):
        attribute(experts, task, level="edge", neurons=["L1N4"])
    parts = dict(tiny.blocks[1].mlp.named_children())
    for point, what in ((parts["in"].hook_out, "read"), (parts["out"].hook_out, "write")):
        handle = point.register_forward_hook(lambda _, __, value: value * 0.5)
        try:
            with pytest.raises(RuntimeError, match=f"what the neurons {what} must sum .*block 1"):
                attribute(tiny, task, level="edge", neurons=["L1N2"])
            assert attribute(tiny, task, level="edge", neurons="L0N2").edges is not None
        finally:
            handle.remove()
