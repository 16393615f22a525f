"""The benchmark: measures by hand, cells that are kept, and statistics over pairs and cases."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import able_task
from test_task import full_message

from circuits import assemble, auroc, draw
from circuits.judge.areas import areas
from circuits.judge.bench import Case, Loaded, bench
from circuits.judge.entries import MEASURES, Bench, Entry
from circuits.judge.methods import METHODS, Method, from_name
from circuits.judge.resampling import holm
from relp import RELP, EdgeScores, Scores, attribute
from tasks import planted

pytestmark = pytest.mark.usefixtures("annotations_unchecked")


# -- true edges ------------------------------------------------------------------------------------


def test_areas_of_a_ranking_worked_out_by_hand() -> None:
    size = np.array([5.0, 4.0, 3.0, 2.0, 1.0])
    inside = np.array([True, False, True, False, False])
    # five of the six pairs are in order; precisions at the two that are inside: 1/1 and 2/3
    assert areas(size, inside) == pytest.approx([5 / 6, (1 + 2 / 3) / 2])
    tied = np.array([1.0, 1.0, 0.0, 0.0, 0.0])  # one inside ties with one outside, one with two
    both = (0.5 + 1 + 1 + 0 + 0.5 + 0.5) / 6, (1 / 2 + 2 / 5) / 2
    assert areas(tied, inside) == pytest.approx(both)
    assert areas(np.stack([size, tied]), inside)[1] == pytest.approx(both)
    assert areas(size, size > 2).tolist() == [1, 1]


def test_edges_by_name_are_those_of_a_graph(tiny: Any) -> None:
    scores = attribute(tiny, able_task(tiny), level="edge")
    assert isinstance(scores, EdgeScores)
    drawn = torch.rand(scores.edges.shape, generator=torch.Generator().manual_seed(3))
    mask = (drawn < 0.1) & scores.layout.exists
    names = [f"{scores.writers[w]}->{scores.readers[r]}" for w, r in mask.nonzero().tolist()]
    by_name, by_graph = auroc(scores, names), auroc(scores, assemble(scores, mask))
    assert by_name.equals(by_graph) and by_name["kind"].tolist() == ["edge"]
    with pytest.raises(ValueError, match="all of the known circuit must be among the scores"):
        auroc(scores, ["embed->L9H9.q"])


# -- cells -----------------------------------------------------------------------------------------


def cases(*names: str) -> list[Case]:
    def load(name: str) -> Callable[[], Loaded]:
        def made() -> Loaded:
            one, other = (planted.plant(name, pairs=4, seed=s, distractors=2) for s in (0, 1))
            return Loaded(one.model, one.task, other.task, one.direction, one.edges, one.hidden)

        return made

    return [Case(name, "planted", load(name)) for name in names]


def some(*names: str) -> dict[str, Method]:
    return {name: METHODS[name] for name in names}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bench, Path]]:
    folder = tmp_path_factory.mktemp("bench")
    methods = some("GRADIENT", "DEEPLIFT", "ACDC", "exact", "random")
    yield bench(cases("saturation", "or_gate"), methods, folder=folder, progress=False), folder


def test_the_exact_method_finds_what_was_planted_and_gradients_do_not(
    found: tuple[Bench, Path],
) -> None:
    table = found[0].by_case("auroc")
    assert list(table.index) == ["GRADIENT", "DEEPLIFT", "ACDC", "exact", "random"]
    assert list(table.columns) == ["saturation", "or_gate"]
    assert (table.loc["exact"] == 1).all() and (table.loc["DEEPLIFT"] == 1).all()
    assert table.loc["GRADIENT", "saturation"] < 1
    assert (found[0].by_case("CMD").loc["exact"] < 0.1).all()


def test_measures_are_those_of_the_verbs(found: tuple[Bench, Path]) -> None:
    from circuits import agreement, evaluate, patch

    (case,) = cases("saturation")
    it = case.load()
    (cell,) = (c for c in found[0].entries if (c.case, c.method) == ("saturation", "GRADIENT"))
    edges = METHODS["GRADIENT"].scores(it.model, it.task, "edge", it.direction)
    assert it.edges is not None
    (row,) = auroc(edges, it.edges).itertuples()
    assert cell.samples("auroc", 0)[0] == pytest.approx(row.auroc)
    assert cell.samples("average_precision", 0)[0] == pytest.approx(row.average_precision)
    areas = evaluate(it.model, it.others, edges, random=0).areas(seed=5)
    for name in ("CPR", "CMD"):
        samples = cell.samples(name, 5)
        assert samples[0] == pytest.approx(areas[name][0], abs=1e-6)
        low, high = np.quantile(samples[1:], [0.025, 0.975])
        assert (low, high) == pytest.approx((areas[f"{name}_low"][0], areas[f"{name}_high"][0]))
    nodes = METHODS["GRADIENT"].scores(it.model, it.task, "node", it.direction)
    effect = patch(it.model, it.task, direction=it.direction)
    frame = agreement(nodes, effect).query("kind != 'embed'")
    assert cell.samples("pearson", 0)[0] == pytest.approx(frame["pearson"].mean())


def test_what_is_done_is_not_done_again(found: tuple[Bench, Path]) -> None:
    def never(*_: object) -> Scores:
        raise AssertionError("it was done")

    asleep = {name: replace(METHODS[name], scores=never) for name in ("GRADIENT", "exact")}
    again = bench(cases("or_gate"), asleep, folder=found[1], progress=False)
    assert [c.method for c in again.entries] == ["GRADIENT", "exact"]
    before = {(c.case, c.method): c.metric for c in found[0].entries}
    assert all(c.metric == before[c.case, c.method] for c in again.entries)


def test_an_interrupted_bench_goes_on(tmp_path: Path) -> None:
    calls = []

    def stopped(model: Any, task: Any, level: str, direction: str) -> Scores:
        calls.append(level)
        if level == "edge":
            raise KeyboardInterrupt
        return METHODS["RELP"].scores(model, task, level, direction)

    both = some("GRADIENT") | {"RELP": Method("RELP", stopped)}
    with pytest.raises(KeyboardInterrupt):
        bench(cases("or_gate"), both, folder=tmp_path, progress=False)
    kept = sorted(path.name for path in (tmp_path / "or_gate").iterdir())
    assert kept == ["GRADIENT.json", "effects.safetensors"]
    again = bench(cases("or_gate"), some("GRADIENT", "RELP"), folder=tmp_path, progress=False)
    assert [c.method for c in again.entries] == ["GRADIENT", "RELP"]


def test_large_models_get_a_sample_and_no_method_that_runs_each_edge(tmp_path: Path) -> None:
    (case,) = cases("or_gate")
    methods = some("GRADIENT", "exact", "ACDC")
    only = bench([replace(case, large=True)], methods, folder=tmp_path, progress=False)
    assert [c.method for c in only.entries] == ["GRADIENT"]
    effects = Scores.load(tmp_path / "or_gate" / "effects.safetensors")
    assert effects.rules.startswith("exact")


def test_a_method_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_for_the_bench.py").write_text(
        "from relp import RELP, attribute\n"
        "def halves(model, task, level, direction):\n"
        "    return attribute(model, task, rules=RELP, level=level, direction=direction)\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine = from_name("mine_for_the_bench:halves")
    assert mine.name == "halves"
    both = bench(cases("or_gate"), some("RELP") | {"halves": mine}, folder=tmp_path,
                 progress=False)  # fmt: skip
    one, other = both.entries
    assert one.scores == other.scores and one.metric == other.metric
    message = full_message(lambda: from_name("mine_for_the_bench:number"))
    assert message.startswith("a method of your own must be a function (model, task, level, ")
    message = full_message(lambda: from_name("mine_for_the_bench:no"))
    assert message.startswith("a method of your own must be a function that can be imported, as ")
    message = full_message(lambda: from_name("RELPP"))
    assert message.startswith(f"a method must be one of {', '.join(METHODS)}, or a function as ")


def test_a_method_that_gives_something_else_is_told(tmp_path: Path) -> None:
    wrong = {"mine": Method("mine", lambda *_: torch.zeros(3), nodes=False)}  # type: ignore[arg-type,return-value]
    assert full_message(
        lambda: bench(cases("or_gate"), wrong, folder=tmp_path, progress=False)
    ) == (
        "a method must give Scores of the level that it is asked for; 'mine' gave Tensor for "
        "'edge'; return attribute(model, task, level=level, …)"
    )


def test_a_folder_holds_cells_of_one_set_of_options(tmp_path: Path) -> None:
    bench([], {}, folder=tmp_path, options={"pairs": 8, "seed": 0}, progress=False)
    assert full_message(
        lambda: bench([], {}, folder=tmp_path, options={"pairs": 9, "seed": 0}, progress=False)
    ) == (
        f"`folder` must hold entries of the same options; {str(tmp_path)!r} has pairs 8 there and "
        "9 now; give the options of then, another folder, or delete it"
    )


# -- statistics ------------------------------------------------------------------------------------


def made_entry(case: str, method: str, values: list[float], **more: Any) -> Entry:
    return Entry(case, "trained", method, {"node cost": 2.0}, agreement={"signs": values}, **more)


def test_means_are_over_cases_and_pairs_without_a_value_are_left_out() -> None:
    nan = float("nan")
    made = Bench((
        made_entry("a", "GRADIENT", [0.2, 0.4, nan]), made_entry("b", "GRADIENT", [0.9]),
        made_entry("a", "RELP", [nan, nan, nan]), made_entry("b", "RELP", [0.5]),
    ))  # fmt: skip
    table = made.summary().set_index(["method", "measure"])
    assert table.loc[("GRADIENT", "signs"), "value"] == pytest.approx((0.3 + 0.9) / 2)
    assert table.loc[("GRADIENT", "signs"), "cases"] == 2
    assert table.loc[("RELP", "signs"), ["value", "cases"]].tolist() == [0.5, 1]
    assert table.loc[("RELP", "node cost"), "value"] == 2
    assert set(made.table()["measure"]) == {"signs", "node cost"}


def test_a_difference_in_every_pair_is_told_from_none() -> None:
    rng = np.random.default_rng(0)
    base = rng.random((2, 8))
    made = Bench(tuple(
        made_entry(case, method, (base[i] + shift + spread * rng.standard_normal(8)).tolist())
        for i, case in enumerate("ab")
        for method, shift, spread in (
            ("GRADIENT", 0, 0), ("RELP", 0.3, 0.05), ("GIM", 0, 0), ("CP_LRP", 0, 0.2),
        )
    ))  # fmt: skip
    table = made.tests(baseline="GRADIENT").set_index("method")
    assert table.loc["RELP", "difference"] == pytest.approx(0.3, abs=0.05)
    assert table.loc["RELP", "p_value"] < 0.001 and table.loc["RELP", "p_holm"] < 0.01
    assert table.loc["GIM", "p_value"] == 1 and table.loc["CP_LRP", "p_value"] > 0.05
    assert table["p_holm"].tolist() == holm(table["p_value"].to_numpy()).tolist()
    shown = made.overview("trained")
    assert shown.loc["RELP", "signs"].endswith("+") and shown.loc["GIM", "signs"][-1].isdigit()
    assert full_message(lambda: made.tests(baseline="no")).startswith("`baseline` must be one of")


def test_tests_of_areas_swap_scores_of_random_pairs(found: tuple[Bench, Path]) -> None:
    tests = found[0].tests(baseline="random")
    row = tests.query("method == 'exact' and measure == 'auroc'").iloc[0]
    table = found[0].by_case("auroc")
    assert row["difference"] == pytest.approx((table.loc["exact"] - table.loc["random"]).mean())
    # of the 2 ** 4 ways to swap four pairs two set them as far apart, in both cases together
    assert 0 < row["p_value"] < 0.05
    assert tests.query("method == 'ACDC' and measure == 'auroc'").empty  # knows no single pair
    assert not tests.query("method == 'ACDC' and measure == 'CMD'").empty


# -- what is shown ---------------------------------------------------------------------------------


def test_tables_and_figure_show_every_cell(found: tuple[Bench, Path]) -> None:
    text = found[0].to_markdown()
    assert text.startswith("**planted**, mean over 2 cases\n\n| method | auroc | ")
    lines = [line for line in text.splitlines() if line.startswith("| DEEPLIFT |")]
    assert len(lines) == 2 and lines[1] == "| DEEPLIFT | 1.00 | 1.00 |"
    assert {len(line.split("|")) for line in text.split("\n\n")[1].splitlines()} == {13}
    figure = draw(found[0].table())
    assert [trace.z.shape for trace in figure.data] == [(5, 2), (5, 2), (3, 2), (3, 2)]
    best = figure.data[0]
    assert best.z[list(best.y).index("exact")].tolist() == [1, 1]
    with pytest.raises(ValueError, match="must be one of a Bench; it has no column 'method'"):
        draw(found[0].table().drop(columns="method"))
    with pytest.raises(ValueError, match="must have one of the measures auroc, CMD"):
        draw(found[0].table().query("measure == 'node cost'"))


def test_measures_that_are_none_are_an_error(found: tuple[Bench, Path]) -> None:
    assert full_message(lambda: found[0].by_case("no")) == (
        f"the measure must be one of {', '.join(MEASURES)}; got 'no'; see `table`"
    )
    assert full_message(lambda: found[0].overview("no")).startswith("the group must be one of")


def test_methods_leave_the_model_as_it_was(tiny: Any) -> None:
    task = able_task(tiny)
    for name in ("PARTWAY", "EAP-IG (5 steps)", "random"):
        for level in ("node", "edge"):
            assert METHODS[name].scores(tiny, task, level, "noise").level == level
    one, other = (METHODS["random"].scores(tiny, task, "edge", "noise") for _ in range(2))
    assert torch.equal(one.table, other.table)
    relp = attribute(tiny, task, rules=RELP, level="edge", direction="noise")
    assert torch.equal(METHODS["RELP"].scores(tiny, task, "edge", "noise").table, relp.table)
