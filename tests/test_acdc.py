"""ACDC against a slow loop in the published order, and interrupted searches.

Where nothing depends on the model, a toy stands for it: the search sees it through masks alone.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from conftest import able_task
from test_graph import make_scores, names
from torch import Tensor

from circuits import acdc, assemble, top
from circuits.graph import real_edges, size
from circuits.kept import circuit_masks
from circuits.masked import circuit_metrics
from relp import GRADIENT, attribute
from relp.bridge import Block, Sites
from tasks.metrics import KLDivergence

MODULE = import_module("circuits.search.acdc")  # the package has a function of that name


def toy(sites: Sites, seed: int) -> Callable[..., Tensor]:
    """A model of one number per component, written as a function of masks: `[circuit, 1]`."""
    row = {w: i for i, w in enumerate(sites.writers)}
    column = {r: i for i, r in enumerate(sites.readers)}
    layers = [
        (
            [
                (row[head], *(column[r] for r in (f"{head}.q", f"{kv}.k", f"{kv}.v")))
                for h, head in enumerate(b.mixer.parts)
                for kv in [sources(b)[h * b.kv_heads // b.heads]]
            ],
            (row[f"L{b.layer}.mlp"], column[f"L{b.layer}.mlp.in"]),
        )
        for b in sites.blocks
    ]
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(len(row), len(column), generator=generator) ** 3

    def metrics(_: Sites, task: Any, masks: Tensor) -> Tensor:
        kept = weights * masks[:, 0]
        values = torch.zeros(len(masks), len(row))
        values[:, 0] = 1.0

        def into(reader: int) -> Tensor:
            return (kept[:, :, reader] * values).sum(1)

        for heads, (mlp, mlp_in) in layers:
            new = [torch.sigmoid(into(q) * into(k)) * torch.tanh(into(v)) for _, q, k, v in heads]
            for (head, *_), value in zip(heads, new, strict=True):
                values[:, head] = value
            values[:, mlp] = torch.tanh(into(mlp_in))
        return into(column["logits.in"])[:, None]

    return metrics


def sources(block: Block) -> list[str]:
    """Who reads keys and values: the heads, or with grouped queries `L3KV0`, …"""
    return [reader.removesuffix(".k") for reader in block.mixer.slots[1].readers]


def slowly(
    metrics: Callable[..., Tensor], sites: Sites, task: Any, tau: float, mask: Tensor
) -> dict[tuple[str, str], float]:
    """Algorithm 1 of the paper, one edge after the other: what stays, and what its cut changed."""
    order = ["logits.in"]
    for block in reversed(sites.blocks):
        if block.mlp:
            order.append(f"L{block.layer}.mlp.in")
        if not block.heads:
            order.append(f"L{block.layer}.mixer.in")
        elif block.kv_heads == block.heads:
            order += [f"{h}.{slot}" for h in reversed(block.mixer.parts) for slot in "qkv"]
        else:
            order += [f"{h}.q" for h in reversed(block.mixer.parts)]
            order += [f"{h}.{slot}" for h in reversed(sources(block)) for slot in "kv"]
    readers, writers = list(sites.readers), list(sites.writers)
    assert sorted(order) == sorted(readers)
    mask, kept = mask.clone(), {}
    now = float(metrics(sites, task, mask[None, None]).double().mean())
    for reader in order:
        for writer in reversed(writers):
            at = writers.index(writer), readers.index(reader)
            if not mask[at]:
                continue
            mask[at] = False
            then = float(metrics(sites, task, mask[None, None]).double().mean())
            if now - then < tau:
                now = then
            else:
                mask[at] = True
                kept[writer, reader] = then - now
    return kept


def found(circuit) -> dict[tuple[str, str], float]:
    return {(u, d["reader"]): d["score"] for u, _, _, d in real_edges(circuit)}


@pytest.fixture
def task(tiny):
    return able_task(tiny, pairs=2, length=4)


@pytest.mark.parametrize("tau", [0.003, 0.05])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_search_is_the_published_one(tiny, task, seed, tau, monkeypatch):
    sites, rows = Sites.of(tiny), []
    model = toy(sites, seed)

    def counted(sites, task, masks, **_):
        rows.append(len(masks))
        return model(sites, task, masks)

    monkeypatch.setattr(MODULE, "circuit_metrics", counted)
    circuit = acdc(tiny, task, tau=tau, progress=False)
    expected = slowly(model, sites, task, tau, sites.layout.exists)
    assert found(circuit) == pytest.approx(expected, abs=1e-5) and len(expected) > 2
    assert max(found(circuit).values()) <= -tau
    assert circuit.graph["direction"] == "noise" and circuit.graph["rules"] == f"ACDC tau={tau:g}"
    assert "acdc_next" not in circuit.graph
    assert len(rows) < circuit.graph["total_edges"] / 2


@pytest.mark.parametrize("tiny", ["llama"], indirect=True)
def test_key_value_heads_are_heard_through_the_heads_that_they_serve(tiny):
    sites = Sites.of(tiny)
    heard = {
        sites.readers[r]: [sites.writers[w] for w in through]
        for r, through in MODULE._heard(sites).items()
    }
    for slot in "kv":
        assert heard[f"L1KV0.{slot}"] == ["L1H0", "L1H1"]
        assert heard[f"L1KV1.{slot}"] == ["L1H2", "L1H3"]
    assert heard["L1H2.q"] == ["L1H2"] and heard["L1.mlp.in"] == ["L1.mlp"]
    assert set(sites.readers) - set(heard) == {"logits.in"}


@pytest.mark.parametrize("tiny", ["gpt2"], indirect=True)
def test_neurons_come_with_their_mlp_before_the_heads(tiny):
    sites = Sites.of(tiny).splitting(["L2N3", "L2N7"])
    order = [sites.readers[r] for _, r in MODULE._order(sites, sites.layout.exists)]
    start = ["logits.in", "L2N7.in", "L2N3.in", "L2.mlp.in", "L2H3.q", "L2H3.k"]
    assert list(dict.fromkeys(order))[:6] == start


def best(model: Any, task: Any, edges: int):
    """A circuit that does something of what the model does."""
    scores = attribute(model, task, rules=GRADIENT, level="edge", progress=False)
    return top(assemble(scores), edges=edges, signed=True)


def test_on_a_model(tiny, task):
    graph, sites = best(tiny, task, 10), Sites.of(tiny)
    mask = circuit_masks(sites, task, graph)[0, 0]
    expected = slowly(circuit_metrics, sites, task, 0.05, mask)
    circuit = acdc(tiny, task, tau=0.05, graph=graph, progress=False)
    assert found(circuit) == pytest.approx(expected, abs=1e-5)
    assert 0 < len(expected) < size(graph) and names(circuit) < names(graph)


@pytest.mark.parametrize("name", ["Mamba", "Olmo2"])
def test_on_other_blocks(name, tmp_path):
    model = ARCHITECTURES[name].build(tmp_path)
    task, sites = able_task(model, pairs=2, length=3), Sites.of(model)
    graph = best(model, task, 12)
    mask = circuit_masks(sites, task, graph)[0, 0]
    expected = slowly(circuit_metrics, sites, task, 0.01, mask)
    circuit = acdc(model, task, tau=0.01, graph=graph, progress=False)
    assert found(circuit) == pytest.approx(expected, abs=1e-5) and expected


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_an_interrupted_search_goes_on(tiny, task, stop, monkeypatch):
    model, calls = toy(Sites.of(tiny), 0), []

    def interrupted(sites, task, masks, **_):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return model(sites, task, masks)

    monkeypatch.setattr(MODULE, "circuit_metrics", interrupted)
    with pytest.warns(UserWarning, match="give it as `graph` to go on"):
        part = acdc(tiny, task, tau=0.05, progress=False)
    rest = acdc(tiny, task, tau=0.05, graph=part, progress=False)
    whole = acdc(tiny, task, tau=0.05, progress=False)
    assert "acdc_next" in part.graph and names(whole) < names(part)
    assert found(rest) == pytest.approx(found(whole), abs=1e-5) and rest.graph == whole.graph


@pytest.mark.parametrize("tiny", ["gpt2"], indirect=True)
def test_the_metric_may_be_the_divergence_from_the_model(tiny, task):
    divergence = task.with_metric(KLDivergence.of(tiny, task))
    graph = best(tiny, task, 6)
    circuit = acdc(tiny, divergence, tau=1e-9, graph=graph, progress=False)
    assert size(circuit) > 0 and circuit.graph["metric"] == "KLDivergence"
    assert circuit.graph["metric_clean"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("tiny", ["gpt2"], indirect=True)
def test_what_cannot_be_searched(tiny, task):
    for tau in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`tau` must be above 0"):
            acdc(tiny, task, tau=tau)
    with pytest.raises(ValueError, match="these are by position"):
        acdc(tiny, task, tau=1.0, graph=assemble(make_scores(positions=4)))
    with pytest.raises(ValueError, match="is not one of"):
        acdc(tiny, task, tau=1.0, graph=assemble(make_scores(layers=4)))
