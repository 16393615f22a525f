"""ACDC against a slow loop in the published order, and interrupted searches."""

from importlib import import_module
from typing import Any

import pytest
import torch
from conftest import random_task
from test_graph import make_scores, names

from circuits import acdc, assemble
from circuits.faithfulness import circuit_metrics
from circuits.graph import all_edges, real_edges, size
from relp.sites import Sites
from tasks.metrics import KLDivergence

MODULE = import_module("circuits.acdc")  # the package has a function of that name


def slowly(model: Any, task: Any, tau: float) -> dict[tuple[str, str], float]:
    """Algorithm 1 of the paper, one edge after the other: what stays, and what its cut changed."""
    sites = Sites.of(model)
    mask, kept = all_edges(sites), {}

    def metric() -> float:
        return float(circuit_metrics(sites, task, mask[None, None]).double().mean())

    order = ["logits.in"]
    for block in reversed(sites.blocks):
        order.append(f"L{block.layer}.mlp.in")
        if block.kv_heads == block.heads:
            order += [f"{h}.{slot}" for h in reversed(block.head_names) for slot in "qkv"]
        else:
            order += [f"{h}.q" for h in reversed(block.head_names)]
            order += [f"{h}.{slot}" for h in reversed(block.kv_names) for slot in "kv"]
    assert sorted(order) == sorted(sites.readers)
    now = metric()
    for reader in order:
        for writer in reversed(sites.writers):
            at = sites.writers.index(writer), sites.readers.index(reader)
            if not mask[at]:
                continue
            mask[at] = False
            then = metric()
            if now - then < tau:
                now = then
            else:
                mask[at] = True
                kept[writer, reader] = then - now
    return kept


@pytest.fixture
def task(tiny):
    return random_task(tiny, pairs=2, length=4)


def gap(model: Any, task: Any) -> float:
    """Of the metric between clean and corrupt prompts."""
    with torch.no_grad():
        return abs(
            float((task.metric(model(task.clean)) - task.metric(model(task.corrupt))).mean())
        )


def test_the_search_is_the_published_one(tiny, task, monkeypatch):
    tau = 0.02 * gap(tiny, task)
    rows = []

    def counted(sites, task, masks):
        rows.append(len(masks))
        return circuit_metrics(sites, task, masks)

    monkeypatch.setattr(MODULE, "circuit_metrics", counted)
    circuit = acdc(tiny, task, tau=tau, progress=False)
    expected = slowly(tiny, task, tau)
    found = {(u, d["reader"]): d["score"] for u, _, _, d in real_edges(circuit)}
    assert found == pytest.approx(expected, abs=1e-5) and 10 < len(found) < 200
    assert max(found.values()) <= -tau
    assert circuit.graph["direction"] == "noise" and circuit.graph["rules"].startswith("ACDC tau=")
    assert "acdc_next" not in circuit.graph
    assert len(rows) < len(found) < circuit.graph["total_edges"]


def test_an_interrupted_search_goes_on(tiny, task, monkeypatch):
    tau = 0.05 * gap(tiny, task)
    whole = acdc(tiny, task, tau=tau, progress=False)
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return circuit_metrics(*args)

    monkeypatch.setattr(MODULE, "circuit_metrics", interrupted)
    with pytest.warns(UserWarning, match="give it as `graph` to go on"):
        part = acdc(tiny, task, tau=tau, progress=False)
    assert "acdc_next" in part.graph and names(whole) < names(part)
    rest = acdc(tiny, task, tau=tau, graph=part, progress=False)
    assert names(rest) == names(whole) and "acdc_next" not in rest.graph
    for u, v, key, data in real_edges(whole):
        assert rest.edges[u, v, key]["score"] == pytest.approx(data["score"], abs=1e-5)


def test_the_search_stays_within_its_graph(tiny, task):
    tau = 0.02 * gap(tiny, task)
    first = acdc(tiny, task, tau=tau, progress=False)
    second = acdc(tiny, task, tau=5 * tau, graph=first, progress=False)
    assert 0 < size(second) < size(first) and names(second) < names(first)


def test_the_metric_may_be_the_divergence_from_the_model(tiny, task):
    divergence = task.with_metric(KLDivergence.of(tiny, task))
    circuit = acdc(tiny, divergence, tau=0.01, progress=False)
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
