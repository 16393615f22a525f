"""Score sets over circuit sizes: against single circuits, numbers by hand, and scipy."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import able_task, altered
from scipy import stats

from circuits import assemble, compare, evaluate, faithfulness, random, top
from circuits.graph import size
from circuits.judge.evaluation import SIZES, Evaluation
from circuits.judge.resampling import interval
from relp import GRADIENT, RELP, attribute


def evaluation(
    above: torch.Tensor, sizes: tuple[float, ...], gap: torch.Tensor | None = None
) -> Evaluation:
    """Circuits whose metric is `above` that of each pair's corrupt run; the gap is 2 if not given.

    No two pairs have the same corrupt metric, so that no number forgets it unnoticed.
    """
    rules, count, pairs = above.shape
    corrupt = torch.linspace(-3, 2, pairs)
    return Evaluation(
        model="m", task="t", rules=tuple(f"rules {i}" for i in range(rules)), sizes=sizes,
        edges=torch.ones(rules, count, dtype=torch.long), metric=corrupt + above,
        clean=corrupt + (2.0 if gap is None else gap), corrupt=corrupt, signed=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("positions", "signed", "direction"),
    [(False, False, "noise"), (True, True, "denoise"), (True, True, "noise")],
)
def test_equals_single_circuits(tiny: Any, positions: bool, signed: bool, direction: str) -> None:
    task = able_task(tiny, pairs=2, length=3)
    scores = attribute(tiny, task, level="edge", positions=positions, direction=direction)
    sizes = (0.05, 0.3, 1.0)
    found = evaluate(tiny, task, scores, sizes=sizes, signed=signed, random=0, progress=False)
    graph = assemble(scores)
    counts = [int(s * size(graph)) for s in sizes]
    circuits = [top(graph, edges=n, signed=signed, connected=False) for n in counts]
    assert found.rules == ("RELP",) and found.edges.tolist() == [counts]
    expected = faithfulness(tiny, task, circuits, progress=False)
    assert found.faithfulness[0].tolist() == pytest.approx(expected, abs=1e-5)
    table = found.to_dataframe()
    assert table["faithfulness"].tolist() == pytest.approx(expected, abs=1e-5)
    assert (table["low"] <= table["high"] + 1e-9).all()


def test_areas_by_hand() -> None:
    # f = 0 at a tenth, 1.5 at a half, 1 at all
    metric = torch.tensor([[0.0, 3.0, 2.0]])[..., None].expand(1, 3, 4)
    found = evaluation(metric, (0.1, 0.5, 1.0))
    row = found.areas().iloc[0]
    assert row["CPR"] == pytest.approx(0.4 * 0.75 + 0.5 * 1.25)
    assert row["CMD"] == pytest.approx(0.4 * 0.75 + 0.5 * 0.25)
    # all pairs are alike, so that resampling them changes nothing
    assert row["CPR_low"] == pytest.approx(row["CPR"]) == row["CPR_high"]
    html = found._repr_html_()
    assert re.findall(r"<th>(.*?)</th>", html)[1:6] == ["CPR", "CMD", "10.0%", "50.0%", "100.0%"]
    assert re.findall(r"<td>(.*?)</td>", html) == ["0.925", "0.425", "0.000", "1.500", "1.000"]
    assert "ranked by |score|" in repr(found)


def test_one_pair_has_no_interval_and_no_p_value(tiny: Any) -> None:
    found = evaluation(torch.tensor([[[1.0], [2.0]], [[0.5], [2.0]]]), (0.5, 1.0))
    areas, table = found.areas(), found.to_dataframe()
    compared = found.compare("rules 0", "rules 1")
    missing = [areas.filter(regex="low|high"), table[["low", "high"]]]
    missing.append(compared[["low", "high", "p_value"]])
    assert all(frame.isna().all(axis=None) for frame in missing)
    assert areas["CPR"].tolist() == pytest.approx([0.5 * 0.75, 0.5 * 0.625])
    assert table["faithfulness"].tolist() == pytest.approx([0.5, 1, 0.25, 1])
    assert compared["difference"].tolist() == pytest.approx([0.0625 * 1, -0.0625 * 1, 0.25, 0])
    assert "nan" not in found._repr_html_().lower()

    task = able_task(tiny, pairs=1, length=3)
    graph = assemble(attribute(tiny, task, level="edge"))
    (row,) = compare(tiny, task, graph, top(graph, edges=0)).itertuples()
    assert row.difference == pytest.approx(1, abs=1e-4)
    assert np.isnan([row.low, row.high, row.p_value]).all()


@pytest.mark.parametrize("pairs", [2, 3, 5])
def test_few_pairs_have_no_small_p_value(pairs: int) -> None:
    """However large a difference is, all swapped or none give it: 2 of 2^n."""
    above = torch.stack([torch.full((1, pairs), 2.0), torch.zeros(1, pairs)])
    found = evaluation(above, (1.0,)).compare("rules 0", "rules 1")
    assert found["p_value"].iloc[-1] == pytest.approx(2.0 ** (1 - pairs), abs=0.02)


def test_two_pairs_span_theirinterval() -> None:
    row = evaluation(torch.tensor([[[0.4, 1.2]]]), (1.0,)).to_dataframe().iloc[0]
    assert [row["low"], row["faithfulness"], row["high"]] == pytest.approx([0.2, 0.4, 0.6])


def test_no_p_value_is_below_the_number_of_draws() -> None:
    above = torch.stack([torch.full((1, 40), 2.0), torch.zeros(1, 40)])
    found = evaluation(above, (1.0,)).compare("rules 0", "rules 1")
    assert found["p_value"].iloc[-1] == 1 / 10_000


def test_samples_without_a_gap_leave_nointerval() -> None:
    found = evaluation(torch.ones(1, 1, 4), (1.0,), torch.tensor([3.0, -1.0, -1.0, 1.0]))
    row = found.to_dataframe().iloc[0]
    assert row["faithfulness"] == pytest.approx(2) and np.isnan([row["low"], row["high"]]).all()


def test_random_edges_are_mibs_baseline(tiny: Any) -> None:
    """MIB's grid, its random baseline's shape, and the same numbers for the same seed."""
    task = able_task(tiny, pairs=2, length=3)
    scores = attribute(tiny, task, level="edge")
    one, again, other = (
        evaluate(tiny, task, scores, random=2, seed=s, progress=False) for s in (0, 0, 1)
    )
    assert one.rules == ("RELP", "random 1", "random 2") and one.sizes == SIZES
    assert torch.equal(one.metric, again.metric)
    assert not torch.equal(one.metric[1:], other.metric[1:])
    assert not torch.equal(one.metric[1], one.metric[2])
    assert (one.edges == one.edges[0]).all()
    torch.testing.assert_close(one.faithfulness[:, -1], torch.ones(3), atol=1e-4, rtol=0)


def test_intervals_are_scipys() -> None:
    generator = torch.Generator().manual_seed(0)
    values = 1 + torch.rand(1, 1, 12, generator=generator)
    clean = 2 + torch.rand(12, generator=generator)
    found = evaluation(values, (1.0,), clean)
    expected = stats.bootstrap(
        (values[0, 0].double().numpy(), clean.double().numpy()),
        lambda m, c, axis=-1: m.mean(axis) / c.mean(axis),
        paired=True, method="percentile", n_resamples=9999, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    row = found.to_dataframe().iloc[0]
    width = expected.high - expected.low
    assert row["low"] == pytest.approx(expected.low, abs=0.05 * width)
    assert row["high"] == pytest.approx(expected.high, abs=0.05 * width)


def test_the_paired_test_is_scipys() -> None:
    generator = torch.Generator().manual_seed(3)
    metric = torch.randn(2, 1, 10, generator=generator)
    metric[1] += 0.2
    found = evaluation(metric, (1.0,)).compare("rules 1", "rules 0")
    assert found["measure"].tolist() == ["CPR", "CMD", "faithfulness at 100.0%"]
    row = found.iloc[2]
    one, other = metric[1, 0].double().numpy(), metric[0, 0].double().numpy()
    expected = stats.permutation_test(
        (one, other), lambda a, b, axis=-1: a.mean(axis) - b.mean(axis),
        permutation_type="samples", vectorized=True, n_resamples=np.inf,
    )  # fmt: skip
    assert 0.01 < expected.pvalue < 0.5
    assert row["p_value"] == pytest.approx(expected.pvalue, abs=0.02)
    assert row["difference"] == pytest.approx(float(expected.statistic) / 2)
    assert row["low"] < row["difference"] < row["high"]


def test_comparing_circuits(tiny: Any) -> None:
    task = able_task(tiny, pairs=6, length=3)
    graph = assemble(attribute(tiny, task, level="edge"))
    circuit, drawn = top(graph, edges=60), random(graph, edges=60, seed=1)
    shares = faithfulness(tiny, task, [circuit, drawn], progress=False)
    (row,) = compare(tiny, task, circuit, drawn).itertuples()
    assert row.difference == pytest.approx(shares[0] - shares[1], abs=1e-5)
    (same,) = compare(tiny, task, circuit, circuit).itertuples()
    assert same.difference == same.low == same.high == 0 and same.p_value == 1


def test_an_interval_leaves_a_fortieth_at_each_end() -> None:
    """Of samples that are spread evenly, and are no matter of the order they come in."""
    samples = np.linspace(0, 1, 1001)[::-1, None] * [1.0, -2.0]
    low, high = interval(samples)
    assert low == pytest.approx([0.025, -1.95]) and high == pytest.approx([0.975, -0.05])


def test_scores_that_do_not_fit_are_refused(tiny: Any) -> None:
    task = able_task(tiny, length=3)
    scores = attribute(tiny, task, level="edge")
    for wrong, message in (
        (
            [],
            "^evaluate needs one set of scores or more, and sizes that ascend in "
            r"\(0, 1\]; got 0 and \[0.001, .*, 1.0\]; leave `sizes` out for those of MIB$",
        ),
        ([scores, scores], r"must have its own name; got \['RELP', 'RELP'\]"),
        (attribute(tiny, task), "needs finite edge scores; those of 'RELP' are of nodes"),
        (replace(scores, edges=scores.edges * float("nan")), "or hold NaN"),
        (
            altered(scores, writers=scores.writers[::-1], model="other"),
            "are of 'other', have other neurons than the first, or are not of 'tiny-",
        ),
        (
            [
                attribute(tiny, task, level="edge", positions="spans"),
                attribute(tiny, task, level="edge").renamed("summed"),
            ],
            r"by span must all be so, .* those of 'summed' have none, the task \('end',\); compute",
        ),
        (
            attribute(tiny, able_task(tiny, length=2), level="edge", positions=True),
            r"prompts of their 2 positions; the task has lengths \[3\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(tiny, task, wrong)
    for sizes in ((0.5, 0.1), (0.0, 1.0), (0.5, 2.0)):
        with pytest.raises(ValueError, match=r"sizes that ascend in \(0, 1\]"):
            evaluate(tiny, task, scores, sizes=sizes)
    found = evaluate(tiny, task, scores, sizes=(1.0,), progress=False)
    with pytest.raises(ValueError, match=r"must be one of \('RELP', 'random'\); got 'GIM'"):
        found.compare("RELP", "GIM")


def test_rules_are_compared_on_the_same_pairs(shipped: Any) -> None:
    from tasks import ioi

    task = ioi(shipped.tokenizer, pairs=4, seed=0)
    scores = [attribute(shipped, task, rules=r, level="edge") for r in (RELP, GRADIENT)]
    held_out = ioi(shipped.tokenizer, pairs=4, seed=1)
    found = evaluate(shipped, held_out, scores, progress=False).areas().set_index("rules")
    assert (found.loc[["RELP", "GRADIENT"], "CMD"] < 0.1).all()
    assert found.loc["random", "CMD"] > 0.5
