"""PARTWAY: the share of the way against loops, its ends, and what single parts get of each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import random_task

from relp import DEEPLIFT, GRADIENT, PARTWAY, RELP, Component, NodeScores, Rules, attribute
from relp.bridge.captures import capture
from relp.bridge.sites import Sites
from relp.partway import way, weight_of_both
from tasks import ioi


def share(scores: NodeScores, pair: int, component: str, pos: int) -> float:
    """φ by the text of `relp.partway`, from scores under DEEPLIFT and the gap alone."""
    table = dict(zip(scores.components, scores.nodes[pair].tolist(), strict=True))
    _, kind, layer, _ = Component.parse(component)
    stream = {"embed": "L0.resid", "resid": component}.get(kind, f"L{layer + 1}.resid")
    if stream in table:
        behind = table[stream]
    else:  # behind the last block only the answer position is read
        behind = [0.0] * len(table["embed"])
        behind[int(scores.lengths[pair]) - 1] = float(scores.gap[pair])
    s = table[component][pos]
    here = abs(s) + abs(behind[pos] - s)
    cut = here + sum(abs(value) for p, value in enumerate(behind) if p != pos)
    return abs(s) / (here * cut) ** 0.5 if here else 0.0


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("corruption", ["flip", "abc"])
def test_scores_lie_between_by_the_share_of_the_way(
    shipped: Any, direction: str, corruption: str
) -> None:
    task = ioi(shipped.tokenizer, pairs=2, seed=3, corruption=corruption)
    start, whole, found = (
        attribute(shipped, task, rules=r, direction=direction)
        for r in (GRADIENT, DEEPLIFT, PARTWAY)
    )
    assert found.rules == "PARTWAY" and found.components == whole.components
    for pair in range(2):
        for row, component in enumerate(found.components):
            for pos in range(int(found.lengths[pair])):
                phi = share(whole, pair, component, pos)
                assert 0 <= phi <= 1
                g, m = (float(s.nodes[pair, row, pos]) for s in (start, whole))
                expected = (1 - phi) * g + phi * m
                assert float(found.nodes[pair, row, pos]) == pytest.approx(
                    expected, rel=1e-3, abs=1e-3
                ), (component, pos)


def test_a_whole_cut_is_exact_and_what_does_little_has_the_derivative(shipped: Any) -> None:
    task = ioi(shipped.tokenizer, pairs=4, seed=0)
    start, found = (attribute(shipped, task, rules=r) for r in (GRADIENT, PARTWAY))
    # one token differs: its embedding is the whole cut, and its score the gap
    torch.testing.assert_close(found.nodes[:, 0].sum(-1), found.gap, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found.nodes[:, 0], attribute(shipped, task, rules=DEEPLIFT).nodes[:, 0]
    )
    small = found.nodes.abs() < 1e-3 * found.gap.abs()[:, None, None]
    assert small.float().mean() > 0.5
    close = (found.nodes - start.nodes).abs() <= 1e-2 * found.gap.abs()[:, None, None]
    assert close[small].all()


def test_swapping_the_runs_swaps_the_direction(shipped: Any) -> None:
    task = ioi(shipped.tokenizer, pairs=2, seed=0)
    swapped = replace(task, clean=task.corrupt, corrupt=task.clean)
    one = attribute(shipped, task, rules=PARTWAY, direction="noise").nodes
    torch.testing.assert_close(one, attribute(shipped, swapped, rules=PARTWAY).nodes)
    # what comes before the first token that differs is the same in both runs
    first = int((task.clean != task.corrupt).any(0).nonzero()[0])
    assert first > 0 and not one[..., :first].any()


def test_compared_with_itself_a_run_has_its_derivatives(shipped: Any) -> None:
    task, sites = ioi(shipped.tokenizer, pairs=2, seed=0), Sites.of(shipped)
    names = tuple(sites.points)
    both, start, whole = (
        capture(sites, task, rules, names, own="corrupt") for rules in (PARTWAY, GRADIENT, DEEPLIFT)
    )
    assert not whole.slopes and not start.slopes
    for name in names:
        assert torch.equal(both.coefficients[name], whole.coefficients[name]), name
        torch.testing.assert_close(
            both.slopes[name], start.coefficients[name], rtol=1e-4, atol=1e-5
        )
    assert both.at_start().reference is both.values and both.at_start().coefficients is both.slopes


def test_edges_have_the_mean_size_of_both_and_the_sign_of_their_sum(shipped: Any) -> None:
    task = ioi(shipped.tokenizer, pairs=3, seed=0)
    for positions in (False, "spans"):
        start, whole, found = (
            attribute(shipped, task, rules=r, level="edge", positions=positions).edges
            for r in (GRADIENT, DEEPLIFT, PARTWAY)
        )
        expected = (start.abs() + whole.abs()) / 2 * (start + whole).sign()
        clear = (start + whole).abs() > 1e-4  # where rounding does not choose the sign
        torch.testing.assert_close(found[clear], expected[clear], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.abs(), expected.abs(), rtol=1e-3, atol=1e-4)


def test_the_way_by_hand() -> None:
    # all of the cut; half of its position, which is a quarter of the cut; against the rest
    scores = torch.tensor([[[4.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]])
    stream = torch.tensor([[[4.0, 0.0], [2.0, 2.0], [1.0, 0.0], [0.0, 0.0]]])
    expected = [1.0, (1 / 2 * 1 / 4) ** 0.5, 1 / 3, 0.0]
    torch.testing.assert_close(way(scores, stream)[0, :, 0], torch.tensor(expected))
    assert not way(scores, stream)[0, :, 1].any()
    one, other = torch.tensor([[2.0, -2.0, 0.0]]), torch.tensor([[-4.0, -4.0, 0.0]])
    assert torch.equal(weight_of_both(one, other), torch.tensor([[-3.0, -3.0, 0.0]]))


def test_neurons_and_components_of_ones_own_choice(shipped: Any) -> None:
    task = ioi(shipped.tokenizer, pairs=2, seed=0)
    whole = attribute(shipped, task, rules=PARTWAY)
    some = attribute(shipped, task, rules=PARTWAY, components=["L2.mlp", "L2N3"])
    assert set(some.components) == {"L2N3", "L2.mlp"}
    mine = some.nodes[:, some.components.index("L2.mlp")]
    torch.testing.assert_close(mine, whole.nodes[:, whole.components.index("L2.mlp")])
    assert some.nodes[:, some.components.index("L2N3")].any()
    edges = attribute(shipped, task, rules=PARTWAY, level="edge", neurons=["L2N3"])
    assert edges.edges[edges.writers.index("L2N3")].any()


def test_rules_of_ones_own_can_be_partway() -> None:
    mine = PARTWAY.with_(softmax="constant")
    assert mine.partway and mine.name == "PARTWAY(softmax=constant)"
    with pytest.raises(ValueError, match="for rules that compare two runs; got rules of one run"):
        replace(RELP, partway=True)
    with pytest.raises(ValueError, match="`partway` is for rules that compare"):
        Rules("mine", partway=True)


def test_steps_are_refused(shipped: Any) -> None:
    with pytest.raises(ValueError, match="got 5 with PARTWAY; those rules know the whole way"):
        attribute(shipped, random_task(shipped, pairs=1), rules=PARTWAY, steps=5)
