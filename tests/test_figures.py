"""Figures of scores, evaluations and attention, and tables for papers: what they show and say."""

from __future__ import annotations

import html
import inspect
import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io
import pytest
import torch
from conftest import altered, on, random_task
from test_draw import make_nodes, shown
from test_graph import make_scores

from circuits import agreement, agreement_tests
from circuits.draw import attention, draw
from circuits.draw.heatmaps import labels
from circuits.draw.template import CATEGORIES, TEMPLATE, framed, packed, retitled
from circuits.judge.entries import Bench, Entry
from circuits.judge.evaluation import Evaluation
from circuits.judge.tables import to_latex, to_markdown
from relp import EdgeScores, Effects
from relp.bridge import Sites, observe

NASTY = {"model": "a/b <i>c</i>", "task": "</script><b>&", "metric": "<u>"}


def make_evaluation(pairs: int = 4, *, seed: int = 0, **labels: Any) -> Evaluation:
    """Two methods and a random one, at three sizes."""
    generator = torch.Generator().manual_seed(seed)
    noise = 0.1 * torch.randn(3, 3, pairs, generator=generator)
    rise = torch.tensor([[0.2, 0.8, 1.0], [0.5, 0.9, 1.0], [0.0, 0.1, 1.0]])
    fields = {
        "model": "tiny",
        "task": "toy",
        "rules": ("GRADIENT", "RELP", "random"),
        "sizes": (0.01, 0.1, 1.0),
        "edges": torch.tensor([[1, 10, 100]] * 3),
        "metric": rise[..., None] + noise,
        "clean": torch.ones(pairs),
        "corrupt": torch.zeros(pairs),
        "signed": False,
    }
    return Evaluation(**(fields | labels))


def note(figure: go.Figure) -> str:
    """What stands below the title."""
    return figure.layout.title.subtitle.text.replace("<br>", " ").replace("\N{NO-BREAK SPACE}", " ")


# -- the house style -------------------------------------------------------------------------------


def test_no_axis_is_told_to_follow_itself() -> None:
    """Plotly would warn of it on every page."""
    for name, figure in every_figure():
        for axis in (*figure.select_xaxes(), *figure.select_yaxes()):
            letter, _, number = axis.plotly_name.partition("axis")
            assert axis.matches != f"{letter}{number}", name


def every_figure() -> Iterator[tuple[str, go.Figure]]:
    nodes = [make_nodes(seed=s, rules=r) for s, r in enumerate(("GRADIENT", "RELP", "DEEPLIFT"))]
    effect, edges = make_nodes(Effects, seed=4), make_scores(layers=6, heads=6)
    by_place = make_scores(positions=3)
    bench = pd.DataFrame(
        [(f"tiny · a task of mine {case}", method, measure, 0.5)
         for case in range(8) for method in ("RELP", "GIM") for measure in ("auroc", "CMD")],
        columns=["case", "method", "measure", "value"],
    )  # fmt: skip
    yield "nodes", draw(nodes[0], kind="mlp")
    long = nodes[1].renamed("RELP with a name that nobody would choose for a set of scores")
    yield "heads", draw([*nodes[:2], long, effect], kind="head")
    yield "scatter", draw(nodes[0], effect)
    yield "scatters", draw(nodes, effect)
    yield "edges", draw(edges)
    yield "edges by place", draw([by_place, by_place.renamed("GIM")])
    yield "layers", draw(edges, kind="layer")
    yield "distribution", draw([edges, edges.renamed("GIM")], kind="distribution")
    yield "distribution of some", draw([*partly_measured()], kind="distribution")
    yield "edges of some", draw(partly_measured()[1])
    yield "curve", draw(make_evaluation())
    yield "curves", draw([make_evaluation(), make_evaluation(seed=1, task="other", signed=True)])
    yield "bench", draw(bench)
    yield "measures", draw(agreement(nodes, effect))
    yield "differences", draw(agreement_tests(nodes, effect, measures=["pearson", "signs"]))


def test_figures_are_in_the_house_style_and_nothing_else_is() -> None:
    before = plotly.io.templates.default
    for name, figure in every_figure():
        assert figure.layout.template == TEMPLATE, name
        assert figure.layout.height and figure.layout.width is None, name
        assert figure.layout.title.text and figure.layout.title.subtitle.text, name
    assert plotly.io.templates.default == before
    assert go.Figure().layout.template != TEMPLATE
    assert len(set(CATEGORIES)) == 8


def test_headings_are_broken_for_a_narrow_page() -> None:
    figure = framed(go.Figure(), "word " * 30, "95 % of " * 20, plot=100)
    for text, most in ((figure.layout.title.text, 52), (figure.layout.title.subtitle.text, 66)):
        lines = text.split("<br>")
        assert len(lines) > 1 and max(map(len, lines)) <= most
    assert not re.search(r"95 ?<br>", figure.layout.title.subtitle.text)
    before = figure.layout.height, figure.layout.margin.t
    retitled(figure, "short")
    assert (figure.layout.height, figure.layout.margin.t) == before
    figure = framed(go.Figure(), "short", "note", plot=100)
    before = figure.layout.height, figure.layout.margin.t
    retitled(figure, "word " * 30)
    more = figure.layout.height - before[0]
    assert more > 0 and figure.layout.margin.t == before[1] + more
    assert "note" in figure.layout.title.subtitle.text
    assert draw(make_nodes(), title="<b>").layout.title.text == "&lt;b&gt;"


def test_pieces_are_packed_into_lines() -> None:
    pieces = ["r\N{NO-BREAK SPACE}0.973", "ρ\N{NO-BREAK SPACE}0.95", "signs\N{NO-BREAK SPACE}98%"]
    assert len(packed(pieces, 1)) == 1
    assert packed(pieces, 3) == [f"{pieces[0]} · {pieces[1]}", pieces[2]]


def test_text_is_no_markup() -> None:
    nodes, edges = make_nodes(**NASTY), make_scores(**NASTY)
    effect = make_nodes(Effects, **NASTY)
    for figure in (
        draw([nodes, effect]),
        draw([nodes, nodes.renamed("<s>")], effect),
        draw([edges, edges.renamed("<s>")]),
        draw(edges, kind="layer"),
        draw(edges, kind="distribution"),
        draw(make_evaluation(model="<i>", task="<u>", rules=("<s>", "a", "b"))),
        draw(agreement([nodes, nodes.renamed("<s>")], effect)),
    ):
        said = re.sub("</?b>|<br>|<extra></extra>", "", str(figure.to_dict()))
        assert not re.search("<(i|u|s|script)>", said)


def test_names_that_would_be_one_when_cut_are_not_cut() -> None:
    names = [f"of all persons the {which} in the prompt" for which in ("first", "second")]
    spans = {name: torch.tensor([0, i + 1, 2]) for i, name in enumerate(names)}
    assert list(draw(make_nodes(spans=spans)).data[0].x) == [*names, "other"]
    assert "…" in draw(make_nodes(spans={names[0]: torch.tensor([0, 1, 2])})).data[0].x[0]


# -- panels by method ------------------------------------------------------------------------------


def test_results_beside_each_other_have_one_scale() -> None:
    one, other = make_nodes(), make_nodes(seed=1, rules="gim")
    effect = make_nodes(Effects, seed=2)
    few = [name for name in effect.components if name != "L1.mlp"]
    rows = [effect.components.index(name) for name in few]
    effect = replace(effect, components=tuple(few), nodes=effect.nodes[:, rows])
    figure = draw([one, other, effect], kind="mlp")
    assert [shown(a) for a in figure.layout.annotations] == [["relp"], ["gim"], ["exact effect"]]
    limits = {(t.zmin, t.zmax) for t in figure.data}
    largest = max(np.nanmax(abs(t.z)) for t in figure.data)
    assert limits == {(-largest, largest)}
    assert [t.showscale for t in figure.data] == [True, False, False]
    for scores, trace in zip((one, other), figure.data, strict=False):
        np.testing.assert_allclose(trace.z, scores.of_kind("mlp")[1].mean(0), rtol=1e-6)
    assert np.isnan(figure.data[2].z[1]).all() and np.isfinite(figure.data[2].z[0]).all()
    assert figure.layout.title.text.startswith("relp, gim, exact effect · tiny · toy")
    # effects of all positions at once: the sums of scores stand beside them
    together = replace(effect, nodes=effect.nodes.sum(-1, keepdim=True))
    together = altered(together, tokens=("all positions",))
    figure = draw([one, together], kind="mlp")
    assert figure.data[0].z[0, 0] == pytest.approx(
        float(one.of_kind("mlp")[1][:, 0].sum(-1).mean()), rel=1e-5
    )


def test_all_counts_of_pairs_are_said() -> None:
    six, three = make_nodes(pairs=6), make_nodes(seed=1, rules="gim")
    assert note(draw([six, six.renamed("gim")], kind="mlp")).endswith("mean over 6 pairs")
    assert note(draw([six, three], kind="mlp")).endswith("mean over 6 and 3 pairs")
    assert note(draw([three, six, three], kind="mlp")).endswith("mean over 3, 6 and 3 pairs")
    one = make_scores()
    other = altered(one, clean=torch.ones(5), corrupt=torch.zeros(5), lengths=torch.full((5,), 3))
    for kind in (None, "q", "layer", "distribution"):
        assert "mean over 2 and 5 pairs" in note(draw([one, other.renamed("gim")], kind=kind))


def test_wide_results_stand_below_each_other() -> None:
    many = [make_nodes(pos=30), make_nodes(pos=30, seed=1, rules="gim")]
    figure = draw(many, kind="mlp")
    assert (figure.layout.xaxis.domain, figure.layout.xaxis2.domain) == ((0, 1), (0, 1))
    assert figure.layout.yaxis.domain[0] > figure.layout.yaxis2.domain[1]
    # tokens are named once, below the last
    assert (figure.layout.xaxis.showticklabels, figure.layout.xaxis2.showticklabels) == (
        False,
        True,
    )
    # and everywhere, where a row is not full
    figure = draw([*many, make_nodes(pos=30, rules="third")], kind="head")
    assert figure.layout.xaxis.showticklabels and figure.layout.xaxis3.showticklabels


def test_only_what_is_about_one_thing_is_drawn_on_one_scale() -> None:
    one = make_nodes()
    for name, value in (("model", "other"), ("direction", "noise"), ("metric", "loss")):
        with pytest.raises(ValueError, match=f"in one picture must be of the same {name}"):
            draw([one, make_nodes(**{name: value})])
        with pytest.raises(ValueError, match="must be of the same"):
            draw([one, make_nodes(**{name: value})], make_nodes(Effects))
    with pytest.raises(ValueError, match="must be of the same place_labels"):
        draw([one, make_nodes(pos=5)])
    with pytest.raises(ValueError, match="must have the same writers and readers; those of 'gim'"):
        draw([make_scores(), make_scores(layers=3).renamed("gim")])
    with pytest.raises(TypeError, match=r"got a list of NodeScores of nodes, EdgeScores of edges"):
        inspect.unwrap(draw)([one, make_scores()])
    with pytest.raises(TypeError, match="got a list of none"):
        inspect.unwrap(draw)([])


def test_methods_stand_beside_each_other_against_effects() -> None:
    effect = make_nodes(Effects)
    many = [make_nodes(seed=s, rules=f"rules {s}") for s in range(1, 5)]
    figure = draw(many, effect, kind="mlp")
    dots = [t for t in figure.data if t.mode == "markers"]
    assert len(dots) == 4 and len({t.marker.color for t in dots}) == 4
    titles = [" ".join(shown(a)) for a in figure.layout.annotations]
    assert all(t.startswith(f"mlp · rules {n} r") for n, t in enumerate(titles, start=1))
    table = agreement(many, effect).set_index(["rules", "kind"])
    for scores, said in zip(many, titles, strict=True):
        row = table.loc[scores.rules, "mlp"]
        assert f"r {row['pearson']:.3f}" in said
        assert f"[{row['pearson_low']:.3f}, {row['pearson_high']:.3f}]" in said
    # one kind, one pair of axes: the second row begins anew
    assert figure.layout.xaxis2.matches == figure.layout.xaxis3.matches == "x"
    assert figure.layout.yaxis2.matches == "y" and figure.layout.xaxis4.matches is None
    assert "against exact effects, 3 pairs" in note(figure)


# -- edges -----------------------------------------------------------------------------------------


def test_a_large_table_of_edges_shows_the_strongest_and_says_how_much_that_is() -> None:
    scores = make_scores(layers=6, heads=8)
    table = torch.zeros_like(scores.edges)
    at = [("embed", "L3H2.q"), ("L3H2", "L5.mlp.in"), ("L5.mlp", "logits.in"), ("L0H0", "L1H1.v")]
    row, column = scores.layout.row, scores.layout.column
    for (writer, reader), score in zip(at, (4.0, -3.0, 2.0, 1.0), strict=True):
        table[row[writer], column[reader]] = score
    figure = draw(replace(scores, edges=table))
    (trace,) = figure.data
    # three hold nine tenths of all: no more is shown
    assert list(trace.y) == ["embed", "L3H2", "L5.mlp"]
    assert list(trace.x) == ["L3H2.q", "L5.mlp.in", "logits.in"]
    np.testing.assert_allclose(np.nan_to_num(trace.z), np.diag([4.0, -3.0, 2.0]))
    assert np.isnan(trace.z[2, 0]) and np.isfinite(trace.z[0, 2])
    assert "3 of 55 writers and 3 of 151 readers, with 90 % of all |score|" in note(figure)
    # many weak ones: as many as there is room for, and the rest in words
    (trace,) = draw(scores).data
    assert trace.z.shape == (40, 40)
    known = sum(abs(trace.z[np.isfinite(trace.z)])) / float(scores.edges.abs().sum())
    assert f"with {100 * known:.0f} % of all" in note(draw(scores))
    assert trace.z[-1, -1] == pytest.approx(float(scores.edges[row[trace.y[-1]], -1]))
    assert draw(replace(scores, edges=0 * table)).data[0].zmax == 1
    one_slot = draw(scores, kind="k").data[0]
    assert {name.rpartition(".")[2] for name in one_slot.x} == {"k"}


def test_edges_by_span_have_a_column_for_each_place() -> None:
    scores = make_scores(positions=2)
    by_span = altered(scores, places=("S2", "other"), tokens=("S2", "other"))
    figure = draw(by_span)
    assert list(figure.data[0].x[:3]) == ["L0H0.q@S2", "L0H0.q@other", "L0H1.q@S2"]
    assert "readers at each span" in note(figure)
    named = altered(scores, tokens=("the", " Mary"))
    assert draw(named).data[0].x[1] == 'L0H0.q " Mary"@1'


@pytest.mark.parametrize("positions", [None, 3])
def test_layers_by_layers_sum_sizes(positions: int | None) -> None:
    scores = make_scores(layers=3, positions=positions)
    trace = draw(scores, kind="layer").data[0]
    assert list(trace.y) == ["embed", "L0", "L1", "L2"]
    assert list(trace.x) == ["L0", "L1", "L2", "logits"]
    slow = np.zeros((4, 4))
    for w, writer in enumerate(scores.writers):
        for r, reader in enumerate(scores.readers):
            up = list(trace.y).index(writer if writer == "embed" else writer[:2])
            across = list(trace.x).index("logits" if reader == "logits.in" else reader[:2])
            slow[up, across] += float(scores.edges[..., w, r].abs().sum())
    np.testing.assert_allclose(np.nan_to_num(trace.z), slow, rtol=1e-6)
    assert np.isnan(trace.z[3, 0]) and np.isfinite(trace.z[1, 0])  # heads are heard by their MLP
    assert trace.zmin == 0


def test_a_distribution_is_sizes_by_rank_and_says_what_the_first_have() -> None:
    scores = make_scores(layers=3, heads=4)
    table = scores.edges.clone()
    table[0, 0] = 0
    scores = replace(scores, edges=table)
    figure = draw(scores, kind="distribution")
    values = scores.edges[scores.layout.exists].double()
    curves = {t.name.partition(",")[0]: t for t in figure.data}
    for name, chosen in (
        ("all", values[values != 0].abs()), ("positive", values[values > 0]),
        ("negative", -values[values < 0]),
    ):  # fmt: skip
        found = chosen.sort(descending=True).values
        assert curves[name].name == f"{name}, {len(found):,}"
        np.testing.assert_allclose(curves[name].y, found[np.array(curves[name].x) - 1])
        assert curves[name].x[0] == 1 and curves[name].x[-1] == len(found)
    share = float(values.abs().sort(descending=True).values[:20].sum() / values.abs().sum())
    assert figure.layout.annotations[0].text == f"20: {share:.0%}"
    assert f"{len(values)} edges, 1 of them 0" in note(figure)
    assert (figure.layout.xaxis.type, figure.layout.yaxis.type) == ("log", "log")
    names = [t.name for t in draw([scores, scores.renamed("gim")], kind="distribution").data]
    assert [name.partition(",")[0] for name in names] == ["relp", "gim"]
    assert draw(replace(scores, edges=0 * table), kind="distribution").layout.height


def partly_measured() -> tuple[EdgeScores, EdgeScores]:
    """Scores of 55 x 151 edges, as far as they are there, and effects of 30, two of which are 0."""
    scores = make_scores(layers=6, heads=8)
    exists = scores.layout.exists
    known = torch.full((int(exists.sum()),), math.nan)
    known[100:130] = scores.edges[exists][100:130]
    known[[105, 110]] = 0
    table = torch.zeros_like(scores.edges)
    table[exists] = known
    return scores, replace(scores.renamed("exact"), edges=table)


def test_what_was_not_measured_is_no_zero_in_a_distribution() -> None:
    scores, effect = partly_measured()
    edges = int(scores.layout.exists.sum())
    counts = {
        "relp": f"relp, {edges:,} edges",
        "exact": f"exact, 30 edges, 2 of them 0, {edges - 30:,} others not measured",
    }
    for many in ([scores, effect], [effect, scores]):
        figure = draw(many, kind="distribution")
        assert [t.name for t in figure.data] == [counts[s.rules] for s in many]
        assert " edges" not in note(figure)
        assert figure.layout.xaxis.range[1] == pytest.approx(math.log10(edges) + 0.05)
        shares = "%: of the sum of all |score| of relp"  # 20 of 30 are no few: no line says theirs
        assert (shares in note(figure)) == (many[0] is scores) == bool(figure.layout.annotations)
    figure = draw(effect, kind="distribution")
    assert counts["exact"].removeprefix("exact, ") in note(figure)
    assert figure.data[-1].name == "all, 28" and len(figure.data[-1].x) == 28


def test_heatmaps_of_some_edges_say_shares_of_what_was_measured() -> None:
    scores, effect = partly_measured()
    assert "of all |score|; grey: no edge" in note(draw(scores))
    said = note(draw(effect))
    assert "with 92 % of all |score| that was measured; grey: no edge, or not measured" in said
    said = note(draw(effect, kind="layer"))
    assert "sum of |score (logit difference)| of those measured, mean" in said
    assert said.endswith("grey: no edge, or none measured")
    assert note(draw(scores, kind="layer")).endswith("mean over 2 pairs; grey: no edge")


# -- faithfulness ----------------------------------------------------------------------------------


def test_a_curve_shows_faithfulness_and_its_band() -> None:
    evaluation = make_evaluation()
    figure = draw(evaluation)
    lines = {t.name.partition(" ")[0]: t for t in figure.data if t.showlegend}
    bands = [t for t in figure.data if t.fill == "toself"]
    assert list(lines) == ["GRADIENT", "RELP", "random"] and len(bands) == 3
    table, areas = evaluation.to_dataframe(), evaluation.areas().set_index("rules")
    for (name, line), band in zip(lines.items(), bands, strict=True):
        of, row = table[table["rules"] == name], areas.loc[name]
        assert list(line.x) == of["size"].tolist() and list(line.y) == of["faithfulness"].tolist()
        assert list(band.y) == [*of["high"], *of["low"][::-1]]
        assert line.name == (
            f"{name} · CPR {row['CPR']:.2f} [{row['CPR_low']:.2f}, {row['CPR_high']:.2f}] · "
            f"CMD {row['CMD']:.2f} [{row['CMD_low']:.2f}, {row['CMD_high']:.2f}]"
        )
    assert figure.layout.xaxis.type == "log"
    assert lines["random"].line.dash == "dot" and lines["RELP"].line.dash == "solid"
    assert figure.layout.title.text == "Faithfulness by circuit size · tiny · toy"
    assert "the best edges by |score|, all others corrupt, 4 pairs" in note(figure)


def test_a_single_pair_has_no_band_and_several_evaluations_a_panel_each() -> None:
    single = draw(make_evaluation(pairs=1))
    assert not [t for t in single.data if t.fill] and "[" not in single.data[0].name
    figure = draw([make_evaluation(), make_evaluation(task="other", rules=("RELP", "GIM", "c"))])
    titles = [shown(a) for a in figure.layout.annotations]
    assert [t[0] for t in titles] == ["tiny · toy · 4 pairs", "tiny · other · 4 pairs"]
    assert titles[1][2].startswith("RELP · CPR")
    hues = {(t.legendgroup, t.line.color) for t in figure.data if t.mode == "lines+markers"}
    assert len(hues) == 5  # one for each name, whatever the panel
    assert sorted(t.name for t in figure.data if t.showlegend) == [
        "GIM", "GRADIENT", "RELP", "c", "random"
    ]  # fmt: skip


def test_each_evaluation_says_how_its_edges_were_ranked() -> None:
    signed, plain = make_evaluation(signed=True), make_evaluation()
    figure = draw([signed, plain])
    titles = [shown(a) for a in figure.layout.annotations]
    assert [t[1] for t in titles] == ["best edges by score", "best edges by |score|"]
    assert note(figure).startswith("the best edges, all others corrupt; ")
    for one, ranked in ((signed, "score"), (plain, "|score|")):
        said = note(draw(one))
        assert said.startswith(f"the best edges by {ranked}, all others corrupt, 4 pairs; ")
        assert said.endswith("1, best is 0; both over a linear axis")


def test_a_band_without_end_does_not_flatten_the_curves() -> None:
    wild = make_evaluation()
    wild = replace(wild, clean=torch.tensor([1.0, 1.0, 1.0, -2.9]))
    low, high = draw(wild).layout.yaxis.range
    values = wild.faithfulness
    assert low > min(0, float(values.min())) - 0.6 - 0.04 * (high - low)
    assert high < max(1, float(values.max())) + 0.6 + 0.04 * (high - low)


def test_differences_are_rows_with_intervals() -> None:
    table = make_evaluation().compare("RELP", "GRADIENT")
    figure = draw(table)
    (trace,) = figure.data
    assert figure.layout.title.text == "RELP − GRADIENT · tiny · toy"
    assert list(figure.layout.yaxis.ticktext) == table["measure"].tolist()
    np.testing.assert_allclose(trace.x, table["difference"])
    np.testing.assert_allclose(trace.x + np.array(trace.error_x.array), table["high"])
    np.testing.assert_allclose(trace.x - np.array(trace.error_x.arrayminus), table["low"])
    sure = (table["low"] > 0) | (table["high"] < 0)
    assert [c != "#ffffff" for c in trace.marker.color] == sure.tolist()
    tests = agreement_tests(
        [make_nodes(), make_nodes(seed=1, rules="gim")], make_nodes(Effects, seed=2),
        measures=["signs", "pearson"],
    )  # fmt: skip
    rows = draw(tests).layout.yaxis.ticktext
    assert "mlp · right signs · relp − gim" in rows
    assert len(rows) == tests["difference"].notna().sum()
    with pytest.raises(ValueError, match="it has no column 'high'"):
        draw(table.drop(columns="high"))
    with pytest.raises(ValueError, match="must have differences that are numbers"):
        draw(table.assign(difference=math.nan))


# -- attention -------------------------------------------------------------------------------------


@on("tiny", "llama", "gpt2")
def test_an_attention_pattern_is_the_models_own(tiny: Any) -> None:
    """What the head mixes, by the pattern that is drawn, is what the model gives on."""
    task, sites = random_task(tiny), Sites.of(tiny)
    figure = attention(tiny, task, "L2H3", pair=1)
    values, _ = observe(sites, task, ("L2.v", "L2.z"), side="corrupt")
    block = sites.blocks[2]
    v = values["L2.v"][1].unflatten(-1, (block.kv_heads, -1))
    v = v.repeat_interleave(block.heads // block.kv_heads, dim=1)[:, 3]
    z = values["L2.z"][1].unflatten(-1, (block.heads, -1))[:, 3]
    clean, corrupt = (np.nan_to_num(trace.z) for trace in figure.data)
    np.testing.assert_allclose(corrupt @ v.numpy(), z, atol=1e-5)
    np.testing.assert_allclose(clean.sum(1), 1, rtol=1e-5)
    assert not np.allclose(clean, corrupt)
    assert np.isnan(figure.data[0].z[0, 1:]).all()  # nobody looks ahead
    words = [tiny.tokenizer.decode([token]) for token in task.corrupt[1].tolist()]
    named = [f"{json.dumps(word, ensure_ascii=False)}@{pos}" for pos, word in enumerate(words)]
    assert list(figure.data[1].x) == list(figure.data[1].y) == labels(named, 15)
    query, key = (html.escape(named[pos], quote=False) for pos in (3, 2))
    assert figure.data[1].customdata[3][2] == f"{query} looks at {key}"
    assert figure.layout.title.text.startswith("L2H3 · ")
    assert [shown(a) for a in figure.layout.annotations] == [["clean prompt"], ["corrupt prompt"]]


@on("tiny", "llama")
def test_tokens_of_a_pattern_are_in_quotes_and_in_one_line(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ['a"b', "\n", "<b>", " a long token of words", "", *"abcdefghi"]
    task = random_task(tiny)
    ids = [*task.clean[0].tolist(), *task.corrupt[0].tolist()]
    monkeypatch.setattr(tiny.tokenizer, "decode", lambda token: words[ids.index(token[0])])
    trace = attention(tiny, task, "L0H0").data[0]
    shown = ['"a\\"b"@0', '"\\n"@1', '"&lt;b&gt;"@2', '" a long…rds"@3', "@4", '"a"@5']
    assert list(trace.x[:6]) == shown
    assert trace.customdata[3][0] == '" a long token of words"@3 looks at "a\\"b"@0'


@on("tiny", "llama")
def test_heads_that_are_not_there_have_no_pattern(tiny: Any) -> None:
    task = random_task(tiny)
    for name in ("L9H0", "L0KV1", "L0.mlp", "nonsense"):
        with pytest.raises(ValueError, match=f"`head` must be .* L0H0 to L2H3; got '{name}'"):
            attention(tiny, task, name)
    for pair in (-1, 4):
        with pytest.raises(ValueError, match="`pair` must be from 0 to 3, as the task has 4 pairs"):
            attention(tiny, task, "L0H0", pair=pair)


# -- tables for papers -----------------------------------------------------------------------------

TABLE = pd.DataFrame(
    {
        "rules": ["a_b & 50% $x$ <i> |\\", "[RELP]"],
        "kind": ["mlp", "head"],
        "pearson": [0.5061, -0.999],
        "peak": [0.7, 0.1],
        "hangs": [True, False],
        "signs": [math.nan, 0.9],
        "pairs": [1600, 16],
        "pearson_low": [-0.001, math.nan],
        "pearson_high": [0.8649, math.nan],
    }
)


def test_a_table_is_rounded_with_intervals_in_markdown() -> None:
    assert to_markdown(TABLE) == (
        "| rules | kind | Pearson r | right signs | pairs |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| a_b & 50% $x$ \\<i> \\|\\\\ | mlp | 0.51 [0.00, 0.86]\\* | - | 1,600 |\n"
        "| [RELP] | head | −1.00 | 0.90 | 16 |\n"
        "\n\\*: one cell decides r\n"
    )
    assert to_markdown(TABLE, columns=["peak"], digits=1).split("\n")[2].endswith("| mlp | 0.7 |")
    assert "decides" not in to_markdown(TABLE, columns=["peak"])


def test_labels_and_names_of_columns_are_written_so_that_they_can_be_read() -> None:
    table = pd.DataFrame(
        {"size": [0.0002, 0.012345, 1.0], "layer": [math.nan, 3.0, 12.0], "a|b_*": [1, 2, 3]}
    )
    assert to_markdown(table) == (
        "| size | layer | a\\|b \\* |\n"
        "| --- | --- | --- |\n"
        "| 0.02% | - | 1 |\n"
        "| 1.23% | 3 | 2 |\n"
        "| 100% | 12 | 3 |\n"
    )
    assert r"0.02\% & - & 1 \\" in to_latex(table)


def test_a_table_is_escaped_in_latex() -> None:
    lines = to_latex(TABLE).split("\n")
    assert lines[:3] == [
        r"\begin{tabular}{lllll}", r"\toprule",
        r"rules & kind & Pearson r & right signs & pairs \\",
    ]  # fmt: skip
    assert lines[4] == (
        r"a\_b \& 50\% \$x\$ $<$i$>$ $|$\textbackslash  & mlp & 0.51 [0.00, 0.86]* & - & 1,600 \\"
    )
    assert lines[5].startswith(r"{}[RELP] & head & $-$1.00 &")
    assert lines[7] == r"\multicolumn{5}{l}{\footnotesize *: one cell decides r} \\"


def test_tables_of_all_that_is_judged() -> None:
    evaluation = make_evaluation()
    row = evaluation.areas().iloc[1]
    text = f"| RELP | {row['CPR']:.2f} [{row['CPR_low']:.2f}, {row['CPR_high']:.2f}] |"
    assert text in to_markdown(evaluation)
    assert "| GRADIENT | 1% | 1 | " in to_markdown(evaluation.to_dataframe())
    p_values = pd.DataFrame({"measure": ["relative_error"], "difference": [-0.2], "low": [-0.3],
                             "high": [-0.1], "p_value": [0.0001], "p_holm": [0.03]})  # fmt: skip
    assert to_markdown(p_values).split("\n")[2] == (
        "| relative error | −0.20 [−0.30, −0.10] | \\<0.001 | 0.030 |"
    )
    bench = Bench((Entry("case", "group", "RELP", {"node cost": 1.5}),))
    assert to_markdown(bench) == bench.to_markdown() and "| RELP | 1.5× |" in to_markdown(bench)
    assert r"1.5$\times$" in to_latex(bench.overview("group"))
    with pytest.raises(ValueError, match="`columns` must be some of .*'pearson'.*; got 'rho'"):
        to_markdown(TABLE, columns=["rho"])
    with pytest.raises(ValueError, match="must have rows; this one has none"):
        to_latex(TABLE[:0])
    with pytest.raises(TypeError, match="got NodeScores"):
        inspect.unwrap(to_markdown)(make_nodes())


@pytest.mark.outside
def test_latex_takes_a_table(tmp_path: Path) -> None:
    # the rules of booktabs, which a small installation lacks
    lines = r"\let\toprule\hline\let\midrule\hline\let\bottomrule\hline"
    text = to_latex(pd.concat([TABLE, TABLE.assign(rules='* − ρ · × ~ ^ # {} "')]))
    (tmp_path / "t.tex").write_text(
        rf"\documentclass{{article}}\IfFileExists{{booktabs.sty}}{{\usepackage{{booktabs}}}}{{{lines}}}"
        rf"\begin{{document}}{text}\end{{document}}"
    )  # fmt: skip
    run = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "t.pdf").stat().st_size > 5000


# -- in a browser ----------------------------------------------------------------------------------

TEXTS = """() => [...document.querySelectorAll(
  '.gtitle, .gtitle-subtitle, .annotation-text, .xtick text, .ytick text, .xtitle, .ytitle, '
  + '.legendtext, .cbtitle text'
)].filter(e => e.textContent.trim()).map(e => {
  const r = e.getBoundingClientRect();
  return [e.textContent, r.left, r.top, r.right, r.bottom];
})"""


def overlap(one: list[float], other: list[float]) -> tuple[float, float]:
    """Across and up, of two boxes [left, top, right, bottom]."""
    low, high = ([f(a, b) for a, b in zip(one, other, strict=True)] for f in (min, max))
    return low[2] - high[0], low[3] - high[1]


FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--hide-scrollbars"]


@pytest.mark.outside
def test_no_text_of_a_figure_stands_on_another_or_leaves_the_page(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        browser = play.chromium.launch(executable_path=program, args=FLAGS)
        for name, figure in every_figure():
            height = figure.layout.height
            figure.write_html(path := tmp_path / f"{name}.html", include_plotlyjs="directory")
            page = browser.new_page(viewport={"width": 1200, "height": height + 20})
            page.goto(path.as_uri())
            for width in (1200, 700, 420):
                page.set_viewport_size({"width": width, "height": height + 20})
                page.wait_for_function(
                    f"document.querySelector('.main-svg').clientWidth <= {width}"
                )
                page.wait_for_timeout(100)
                found = page.evaluate(TEXTS)
                assert len(found) > 5, name
                for i, (text, *box) in enumerate(found):
                    assert min(box) > -2 and box[2] < width + 2, (width, name, text)
                    assert box[3] < height + 20, (width, name, text)
                    for other, *theirs in found[:i]:
                        assert min(overlap(box, theirs)) <= 2, (width, name, text, other)
            page.close()
        browser.close()
