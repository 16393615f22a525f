"""Figures: what is drawn where, in which colour, and that no name is taken for markup."""

import inspect
import math

import networkx as nx
import numpy as np
import pytest
import torch
from conftest import altered, made
from test_graph import make_scores

from circuits import agreement
from circuits.draw import draw
from circuits.draw.paint import ink, tint
from circuits.graph import assemble
from circuits.search.prune import top
from relp.scores import Effects, Scores


def make_nodes(kind=Scores, *, layers=2, heads=2, pairs=3, pos=4, seed=0, **labels) -> Scores:
    names = ["embed"]
    for layer in range(layers):
        names += [f"L{layer}.resid", f"L{layer}.attn", *(f"L{layer}H{h}" for h in range(heads))]
        names += [f"L{layer}.mlp"]
    generator = torch.Generator().manual_seed(seed)
    fields = {
        "model": "tiny",
        "task": "toy",
        "rules": "exact" if kind is Effects else "relp",
        "direction": "denoise",
        "metric": "logit difference",
        "clean": torch.ones(pairs),
        "corrupt": torch.zeros(pairs),
        "lengths": torch.full((pairs,), pos),
        "components": tuple(names),
        "nodes": torch.randn(pairs, len(names), pos, generator=generator),
    }
    return made(kind, **(fields | labels))


def make_circuit(edges=12, **options) -> nx.MultiDiGraph:
    return top(assemble(make_scores(**options)), edges=edges)


# -- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["resid", "attn", "mlp"])
def test_heatmap_shows_the_mean_over_pairs(kind):
    scores = make_nodes()
    figure = draw(scores, kind=kind)
    np.testing.assert_allclose(figure.data[0].z, scores.of_kind(kind)[1].mean(0), rtol=1e-6)
    assert list(figure.data[0].y) == ["L0", "L1"]
    assert figure.layout.yaxis.autorange is None, "layer 0 is at the bottom"
    assert "relp · tiny · toy · denoise" in figure.layout.title.text
    assert "score (logit difference)" in figure.data[0].colorbar.title.text


def test_the_residual_stream_comes_first():
    assert np.array_equal(draw(make_nodes()).data[0].z, draw(make_nodes(), kind="resid").data[0].z)


def test_heads_are_layer_by_head_summed_over_positions():
    scores = make_nodes(layers=3, heads=2)
    figure = draw(scores, kind="head")
    z = figure.data[0].z
    assert z.shape == (3, 2)
    at = scores.components.index("L2H1")
    assert z[2, 1] == pytest.approx(float(scores.nodes[:, at].sum(-1).mean()), rel=1e-5)
    assert figure.data[0].customdata[2, 1] == "L2H1"
    # each pair counts as much, whatever its length
    lengths = torch.tensor([4, 1, 2])
    kept = torch.where(torch.arange(4) < lengths[:, None, None], scores.nodes, 0.0)
    z = draw(make_nodes(layers=3, heads=2, nodes=kept, lengths=lengths), kind="head").data[0].z
    assert z[2, 1] == pytest.approx(float(kept[:, at].sum(-1).mean()), rel=1e-5)


def test_colours_are_symmetric_about_zero_and_blue_is_positive():
    scores = make_nodes()
    scores.nodes.abs_()  # nothing negative, and yet 0 must stay white
    for figure in (draw(scores), draw(make_scores())):
        trace = figure.data[0]
        assert trace.zmin == -trace.zmax and trace.zmid == 0
        assert trace.zmax == pytest.approx(np.nanmax(np.abs(trace.z)))
        assert trace.colorscale[0][1] == "rgb(103,0,31)"  # red, the low end
        assert trace.colorscale[-1][1] == "rgb(5,48,97)"
    assert [ink(score, 1.0) == "#ffffff" for score in (-1.0, -0.5, 0.5, 1.0)] == [1, 0, 0, 1]
    assert (tint(1.0, 1.0), tint(0.0, 1.0), tint(-9.0, 1.0)) == ("#427db8", "#ffffff", "#be3b4b")


def shown(title) -> list[str]:
    """The lines of a panel's title."""
    text = title.text.replace("<b>", "").replace("</b>", "")
    return text.replace("\N{NO-BREAK SPACE}", " ").split("<br>")


def test_scores_of_zero_can_be_drawn():
    scores = make_nodes()
    scores.nodes.zero_()
    assert draw(scores).data[0].zmax == 1.0
    (title, *_) = draw(scores, scores).layout.annotations
    assert shown(title) == [
        "embed", "r undefined · ρ undefined", "signs undefined", "error undefined"
    ]  # fmt: skip


def test_tokens_label_positions_only_where_all_pairs_have_them():
    tokens = ("<b>", " A&B", "\n", "x")
    trace = draw(make_nodes(tokens=tokens)).data[0]
    assert list(trace.x) == ['"&lt;b&gt;"@0', '" A&amp;B"@1', '"\\n"@2', '"x"@3']
    assert trace.customdata[0, 1] == 'L0.resid " A&amp;B"@1'
    assert list(draw(make_nodes()).data[0].x) == ["@0", "@1", "@2", "@3"]
    long = (f" {'a' * 40}", *tokens[1:])
    trace = draw(make_nodes(tokens=long)).data[0]
    assert trace.x[0] == '" aaaaaaaaaaa…aaa"@0' and "a" * 40 in trace.customdata[0, 0]


def test_means_by_position_of_ragged_prompts_say_over_whom():
    ragged = make_nodes(lengths=torch.tensor([4, 4, 2]))
    assert (
        "at each position over those that are<br>long enough"
        in draw(ragged).layout.title.subtitle.text
    )
    assert "long enough" not in draw(make_nodes()).layout.title.subtitle.text
    assert "mean over 1 pair" in draw(make_nodes(pairs=1)).layout.title.subtitle.text


def test_spans_that_lie_apart_take_the_place_of_positions():
    nodes, end = make_nodes().nodes, torch.full((3,), 3)
    for spans, lengths in (
        ({"name": torch.tensor([0, 2, 1]), "end": end}, torch.tensor([4, 4, 4])),
        ({"name": torch.tensor([0, 0, 0]), "end": end - torch.arange(3)}, 4 - torch.arange(3)),
    ):
        kept = torch.where(torch.arange(4) < lengths[:, None, None], nodes, 0.0)
        scores = make_nodes(nodes=kept, lengths=lengths, spans=spans, tokens=tuple("abcd"))
        figure = draw(scores, kind="mlp")
        assert list(figure.data[0].x) == ["name", "end", "other"]
        assert figure.layout.xaxis.title.text == "span"
        assert figure.data[0].customdata[1, 0] == "L1.mlp@name"
        row = kept[:, scores.components.index("L1.mlp")]
        named = [float(row[torch.arange(3), at].mean()) for at in spans.values()]
        expected = [*named, float(row.sum(-1).mean()) - sum(named)]
        np.testing.assert_allclose(figure.data[0].z[1], expected, atol=1e-6)
        by_position = draw(scores, kind="mlp", positions=True)
        assert by_position.data[0].customdata[1, 3] in ("L1.mlp@3", 'L1.mlp "d"@3')
    named = altered(scores, spans={"<b>": spans["name"], "end": spans["end"]})
    assert draw(named, kind="mlp").data[0].customdata[1, 0] == "L1.mlp@&lt;b&gt;"
    same = make_nodes(spans={"name": torch.tensor([1, 1, 1]), "end": end}, tokens=tuple("abcd"))
    assert draw(same).data[0].customdata[0, 3] == 'L0.resid "d"@3'
    effect = altered(scores, nodes=kept.sum(-1, keepdim=True), tokens=("all positions",))
    assert draw(effect).data[0].customdata[1, 0] == "L1.resid@all positions"
    assert effect.by_span() is effect


def test_edges_are_writer_by_reader_and_blank_where_none_can_be():
    scores = make_scores()
    trace = draw(scores).data[0]
    assert trace.z.shape == (7, 15)
    assert np.isfinite(trace.z).sum() == 46
    w, r = scores.writers.index("L0H1"), scores.readers.index("L1H0.k")
    assert trace.z[w, r] == pytest.approx(float(scores.edges[w, r]))
    assert (trace.y[w], trace.x[r]) == ("L0H1", "L1H0.k")
    assert "grey: no edge" in draw(scores).layout.title.subtitle.text
    # edges by position: a reader at each of them is a column of its own, nothing is summed
    by_position = make_scores(positions=2)
    trace = draw(by_position).data[0]
    assert (trace.z.shape, trace.x[2 * r + 1]) == ((7, 30), "L1H0.k@1")
    assert trace.z[w, 2 * r + 1] == pytest.approx(float(by_position.edges[1, w, r]))
    with pytest.raises(ValueError, match="`kind` of edges must be one of .'q', 'k', 'v', 'in'"):
        draw(scores, kind="head")


# -- score against effect -------------------------------------------------------------------------


def test_scatter_has_a_panel_per_kind_with_all_measures():
    scores = make_nodes(pairs=2)
    noise = torch.randn(scores.nodes.shape, generator=torch.Generator().manual_seed(5))
    effect = make_nodes(Effects, pairs=2, nodes=scores.nodes + 0.5 * noise)
    figure = draw(scores, effect)
    titles = [shown(annotation) for annotation in figure.layout.annotations]
    assert [lines[0] for lines in titles] == ["embed", "resid", "attn", "head", "mlp"]
    measures = agreement(scores, effect).set_index("kind")
    note = figure.layout.title.subtitle.text.replace("<br>", " ")
    assert "*: one point decides r" in note and measures["hangs"].any()
    for kind, title in zip(scores.kinds(), titles, strict=True):
        x, y = scores.of_kind(kind)[1], effect.of_kind(kind)[1]
        each = [np.corrcoef(x[p].flatten(), y[p].flatten())[0, 1] for p in range(2)]
        norms = [torch.linalg.norm(v.flatten(1), dim=1) for v in (x - y, y)]
        error = float((norms[0] / norms[1]).mean())
        row = measures.loc[kind]
        star = "*" if row["hangs"] else ""
        bracket = f" [{row['pearson_low']:.3f}, {row['pearson_high']:.3f}]"
        said = " · ".join(title[1:]).replace(f"{star} · [", f"{star} [")
        assert said == (
            f"r {np.mean(each):.3f}{star}{'' if math.isnan(row['pearson_low']) else bracket} · ρ "
            f"{row['spearman']:.2f} · signs {row['signs']:.0%} · error {error:.2f}"
        )
    line, points = figure.data[6:8]  # two traces per panel; heads are the fourth
    assert list(line.x) == list(line.y)
    np.testing.assert_allclose(points.x, effect.of_kind("head")[1].flatten(), rtol=1e-6)
    np.testing.assert_allclose(points.y, scores.of_kind("head")[1].flatten(), rtol=1e-6)
    assert figure.layout.xaxis5.title.text == "effect (logit difference)"
    assert figure.layout.yaxis.title.text == "score (logit difference)"
    assert "denoise" in figure.layout.title.text
    assert len(draw(scores, effect, kind="mlp").data) == 2


def test_scatter_leaves_out_positions_that_a_pair_does_not_have():
    lengths = torch.tensor([4, 2, 3])
    figure = draw(make_nodes(lengths=lengths), make_nodes(Effects, lengths=lengths), kind="mlp")
    assert len(figure.data[1].x) == 2 * (4 + 2 + 3)


def test_scatter_takes_the_same_sample_of_many_points_each_time():
    scores, effect = (make_nodes(k, layers=6, heads=12, pos=80) for k in (Scores, Effects))
    a, b = (draw(scores, effect, kind="head").data[1] for _ in "ab")
    assert len(a.x) == 5000 and np.array_equal(a.x, b.x)


def test_edges_can_be_compared_too():
    scores = make_scores()
    figure = draw(scores, make_scores(seed=1))
    titles = [shown(annotation) for annotation in figure.layout.annotations]
    assert [lines[0] for lines in titles] == ["q", "k", "v", "in"]
    assert sum(len(trace.x) for trace in figure.data[1::2]) == 46


def test_what_does_not_belong_together_is_refused():
    scores = make_nodes()
    for name, value in (("direction", "noise"), ("task", "other"), ("metric", "loss")):
        with pytest.raises(ValueError, match=f"must be of the same {name}"):
            draw(scores, make_nodes(Effects, **{name: value}))
    with pytest.raises(ValueError, match="must be of the same level"):
        draw(scores, make_scores())
    with pytest.raises(ValueError, match="of the same pairs"):
        draw(scores, make_nodes(Effects, lengths=torch.tensor([4, 4, 3])))
    with pytest.raises(ValueError, match="must have the same positions and components"):
        draw(make_scores(), make_scores(positions=2))
    with pytest.raises(ValueError, match="`kind` must be one of"):
        draw(scores, kind="mixer")
    with pytest.raises(ValueError, match="`kind` must be one of"):
        draw(scores, make_nodes(Effects), kind="mixer")


def test_wrong_types_are_told_what_is_accepted():
    for wrong in (("scores",), (make_nodes(), make_circuit()), (make_circuit(), make_nodes())):
        with pytest.raises(
            TypeError, match="draw takes Scores, Effects, Scores with Effects, a list of them"
        ):
            inspect.unwrap(draw)(*wrong)  # without the tests' type checker
    with pytest.raises(TypeError, match="got DiGraph"):
        inspect.unwrap(draw)(nx.DiGraph())


# -- texts and tables ------------------------------------------------------------------------------


def test_text_of_models_and_tasks_is_escaped():
    nasty = {"model": "a/b <i>c</i>", "task": "</script><b>&", "metric": "<u>"}
    effect = make_nodes(Effects, **nasty)
    for figure in (
        draw(make_nodes(**nasty)),
        draw(make_nodes(**nasty), effect),
        draw(make_scores(**nasty)),
        draw(make_circuit(**nasty)),
        draw(make_circuit(), title="</script><b>& a/b <i>c</i>"),
    ):
        title = figure.layout.title.text
        assert "&lt;/script&gt;&lt;b&gt;&amp;" in title and "a/b &lt;i&gt;c&lt;/i&gt;" in title
        assert "<u>" not in str(figure.to_dict())
    nodes = str(draw(nx.relabel_nodes(make_circuit(), {"L0H0": "<b>"})).to_dict())
    assert nodes.count("&lt;b&gt;") > 2 and "<b>" not in nodes


def test_agreement_is_drawn_by_measure() -> None:
    effect = make_nodes(Effects)
    noisy = [make_nodes(rules=r, nodes=effect.nodes + size * make_nodes(seed=1).nodes)
             for r, size in (("RELP", 0.3), ("GRADIENT", 1.0))]  # fmt: skip
    table = agreement(noisy, effect)
    table.loc[table["kind"] == "embed", "pearson"] = math.nan
    figure = draw(table)
    assert [shown(a) for a in figure.layout.annotations[:4]] == [
        ["Pearson's r"], ["Spearman's ρ"], ["right signs"], ["relative error"],
    ]  # fmt: skip
    assert "agreement with exact effects · tiny · toy" in figure.layout.title.text
    marks = {(t.name, t.xaxis): t for t in figure.data}
    assert len(marks) == len(figure.data) == 8
    # what has no correlation has no row
    kinds = [k for k in dict.fromkeys(table["kind"]) if k != "embed"]
    assert list(figure.layout.yaxis.ticktext) == kinds
    of = table[(table["rules"] == "GRADIENT") & (table["kind"] != "embed")]
    drawn = marks["GRADIENT", "x4"]
    assert list(drawn.x) == pytest.approx(of["relative_error"].tolist())
    assert list(drawn.error_x.array) == pytest.approx(
        (of["relative_error_high"] - of["relative_error"]).tolist()
    )
    # what lies outside is at the edge, with its number
    table.loc[table["rules"] == "GRADIENT", "pearson"] = -0.8
    edge = next(t for t in draw(table).data if t.name == "GRADIENT" and t.xaxis == "x")
    assert set(edge.x) == {-0.25} and set(edge.text) == {"-0.80"}
    with pytest.raises(ValueError, match=r"one of circuits\.agreement; it has no column 'kind'"):
        draw(table[["rules"]])
    with pytest.raises(ValueError, match="must have rows with a correlation; this one has none"):
        draw(table.assign(pearson=math.nan))
