"""Exact effects within a budget: what is drawn, what it stands for, and what it may have missed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import altered, made, random_task

from circuits import agreement, draw, missed, patch, verify
from circuits.exact.sample import CERTAIN, drawn
from relp import GRADIENT, RELP, Effects, NodeEffects, Scores, attribute
from relp.bridge import Rerun
from tasks import ioi


def sampled(strength: Any, kind: Any, budget: int, seed: int = 0, idle: Any = None) -> Any:
    strength, kind = np.atleast_2d(np.asarray(strength, dtype=float)), np.asarray(kind)
    idle = np.zeros(len(kind), dtype=bool) if idle is None else np.asarray(idle)
    return drawn(strength, kind, idle, budget, seed)


# -- the lot ---------------------------------------------------------------------------------------


def test_half_are_the_strongest_and_the_rest_has_the_same_chance() -> None:
    strength = np.random.default_rng(0).permutation(1000.0 * np.arange(100))
    found = sampled(strength, np.zeros(100, dtype=int), 20)
    assert found.measured.sum() == 20
    best = strength >= 90_000
    assert found.measured[best].all() and (found.stratum[best] == CERTAIN).all()
    # 10 of 90, two or more of each of five strata, in which strength falls
    assert sorted(set(found.stratum[~best])) == [1, 2, 3, 4, 5]
    for number in range(1, 6):
        inside = found.stratum == number
        assert (inside.sum(), (inside & found.measured).sum()) == (18, 2)
        assert strength[inside].min() > strength[found.stratum > number].max(initial=-1)
    every = np.mean(
        [sampled(strength, np.zeros(100, dtype=int), 20, s).measured for s in range(300)], 0
    )
    assert every[best].min() == 1 and abs(every[~best] - 1 / 9).max() < 5 * np.sqrt(8 / 81 / 300)


def test_kinds_share_alike_and_small_ones_leave_what_they_do_not_need() -> None:
    kind = np.repeat([0, 1, 2], [5, 100, 300])
    strength = np.random.default_rng(0).random(405)
    idle = np.zeros(405, dtype=bool)
    idle[[0, 1, 5, 6, 7]] = True
    found = sampled(strength, kind, 53, idle=idle)
    of = [int((found.measured & ~idle)[kind == k].sum()) for k in range(3)]
    assert of == [3, 25, 25]
    assert found.measured[idle].all() and (found.stratum[idle] == CERTAIN).all()
    assert found.title == "exact (53 of 400 cells)"
    for number in np.unique(found.stratum[found.stratum > 0]):
        inside = found.stratum == number
        assert 2 <= (inside & found.measured).sum() < inside.sum()
        assert len(np.unique(kind[inside])) == 1


def test_each_set_of_scores_has_its_strongest_measured() -> None:
    strength = np.stack([np.arange(40.0), np.arange(40.0)[::-1], np.full(40, 3.0)])
    found = sampled(strength, np.zeros(40, dtype=int), 8)
    certain = np.flatnonzero(found.measured & (found.stratum == CERTAIN))
    assert certain.tolist() == [0, 1, 38, 39]


def heavy(seed: int, size: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and effects of which some are large that are scored low."""
    generator = np.random.default_rng(seed)
    y = generator.standard_t(2, size)
    return np.abs(y + generator.standard_normal(size)), y


def effects(y: np.ndarray, found: Any) -> NodeEffects:
    """One pair and position, of heads; NaN where nothing was measured."""
    table = torch.tensor(np.where(found.measured, y, np.nan), dtype=torch.float32)[None, :, None]
    return made(
        Effects, model="m", task="t", rules="exact", direction="denoise", metric="x",
        clean=torch.ones(1), corrupt=torch.zeros(1), lengths=torch.ones(1, dtype=torch.long),
        components=tuple(f"L0H{i}" for i in range(len(y))), nodes=table,
        strata=torch.from_numpy(found.stratum)[:, None],
    )  # fmt: skip


def test_the_bound_holds_in_95_of_100_samples() -> None:
    held, tight = [], []
    for seed in range(200):
        strength, y = heavy(seed)
        found = sampled(strength, np.zeros(400, dtype=int), 90, seed)
        (row,) = missed(effects(y, found), smallest=1.5).itertuples()
        true = int((np.abs(y) >= 1.5)[~found.measured].sum())
        assert true > 0 and (row.cells, row.measured, row.drawn) == (400, 90, 45)
        held.append(true <= row.at_most)
        tight.append(row.at_most / true)
        assert row.share == row.at_most / 310
    # 190 expected at least; 3.3 standard deviations of 200 draws below
    assert sum(held) >= 180 and np.median(tight) < 4


def test_the_bound_by_hand() -> None:
    found = sampled(np.arange(100.0), np.zeros(100, dtype=int), 20)
    y = np.where(found.stratum == CERTAIN, np.arange(100.0), 0.0)
    (row,) = missed(effects(y, found), k=3).itertuples()
    # none of ten: 1 - 0.05^(1/10) of 90
    assert (row.smallest, row.found, row.at_most) == (97, 0, int(90 * (1 - 0.05**0.1)))
    (row,) = missed(effects(y, found)).itertuples()
    assert row.smallest == 90
    all_ = sampled(np.arange(100.0), np.zeros(100, dtype=int), 100)
    (row,) = missed(effects(y, all_)).itertuples()
    assert (row.measured, row.drawn, row.at_most, row.share) == (100, 0, 0, 0)


def test_what_changes_nothing_sets_no_size_that_counts() -> None:
    idle = np.arange(100) < 30
    found = sampled(np.arange(100.0), np.zeros(100, dtype=int), 12, idle=idle)
    y = np.where(idle, 0.0, np.arange(100.0))
    (row,) = missed(effects(y, found)).itertuples()
    assert row.smallest == 94  # the smallest of six, which are less than ten
    (row,) = missed(effects(np.zeros(100), found)).itertuples()
    assert (row.smallest, row.found) == (0, 0)


def test_the_bound_is_all_where_all_but_one_of_those_drawn_are_large() -> None:
    # chances of 1 and 1/2 in two strata give three of four more often than their mean does
    found = sampled(np.arange(2008.0), np.zeros(2008, dtype=int), 8)
    y = np.where(found.stratum == CERTAIN, 1.0, 2.0)
    y[np.flatnonzero(found.measured & (found.stratum == 2))[0]] = 0.5
    (row,) = missed(effects(y, found), smallest=1.5).itertuples()
    assert (row.drawn, row.found, row.at_most) == (4, 3, row.cells - row.measured)


def test_what_cannot_be_bounded_is_refused() -> None:
    found = sampled(np.arange(100.0), np.zeros(100, dtype=int), 20)
    effect = effects(np.arange(100.0), found)
    with pytest.raises(ValueError, match="left to lot; these effects have 80 that were not; call"):
        missed(replace(effect, strata=None))
    for options in ({"smallest": 0.0}, {"smallest": -1.0}, {"k": 0}):
        with pytest.raises(ValueError, match="must be an .effect. above 0, and `k` at least 1"):
            missed(effect, **options)


# -- on models -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured() -> tuple[Any, Any, Any, Any]:
    """A shipped model on two pairs: scores, and the exact effects of all heads and MLPs."""
    from tasks import zoo

    model = zoo.load("ioi-gpt2")
    task = ioi(model.tokenizer, pairs=2, seed=0)
    options = {"components": ["head", "mlp"]}
    scores = [attribute(model, task, rules=r, **options) for r in (GRADIENT, RELP)]
    return model, task, scores, patch(model, task, progress=False, **options)


def test_weighted_means_are_right_on_average(measured: Any) -> None:
    """Of samples from the full table: mean |effect| and error, and how far estimates scatter."""
    _, _, scores, effect = measured
    strength = np.stack([s.nodes.abs().mean(0).flatten().double().numpy() for s in scores])
    kind = np.repeat([0, 1], [48 * 16, 6 * 16])
    true = effect.nodes[0].double().abs()
    table = agreement(scores[1], effect).set_index("kind").loc["head"]
    means, errors, inside = [], [], []
    for seed in range(100):
        found = drawn(strength, kind, np.zeros(len(kind), dtype=bool), 160, seed)
        hidden = ~torch.from_numpy(found.measured.reshape(54, 16))
        some = replace(effect, nodes=effect.nodes.masked_fill(hidden, torch.nan),
                       strata=torch.from_numpy(found.stratum.reshape(54, 16)))  # fmt: skip
        weights = some.sampling_weights
        assert weights is not None and float(weights.sum()) == pytest.approx(54 * 16)
        means.append(float((weights * true).sum() / (54 * 16)))
        if seed < 40:
            row = agreement(scores[1], some, seed=seed).set_index("kind").loc["head"]
            errors.append(row["relative_error"])
            inside.append(row["spearman_low"] <= table["spearman"] <= row["spearman_high"])
    spread = np.std(means, ddof=1)
    assert 0 < spread < 0.1 * float(true.mean())
    assert np.mean(means) == pytest.approx(float(true.mean()), abs=4 * spread / 10)
    assert np.mean(errors) == pytest.approx(table["relative_error"], rel=0.02)
    assert np.mean(inside) > 0.9


def test_what_is_measured_is_what_patch_gives(measured: Any, tmp_path: Path) -> None:
    model, task, scores, effect = measured
    some = verify(model, task, scores, budget=80, seed=1, progress=False)
    known = ~some.nodes.isnan()
    # another list of cells makes other batches, which round differently
    torch.testing.assert_close(some.nodes[known], effect.nodes[known], atol=1e-5, rtol=1e-5)
    assert isinstance(some, NodeEffects)
    assert (some.resolution, some.components) == (effect.resolution, effect.components)
    assert torch.equal(known[0], known[1])
    # what changes nothing is known to be 0, and beside it is just the budget
    idle = (effect.nodes == 0).all(0)
    busy = int((~idle).sum())
    assert int((known[0] & ~idle).sum()) == 80 < busy and known[0][idle].float().mean() > 0.99
    assert re.fullmatch(r"exact \(80 of \d+ cells\)", some.rules)
    again, other = (verify(model, task, scores, budget=80, seed=s, progress=False) for s in (1, 2))
    assert torch.equal(again.strata, some.strata)
    torch.testing.assert_close(again.nodes, some.nodes, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(other.nodes.isnan(), some.nodes.isnan())
    back = Scores.load(some.save(tmp_path / "some.safetensors"))
    assert isinstance(back, NodeEffects) and torch.equal(back.strata, some.strata)
    assert torch.equal(back.sampling_weights, some.sampling_weights)
    for changed in (some.by_span(), some.together()):
        assert changed.strata is None and changed.sampling_weights is None
    # everything that reads effects takes it
    table = agreement(scores, some)
    assert table["overlap"][table["kind"] == "head"].isna().all() and table["pearson"].notna().all()
    assert "nan" not in repr(some.top(5)).lower()
    assert draw(some, kind="mlp").data and draw(scores[0], some).data
    assert missed(some).set_index("kind").loc["mlp", "at_most"] >= 0


@pytest.mark.parametrize("level", ["node", "edge"])
def test_a_budget_for_all_gives_what_patch_gives(tiny: Any, level: str) -> None:
    task = random_task(tiny, pairs=2, length=3)
    scores = attribute(tiny, task, level=level, direction="noise")
    whole = patch(tiny, task, level=level, direction="noise", progress=False)
    found = verify(tiny, task, scores, budget=whole.table.numel(), progress=False)
    assert torch.equal(found.table, whole.table) and found.strata is None
    assert found.provenance == whole.provenance and found.resolution == whole.resolution
    assert torch.equal(found.clean, whole.clean)


@pytest.mark.parametrize("positions", [False, True])
def test_edges_are_drawn_by_slot(tiny: Any, positions: bool) -> None:
    task = random_task(tiny, pairs=2, length=3)
    scores = attribute(tiny, task, level="edge", positions=positions)
    found = verify(tiny, task, [scores], budget=40, progress=False)
    known = ~found.edges.isnan() & found.layout.exists
    edges = [(found.writers[w], found.readers[r]) for *_, w, r in known.nonzero().tolist()]
    whole = patch(tiny, task, level="edge", edges=edges, positions=positions, progress=False)
    torch.testing.assert_close(found.edges[known], whole.edges[known], atol=1e-5, rtol=1e-5)
    assert (found.edges[~found.layout.exists.expand(known.shape)] == 0).all()
    assert re.fullmatch(r"exact \(40 of [\d,]+ cells\)", found.rules)
    if not positions:  # else some are known for nothing
        slots = [found.layout.targets[r][1] for _, r in known.nonzero().tolist()]
        assert {slot: slots.count(slot) for slot in slots} == dict.fromkeys("q k v in".split(), 10)
    table = agreement(scores, found).set_index("kind")
    assert table["relative_error"].notna().all() and table["relative_error_low"].isna().all()
    rows = missed(found)
    assert rows["kind"].tolist() == ["q", "k", "v", "in"] and (rows["drawn"] == 5).all()


def test_effects_of_all_positions_and_neurons_are_verified(tiny: Any) -> None:
    task = random_task(tiny, pairs=2, length=3)
    neurons = ("L1N3", "L2N5")
    scores = attribute(tiny, task, components=["neuron"]).together()
    found = verify(tiny, task, scores, budget=8, progress=False)
    assert found.is_together and int((~found.nodes.isnan()).sum()) == 2 * 8
    edges = attribute(tiny, task, level="edge", neurons=list(neurons))
    found = verify(tiny, task, edges, budget=16, progress=False)
    assert set(neurons) <= set(found.writers)


def test_a_verification_goes_on(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    task, kept = random_task(tiny, pairs=2, length=3), tmp_path / "kept.safetensors"
    scores = attribute(tiny, task)
    first = verify(tiny, task, scores, budget=30, resume=kept, progress=False)
    monkeypatch.setattr(Rerun, "__call__", None)  # all is measured: nothing may run again
    again = verify(tiny, task, scores, budget=30, resume=kept, progress=False)
    torch.testing.assert_close(again.nodes, first.nodes, rtol=0, atol=0, equal_nan=True)


def test_scores_that_do_not_belong_are_refused(tiny: Any) -> None:
    task = random_task(tiny, pairs=2, length=3)
    scores, edges = attribute(tiny, task), attribute(tiny, task, level="edge")
    holes = scores.nodes.clone()
    holes[0, 0, 0] = torch.nan
    for many, message in (
        ([], "must be one set or more; got none"),
        ([scores, edges], r"same level, direction and parts; those of 'RELP' \(edges "),
        ([scores, attribute(tiny, task, direction="noise")], "same level, direction and parts"),
        (attribute(tiny, task, level="edge", positions="spans"), r"are by span \('end', 'other'\)"),
        (replace(scores, nodes=holes), "must be finite to choose by; those of 'RELP' hold NaN"),
        (altered(scores, model="other"), "another model, 'other', here 'tiny-"),
        (altered(scores, weights="0"), "have another weights, '0', here "),
        (altered(scores, metric="loss"), "another metric, 'loss', here 'logit_difference'"),
        (
            attribute(tiny, random_task(tiny, pairs=2, length=3, seed=1)),
            "of the pairs of this task; the clean metric of 'RELP' is another",
        ),
        (attribute(tiny, random_task(tiny, pairs=3, length=3)), "of the pairs of this task"),
    ):
        with pytest.raises(ValueError, match=message):
            verify(tiny, task, many)
    with pytest.raises(ValueError, match="`budget` must be 4 cells or more for each of the 5"):
        verify(tiny, task, scores, budget=19)
    with pytest.raises(ValueError, match=r"`strata` must be \[\d+, 3\], one number for each cell"):
        replace(scores, strata=torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.usefixtures("annotations_unchecked")
def test_what_is_no_set_of_scores_is_told(tiny: Any) -> None:
    task = random_task(tiny, pairs=2)
    for wrong in ("RELP", [attribute(tiny, task), "RELP"]):
        with pytest.raises(TypeError, match="`scores` must be Scores, one set or more; got a str"):
            verify(tiny, task, wrong)
