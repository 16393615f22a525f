"""Agreement of edges, of two score sets, and with known circuits: against numpy and by counting."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import altered, made, random_task
from torch import Tensor

from circuits import agreement, assemble, auroc, draw, patch, top
from circuits.cli import _print_agreement
from circuits.graph import real_edges
from circuits.judge.agreement import points
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
    _print_agreement([scores], effect)
    said = [re.findall(r"[^\s│]+", line) for line in capsys.readouterr().out.splitlines()]
    assert ["head", "–", "(–)"] in said and ["mlp", "–", "(0.00)"] in said


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
