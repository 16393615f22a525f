"""Agreement of edges, of two score sets, and with known circuits: against numpy and by counting."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import altered, made, random_task
from scipy import stats
from torch import Tensor

from circuits import agreement, agreement_tests, assemble, auroc, draw, patch, top, verify
from circuits.cli.estimates import print_agreement
from circuits.graph import real_edges
from circuits.judge.agreement import points
from circuits.judge.measures import WITHIN, Cells
from circuits.judge.resampling import holm, redrawn, resamples
from relp import GRADIENT, RELP, EdgeEffects, Effects, Scores, attribute
from relp.scores import ALL_POSITIONS

LABELS = {"model": "m", "task": "t", "rules": "r", "direction": "denoise", "metric": "x"}


def nodes(values: list[list[float]], **labels: Any) -> Scores:
    """One pair and one position; heads L0H0, L0H1, … and the MLP."""
    table = torch.tensor(values)[..., None]
    heads = [f"L0H{h}" for h in range(table.shape[1] - 1)]
    return made(
        **(LABELS | labels), components=(*heads, "L0.mlp"), nodes=table,
        clean=torch.ones(len(table)), corrupt=torch.zeros(len(table)),
        lengths=torch.ones(len(table), dtype=torch.long),
    )  # fmt: skip


def test_overlap_and_error_by_hand() -> None:
    effect = nodes([[4.0, -3.0, 2.0, 1.0, 0.0, 9.0], [0.0, 0.0, 5.0, 0.0, 0.0, 9.0]])
    scores = nodes([[3.0, 1.0, -4.0, 2.0, 0.0, 9.0], [1.0, 0.0, 5.0, 0.0, 0.0, 8.0]])
    row = agreement(scores, effect, k=2).set_index("kind").loc["head"]
    # pair 0: {4, -3} against {-4, 3}: one of two; pair 1 has a single effect: one of one
    assert row["overlap"] == pytest.approx((0.5 + 1) / 2)
    first = np.sqrt(1 + 16 + 36 + 1) / np.sqrt(16 + 9 + 4 + 1)
    assert row["relative_error"] == pytest.approx((first + 1 / 5) / 2)
    assert row["pairs"] == 1  # the correlation of a single effect is worth nothing
    assert row["pearson"] == pytest.approx(np.corrcoef([4, -3, 2, 1, 0], [3, 1, -4, 2, 0])[0, 1])
    with pytest.raises(ValueError, match="`k` must be at least 1; got 0"):
        agreement(scores, effect, k=0)


def test_three_effects_have_a_correlation_and_two_have_none() -> None:
    effect = nodes([[4.0, -3.0, 2.0, 0.0, 9.0], [4.0, -3.0, 0.0, 0.0, 9.0]])
    scores = nodes([[3.0, 1.0, -4.0, 2.0, 9.0], [3.0, 1.0, -4.0, 2.0, 9.0]])
    row = agreement(scores, effect).set_index("kind").loc["head"]
    assert row["pairs"] == 1
    assert row["pearson"] == pytest.approx(np.corrcoef([4, -3, 2, 0], [3, 1, -4, 2])[0, 1])


NOISE = 2.0**-20


def test_effects_within_their_resolution_count_as_zero() -> None:
    values = [[4.0, -3.0, 2.0, NOISE, -NOISE, 9.0], [0.0, 0.0, 5.0, NOISE / 2, -NOISE, 9.0]]
    effect = nodes(values, resolution=NOISE)
    scores = nodes([[3.0, 1.0, -4.0, 2.0, 1.0, 9.0], [2.0, 0.0, 5.0, 0.0, 1.0, 8.0]])
    table = agreement(scores, effect).set_index("kind")
    row = table.loc["head"]
    # four of ten; two more are 0 as their score is, so that nothing may have changed there
    assert row["unresolved"] == pytest.approx(4 / 8) and table.loc["mlp", "unresolved"] == 0
    # they stay in the correlation, as 0; the second pair has a single effect
    expected = np.corrcoef([4, -3, 2, 0, 0], [3, 1, -4, 2, 1])[0, 1]
    assert row["pearson"] == pytest.approx(expected, abs=1e-12) and row["pairs"] == 1
    # three real effects, of which all are among the three largest scores but one; one of one
    assert row["overlap"] == pytest.approx((2 / 3 + 1) / 2)
    errors = np.sqrt(1 + 16 + 36 + 4 + 1) / np.sqrt(16 + 9 + 4), np.sqrt(4 + 1) / 5
    assert row["relative_error"] == pytest.approx(np.mean(errors), abs=1e-12)

    above = nodes(values, resolution=NOISE / 2)
    row = agreement(scores, above).set_index("kind").loc["head"]
    assert row["pairs"] == 1 and row["unresolved"] == pytest.approx(1 / 8)
    row = agreement(scores, nodes(values)).set_index("kind").loc["head"]
    assert row["pairs"] == 2 and row["unresolved"] == 0  # nothing was said about noise


def test_noise_alone_agrees_with_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    effect = nodes([[NOISE, -NOISE, NOISE / 2, NOISE / 3, 9.0]], resolution=NOISE)
    scores = nodes([[1.0, -1.0, 0.5, 0.3, 9.0]])
    row = agreement(scores, effect).set_index("kind").loc["head"]
    assert row[["pearson", "spearman", "relative_error", "overlap"]].isna().all()
    assert row["pairs"] == 0 and row["unresolved"] == 1
    # as scores they are no better: all zero, they do not vary
    row = agreement(effect, scores).set_index("kind").loc["head"]
    assert np.isnan(row["pearson"]) and row["unresolved"] == 0 and row["relative_error"] == 1
    print_agreement([scores], effect)
    said = [re.findall(r"[^\s│]+", line) for line in capsys.readouterr().out.splitlines()]
    # where nothing correlates there is no choice of the largest to overlap, and no column for it
    assert ["head", "r", *"–––––", "0"] in said
    assert ["mlp", "r", *"–––", "1.00", "0.00", "1"] in said


def test_noise_is_no_effect_before_positions_are_summed_nor_in_figures() -> None:
    wide = torch.tensor([[[NOISE, NOISE, 2.0], [NOISE, NOISE, NOISE], [3.0, 0.0, -1.0]]])
    labels: dict[str, Any] = {
        "clean": torch.ones(1), "corrupt": torch.zeros(1), "components": ("L0H0", "L0H1", "L0H2")
    }  # fmt: skip
    one = made(Effects, **LABELS, **labels, nodes=wide, lengths=torch.tensor([3]), resolution=NOISE)
    together = made(
        Effects, **LABELS, **labels, nodes=torch.tensor([[[2.0], [NOISE], [1.0]]]),
        lengths=torch.tensor([3]), tokens=ALL_POSITIONS, resolution=NOISE,
    )  # fmt: skip
    ((kind, [(x, y)]),) = points(one, together)
    assert kind == "head" and x.tolist() == [2, 0, 2] and y.tolist() == [2, 0, 1]
    shown = draw(one, together, kind="head").data[1]
    assert list(shown.x) == [2, 0, 1] and list(shown.y) == [2, 0, 2]
    (row,) = auroc(one, ["L0H1"]).itertuples()
    assert row.auroc == 0


def test_what_lies_behind_a_prompts_end_is_no_effect_of_zero() -> None:
    x = torch.tensor([[[1.0, 2, 0], [4, -3, 0]], [[1.0, -2, 3], [2, 5, 1]]])
    y = torch.tensor([[[2.0, 1, 0], [5, 1, 0]], [[1.0, 2, -3], [1, 4, 2]]])
    one, other = (
        made(
            **LABELS, clean=torch.ones(2), corrupt=torch.zeros(2), lengths=torch.tensor([2, 3]),
            components=("L0H0", "L0H1"), nodes=table, resolution=NOISE,
        )
        for table in (x, y)
    )  # fmt: skip
    (row,) = agreement(one, other).itertuples()
    first = np.corrcoef(x[0, :, :2].flatten(), y[0, :, :2].flatten())[0, 1]
    second = np.corrcoef(x[1].flatten(), y[1].flatten())[0, 1]
    assert row.pearson == pytest.approx((first + second) / 2) and row.unresolved == 0


def test_noise_of_edges_is_no_effect_and_what_was_not_measured_stays_so(tiny: Any) -> None:
    task = random_task(tiny, length=3)
    scores = attribute(tiny, task, level="edge")
    only = torch.tensor([r.endswith(".q") for r in scores.readers])
    values = scores.edges[scores.layout.exists & only]
    limit = float(values.abs().median())
    measured = torch.where(only, scores.edges, torch.nan)
    effect = altered(scores, edges=measured, rules="exact", resolution=limit)
    row = agreement(scores, effect).set_index("kind").loc["q"]
    assert row["unresolved"] == pytest.approx(float((values.abs() <= limit).double().mean()))
    assert 0 < row["unresolved"] < 1
    real = torch.where(values.abs() <= limit, 0, values)
    assert row["relative_error"] == pytest.approx(float((values - real).norm() / real.norm()))


@pytest.mark.parametrize("positions", [False, True])
def test_edges_are_compared_by_slot(tiny: Any, positions: bool) -> None:
    task = random_task(tiny, length=3)
    one, other = (
        attribute(tiny, task, rules=r, level="edge", positions=positions) for r in (GRADIENT, RELP)
    )
    table = agreement([one, other], other).set_index(["rules", "kind"])
    assert list(table.loc["RELP"].index) == ["edge", "q", "k", "v", "in"]
    assert (table.loc["RELP", "pearson"] > 1 - 1e-9).all()
    assert (table["pairs"] == len(task)).all()
    frames = [s.to_dataframe() for s in (one, other)]
    for kind in ("edge", "q", "in"):
        rows = slice(None) if kind == "edge" else frames[0]["slot"] == kind
        x, y = (f.loc[rows, "score"].to_numpy() for f in frames)
        row = table.loc[("GRADIENT", kind)]
        assert row["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
        error = np.linalg.norm(x - y) / np.linalg.norm(y)
        assert row["relative_error"] == pytest.approx(error, rel=1e-5)
        best = [set(np.argsort(-abs(v))[:10]) for v in (x, y)]
        assert row["overlap"] == len(best[0] & best[1]) / 10


def test_edges_that_were_not_measured_are_left_out(tiny: Any) -> None:
    task = random_task(tiny, length=3)
    scores = attribute(tiny, task, level="edge")
    only = torch.tensor([r.endswith(".q") for r in scores.readers])
    measured = torch.where(only, scores.edges, torch.nan)
    effect = EdgeEffects(**{**vars(scores), "edges": measured}).renamed("exact")
    table = agreement(scores, effect).set_index("kind")
    assert list(table.index) == ["edge", "q"] and (table["relative_error"] == 0).all()


def test_effects_of_all_positions_are_compared_with_sums(tiny: Any) -> None:
    task, kinds = random_task(tiny, length=3), ["head", "mlp"]
    effect = patch(tiny, task, components=kinds, positions=False)
    scores = attribute(tiny, task)
    assert scores.nodes is not None and effect.nodes is not None and effect.nodes.shape[-1] == 1
    row = agreement(scores, effect).set_index("kind").loc["head"]
    x = scores.of_kind("head")[1].sum(-1).numpy()
    y = effect.of_kind("head")[1][..., 0].numpy()
    each = [np.corrcoef(a, b)[0, 1] for a, b in zip(x, y, strict=True)]
    assert row["pearson"] == pytest.approx(np.mean(each), abs=1e-5)
    errors = np.linalg.norm(x - y, axis=1) / np.linalg.norm(y, axis=1)
    assert row["relative_error"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert agreement(effect, effect)["relative_error"].tolist() == [0.0, 0.0]
    points = draw(scores, effect, kind="head").data[1]
    np.testing.assert_allclose(points.y, x.flatten(), rtol=1e-5)


def test_effects_that_are_all_equal_have_no_correlation() -> None:
    effect = nodes([[2.0, 2.0 + 1e-6, 2.0, 9.0]])
    (row, _) = agreement(nodes([[1.0, 2.0, 3.0, 9.0]]), effect).itertuples()
    assert np.isnan(row.pearson) and row.pairs == 0
    assert row.relative_error == pytest.approx(np.sqrt(2 / 12), rel=1e-5)


def test_scores_of_different_shapes_are_refused(tiny: Any) -> None:
    task = random_task(tiny, length=3)
    edges = attribute(tiny, task, level="edge")
    with pytest.raises(ValueError, match="same positions and components; got "):
        agreement(edges, attribute(tiny, task, level="edge", positions=True))
    with pytest.raises(ValueError, match="must be of the same level; got 'node' and 'edge'"):
        agreement(attribute(tiny, task), edges)
    scores = nodes([[1.0, 2.0, 3.0]])
    missing = replace(scores, components=("L0H0", "L7H7", "L0.mlp"))
    with pytest.raises(ValueError, match=r"unknown to the scores: \['L7H7'\]"):
        agreement(scores, missing)


def test_spans_are_no_positions_even_if_they_are_as_many(tiny: Any) -> None:
    task = random_task(tiny, length=2)
    position, span = (
        attribute(tiny, task, level="edge", positions=kept) for kept in (True, "spans")
    )
    assert span.edges.shape == position.edges.shape
    nodes = attribute(tiny, task)
    for one, other in ((span, position), (nodes.by_span(), nodes)):
        with pytest.raises(ValueError, match=r"the same places; got \('end', 'other'\) and \(\);"):
            agreement(one, other)
    with pytest.raises(ValueError, match="check the names, or `positions` of the scores"):
        auroc(span, top(assemble(position), edges=9))


def counted(inside: Tensor, outside: Tensor) -> float:
    """How often one inside is larger than one outside, ties half, pair by pair."""
    one, other = inside.abs()[:, None], outside.abs()[None]
    return float(((one > other).double() + (one == other).double() / 2).mean())


def test_auroc_of_components_is_a_count_of_pairs(tiny: Any) -> None:
    task = random_task(tiny, length=3)
    scores = attribute(tiny, task)
    edges = attribute(tiny, task, level="edge")
    known = ["L0H1", "L1H2", "L2H0", "L1.mlp"]
    table = auroc([scores, edges.renamed("edges")], known).set_index(["rules", "kind"])
    assert list(table.loc["RELP"].index) == ["head", "mlp"]
    heads, values = scores.of_kind("head")
    total = values.sum(-1).mean(0)
    inside = torch.tensor([h in known for h in heads])
    row = table.loc[("RELP", "head")]
    assert row["auroc"] == pytest.approx(counted(total[inside], total[~inside]))
    assert (row["known"], row["others"]) == (3, 9)
    # a writer's edge scores sum to its node score
    assert table.loc["edges", "auroc"].tolist() == pytest.approx(
        table.loc["RELP", "auroc"].tolist()
    )
    with pytest.raises(ValueError, match="L9H9 is not one of 'tiny-"):
        auroc(scores, ["L9H9"])
    some = verify(tiny, task, scores, budget=20, progress=False)
    with pytest.raises(ValueError, match="must be numbers to be ranked; .* are NaN, or not"):
        auroc(some, known)


def test_ties_count_half() -> None:
    scores = nodes([[1.0, -1.0, 1.0, 0.0, 5.0]])
    (row,) = auroc(scores, ["L0H0"]).itertuples()
    assert row.auroc == pytest.approx((0.5 + 0.5 + 1) / 3)
    noise = nodes([[NOISE, -NOISE, 0.0, 1.0, 5.0]], resolution=NOISE)
    (row,) = auroc(noise, ["L0H0"]).itertuples()
    assert row.auroc == pytest.approx((0.5 + 0.5 + 0) / 3)


@pytest.mark.parametrize("positions", [False, True])
def test_auroc_of_a_graph(tiny: Any, positions: bool) -> None:
    task = random_task(tiny, length=3)
    scores = attribute(tiny, task, level="edge", positions=positions)
    circuit = top(assemble(scores), edges=25, connected=False)
    (row,) = auroc(scores, circuit).itertuples()
    assert (row.kind, row.auroc, row.known) == ("edge", 1.0, 25)
    assert row.known + row.others == circuit.graph["total_edges"]
    found = auroc(attribute(tiny, task), circuit).set_index("kind")
    heads = {u for u, _, _, _ in real_edges(circuit)} | {v for _, v, _, _ in real_edges(circuit)}
    assert found.loc["head", "known"] == sum("H" in name for name in heads)


# -- each measure by a second implementation -------------------------------------------------------


def several(seed: int = 0, **labels: Any) -> tuple[Scores, Scores]:
    """Scores and effects of four pairs, some below a floor; 12 heads and the MLP."""
    generator = np.random.default_rng(seed)
    y = generator.standard_t(2, (4, 13)) * 0.1
    x = y + 0.1 * generator.standard_normal(y.shape)
    return nodes(x.tolist()), nodes(y.tolist(), **labels)


def heads(scores: Any) -> np.ndarray:
    return scores.of_kind("head")[1][..., 0].double().numpy()


def test_each_measure_is_numpys_and_scipys() -> None:
    scores, effect = several()
    x, y = heads(scores), heads(effect)
    row = agreement(scores, effect, floor=0.05).set_index("kind").loc["head"]
    above = abs(y) > 0.05  # the gap of each pair is 1
    assert 0 < above.sum() < above.size and row["cells"] == above.sum()
    each = {
        "pearson": [np.corrcoef(a, b)[0, 1] for a, b in zip(x, y, strict=True)],
        "pearson_rest": [
            np.corrcoef(np.delete(a, abs(b).argmax()), np.delete(b, abs(b).argmax()))[0, 1]
            for a, b in zip(x, y, strict=True)
        ],
        "spearman": [
            stats.spearmanr(a[at], b[at])[0] for a, b, at in zip(x, y, above, strict=True)
        ],
        "signs": [((a > 0) == (b > 0))[at].mean() for a, b, at in zip(x, y, above, strict=True)],
        "peak": [(b**2).max() / (b**2).sum() for b in y],
    }
    for name, values in each.items():
        assert row[name] == pytest.approx(np.mean(values), abs=1e-9), name
    assert row["pearson_pooled"] == pytest.approx(np.corrcoef(x.ravel(), y.ravel())[0, 1])
    assert row["spearman_pooled"] == pytest.approx(stats.spearmanr(x[above], y[above])[0])
    everything = agreement(scores, effect, floor=0.0).set_index("kind").loc["head"]
    assert everything["cells"] == y.size
    assert everything["spearman_pooled"] == pytest.approx(stats.spearmanr(x.ravel(), y.ravel())[0])


def test_one_cell_that_decides_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    # a large one that every estimate finds, and noise that none does
    y = [[10.0, 0.3, -0.2, 0.1, -0.3, 0.2, 1.0], [10.0, 0.1, 0.2, -0.2, 0.3, -0.1, 1.0]]
    x = [[9.0, -0.2, 0.3, 0.2, -0.1, -0.1, 1.0], [8.0, 0.3, -0.2, 0.1, 0.1, 0.2, 1.0]]
    row = agreement(nodes(x), nodes(y)).set_index("kind").loc["head"]
    assert row["pearson"] > 0.99 and row["pearson_rest"] < 0.3 and row["peak"] > 0.99
    assert row["hangs"]
    even = [[1.0, -1.0, 1.1, -0.9, 1.2, -1.2, 1.0]]
    row = agreement(nodes(even), nodes(even)).set_index("kind").loc["head"]
    assert row["peak"] < 0.3 and not row["hangs"]
    print_agreement([nodes(x)], nodes(y))
    said = capsys.readouterr().out
    assert re.search(r"[01]\.\d{3}\* +│ +-?0\.\d+ ", said) and "*: one cell decides r" in said


def test_the_floor_is_a_share_of_the_gap_and_never_below_rounding(tiny: Any) -> None:
    effect = nodes([[0.5, -0.25, 0.125, 0.0625, 0.0, 9.0]], resolution=0.1)
    scores = nodes([[0.5, 0.25, 0.125, -0.0625, 1.0, 9.0]])
    for floor, cells, right in ((0.0, 3, 2 / 3), (0.2, 2, 1 / 2), (0.3, 1, 1)):
        row = agreement(scores, effect, floor=floor).set_index("kind").loc["head"]
        assert row["cells"] == cells and row["signs"] == pytest.approx(right)
    edges = attribute(tiny, random_task(tiny, length=3), level="edge")
    row = agreement(edges, edges, floor=0.01).set_index("kind").loc["edge"]
    values = edges.edges[edges.layout.exists].abs()
    assert row["cells"] == int((values > 0.01 * edges.gap.mean().abs()).sum()) > 0


def test_intervals_are_those_of_pairs_drawn_again() -> None:
    scores, effect = several()
    x, y = heads(scores), heads(effect)
    found = agreement(scores, effect, seed=3).set_index("kind").loc["head"]
    expected: dict[str, list[float]] = {"pearson": [], "pearson_pooled": [], "relative_error": []}
    for weights in resamples(4, 3):
        drawn = np.repeat(np.arange(4), np.round(4 * weights).astype(int))
        a, b = x[drawn], y[drawn]
        expected["pearson"].append(np.mean([np.corrcoef(*v)[0, 1] for v in zip(a, b, strict=True)]))
        expected["pearson_pooled"].append(np.corrcoef(a.ravel(), b.ravel())[0, 1])
        errors = np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)
        expected["relative_error"].append(errors.mean())
    for name, samples in expected.items():
        low, high = np.quantile(samples, [0.025, 0.975])
        assert [found[f"{name}_low"], found[f"{name}_high"]] == pytest.approx([low, high]), name
        assert low < found[name] < high


def test_one_pair_and_edges_have_no_intervals(tiny: Any) -> None:
    edges = attribute(tiny, random_task(tiny, length=3), level="edge")
    one = nodes([[3.0, 1.0, -4.0, 2.0, 9.0]])
    # the second pair has no correlation: one is left, of which nothing can be drawn
    two = nodes([[4.0, -3.0, 2.0, 1.0, 9.0], [4.0, 0.0, 0.0, 0.0, 9.0]])
    assert agreement(edges, edges).filter(regex="_(low|high)$").isna().all(axis=None)
    assert agreement(one, one).filter(regex="_(low|high)$").isna().all(axis=None)
    row = agreement(two, two).set_index("kind").loc["head"]
    assert row["pairs"] == 1 and np.isnan(row["pearson_low"]) and row["signs_low"] == 1
    # nor if all that is pooled is of one pair
    two = nodes([[4.0, -3.0, 2.0, 1.0, 9.0], [0.0, 0.0, 0.0, 0.0, 9.0]])
    row = agreement(two, two).set_index("kind").loc["head"]
    assert row["spearman_pooled"] == pytest.approx(1) and np.isnan(row["spearman_pooled_low"])


def test_layers_are_rows(tiny: Any) -> None:
    task = random_task(tiny, length=3)
    one, other = (attribute(tiny, task, rules=r) for r in (GRADIENT, RELP))
    table = agreement(one, other, by_layer=True).set_index(["kind", "layer"])
    assert list(table.loc["mlp"].index) == [0, 1, 2] and list(table.loc["embed"].index) == [-1]
    names, x = one.of_kind("head")
    at = [n.startswith("L1H") for n in names]
    y = other.of_kind("head")[1][:, at].flatten(1).double().numpy()
    each = [np.corrcoef(a, b)[0, 1] for a, b in zip(x[:, at].flatten(1).numpy(), y, strict=True)]
    assert table.loc[("head", 1), "pearson"] == pytest.approx(np.mean(each), abs=1e-5)
    edges = attribute(tiny, task, level="edge")
    table = agreement(edges, edges, by_layer=True).set_index(["kind", "layer"])
    assert list(table.loc["in"].index) == [-1, 0, 1, 2]  # the logits have no layer


def test_nodes_that_were_not_measured_are_left_out() -> None:
    scores, effect = several()
    holes = effect.nodes.clone()
    holes[:, [1, 4]] = torch.nan
    keep = [i for i in range(13) if i not in (1, 4)]
    fewer = [
        replace(s, nodes=s.nodes[:, keep], components=tuple(s.components[i] for i in keep))
        for s in (scores, effect)
    ]
    found, expected = agreement(scores, replace(effect, nodes=holes)), agreement(*fewer)
    pd.testing.assert_frame_equal(found, expected)
    shown = draw(scores, replace(effect, nodes=holes), kind="head").data[1]
    assert len(shown.x) == 4 * 10
    with pytest.raises(ValueError, match="effects were measured; 8 of 'r' are NaN; compute them"):
        agreement(replace(scores, nodes=holes), effect)


# -- samples of cells ------------------------------------------------------------------------------


def test_a_cell_that_stands_for_three_counts_three_times() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((2, 9)).round(1)  # some are tied
    times = generator.integers(1, 4, 9)
    # in the draw that might have been made, each stands for itself
    cells = Cells(x, y, times.astype(float), np.ones((1, (times > 1).sum())), floor=0.3)
    none = np.empty((0, 0))
    each = Cells(np.repeat(x, times), np.repeat(y, times), np.ones(times.sum()), none, floor=0.3)
    plain = Cells(x, y, np.ones(9), none, floor=0.3)
    for name, of in WITHIN.items():
        if name != "pearson_rest":  # the largest is left out with all that it stands for
            assert of(cells) == pytest.approx([of(each)[0], of(plain)[0]], abs=1e-12), name
    at = abs(each.effect) > 0.3
    assert WITHIN["spearman"](cells)[0] == pytest.approx(
        stats.spearmanr(each.score[at], each.effect[at])[0]
    )


def test_cells_drawn_again_vary_as_the_sample_does() -> None:
    """The variance of a total, as textbooks have it, in strata of which a part was drawn."""
    generator = np.random.default_rng(0)
    stratum = np.repeat([0, 1, 2], [3, 8, 20])
    weight = np.repeat([1.0, 2.5, 4.0], [3, 8, 20])
    values = generator.standard_normal(31)
    totals = redrawn(weight, stratum, 0) @ values
    assert len(totals) == 999
    expected = 0.0
    for number, size in ((1, 20), (2, 80)):
        v = values[stratum == number]
        expected += size**2 * (1 - len(v) / size) * v.var(ddof=1) / len(v)
    assert totals.var() == pytest.approx(expected, rel=0.15)
    assert totals.mean() == pytest.approx(weight @ values, abs=4 * np.sqrt(expected / 999))


# -- tests -----------------------------------------------------------------------------------------


def test_differences_are_tested_as_scipy_does() -> None:
    scores, effect = several()
    worse = replace(scores, nodes=scores.nodes + 0.2 * torch.randn(scores.nodes.shape,
                    generator=torch.Generator().manual_seed(1))).renamed("worse")  # fmt: skip
    table = agreement_tests([scores, worse], effect, measures=["relative_error", "pearson"])
    row = table.set_index(["kind", "measure"]).loc[("head", "relative_error")]
    x, z, y = heads(scores), heads(worse), heads(effect)
    one, other = (np.linalg.norm(v - y, axis=1) / np.linalg.norm(y, axis=1) for v in (x, z))
    expected = stats.permutation_test(
        (one, other), lambda a, b, axis=-1: (a - b).mean(axis), permutation_type="samples",
        vectorized=True, n_resamples=np.inf,
    )  # fmt: skip
    assert row["difference"] == pytest.approx(float(expected.statistic))
    assert row["p_value"] == pytest.approx(expected.pvalue) and row["pairs"] == 4
    assert row["low"] < row["difference"] < row["high"] < 0
    # swapping all or none: the least of four pairs
    assert row["p_value"] == 2 / 2**4
    same = agreement_tests([scores, scores.renamed("again")], effect).set_index("kind").loc["head"]
    assert (same["difference"] == 0).all() and (same["p_value"] == 1).all()


def test_holm_by_hand() -> None:
    found = holm(np.array([0.04, 0.01, np.nan, 0.03, 0.9]))
    # .01 · 4, .03 · 3, then .04 · 2 = .08, raised to the .09 before it, and .9
    assert found == pytest.approx([0.09, 0.04, np.nan, 0.09, 0.9], nan_ok=True)
    assert len(holm(np.array([]))) == 0


def test_which_sets_are_compared() -> None:
    scores, effect = several()
    many = [scores.renamed(n) for n in "abc"]
    table = agreement_tests(many, effect, measures=["pearson"])
    head = table[table["kind"] == "head"]
    assert list(zip(head["one"], head["other"], strict=True)) == [
        ("a", "b"), ("a", "c"), ("b", "c"),
    ]  # fmt: skip
    table = agreement_tests(many, effect, measures=["pearson"], baseline="b")
    head = table[table["kind"] == "head"]
    assert list(zip(head["one"], head["other"], strict=True)) == [("a", "b"), ("c", "b")]
    assert table[table["kind"] == "mlp"]["p_value"].isna().all()
    alone = [nodes([[3.0, 1.0, -4.0, 2.0, 9.0]]).renamed(n) for n in "ab"]
    table = agreement_tests(alone, alone[0]).set_index("kind").loc["head"]
    assert table[["low", "high", "p_value", "p_holm"]].isna().all(axis=None)


def test_tests_that_cannot_be_made_are_refused(tiny: Any) -> None:
    scores, effect = several()
    two = [scores, scores.renamed("b")]
    for many, options, message in (
        ([scores], {}, r"need two sets of scores or more, each with its own name; got \['r'\]"),
        ([scores, scores], {}, r"got \['r', 'r'\]; rename one with"),
        (two, {"measures": ["pearson_pooled"]}, r"got \['pearson_pooled'\]; what is pooled has no"),
        (two, {"measures": []}, "must be some of .* got none"),
        (two, {"baseline": "GIM"}, r"`baseline` must be one of \['r', 'b'\]; got 'GIM'"),
        (two, {"floor": -1.0}, "`floor` must be a share of the gap, 0 or more; got -1.0"),
        (two, {"k": 0}, "`k` must be at least 1; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            agreement_tests(many, effect, **options)
    edges = attribute(tiny, random_task(tiny, length=3), level="edge")
    with pytest.raises(ValueError, match="edge scores are means over pairs already; call"):
        agreement_tests([edges, edges.renamed("b")], edges)
    with pytest.raises(ValueError, match="`floor` must be a share of the gap"):
        agreement(scores, effect, floor=float("nan"))


def test_there_must_be_scores_to_judge() -> None:
    effect = nodes([[4.0, -3.0, 2.0, 1.0]])
    for verb in (agreement, lambda s, e: agreement_tests(s, e)):
        with pytest.raises(ValueError, match="`scores` must be one set or more; got none|two sets"):
            verb([], effect)
