"""Features of dictionaries as components: scores, edges, exact effects, circuits, steering."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import jaxtyping
import pandas as pd
import pytest
import torch
from conftest import able_task, on, ragged_task, random_task
from test_linear import FIXED
from test_linear import model as linear  # noqa: F401  # a fixture
from torch import Tensor

from circuits import (
    agreement,
    assemble,
    evaluate_features,
    faithfulness,
    labelled,
    load,
    patch,
    save,
    steered,
    top,
)
from circuits.exact import Cell, Runs
from relp import DEEPLIFT, GRADIENT, PARTWAY, PRESETS, RELP, Component, Scores, attribute
from relp.bridge import Sites
from relp.dictionaries import Dictionary, JumpRelu, Relu, Scaled, TopK
from tasks import Task

pytestmark = pytest.mark.filterwarnings("ignore:.*of the variance of.*unexplained")
QUIET: dict[str, Any] = {"progress": False}


def dictionary(
    width: int, *, count: int = 20, seed: int = 0, activation: Any = None, **more: Any
) -> Dictionary:
    """Random directions, of which each vector has some."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    w_dec = normal(count, width) / width**0.5
    w_enc = w_dec.T.contiguous() + 0.1 * normal(width, count)
    offset = 0.1 * normal(count) - 0.1
    return Dictionary(
        w_enc, w_dec, offset, 0.1 * normal(width), activation or Relu(), **more
    )  # fmt: skip


def some(model: Any) -> dict[str, Dictionary]:
    """Of each kind of site, one of each kind; a transcoder too."""
    width = model.cfg.d_model
    jump = JumpRelu(torch.full((20,), 0.2))
    return {
        "L0.mlp": dictionary(width, seed=1, reads="L0.mlp_in", writes="L0.mlp"),
        "L1.resid": dictionary(width, seed=2, activation=TopK(6)),
        "L1.attn": dictionary(width, seed=3, activation=jump),
        "L1.mlp": dictionary(width, seed=4, subtracts=True, normalization=Scaled(1.7)),
        "final": dictionary(width, seed=5),
    }


def of(scores: Scores, site: str) -> list[int]:
    return [i for i, name in enumerate(scores.components) if name.startswith(f"{site}/")]


# -- scores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", PRESETS.values(), ids=list(PRESETS))
@on("tiny", "llama", "gpt2")
def test_features_and_the_rest_sum_to_their_site(tiny: Any, rules: Any) -> None:
    task = ragged_task(tiny)
    for keep in (None, 3):
        scores = attribute(tiny, task, rules=rules, features=some(tiny), keep=keep)
        for site in ("L0.mlp", "L1.resid", "L1.attn", "L1.mlp"):
            mine = of(scores, site)
            whole = scores.nodes[:, scores.components.index(site)]
            scale = float(scores.nodes[:, mine].abs().max())
            torch.testing.assert_close(scores.nodes[:, mine].sum(1), whole, rtol=1e-5,
                                       atol=1e-5 * max(1, scale))  # fmt: skip
            assert keep is None or len(mine) == keep + 1
    total = scores.nodes[:, of(scores, "final")].sum((1, 2))
    if rules is DEEPLIFT:
        torch.testing.assert_close(total, scores.gap, rtol=1e-4, atol=1e-5)


def test_scores_are_changes_times_coefficients_along_directions(tiny: Any) -> None:
    """By hooks and autograd."""
    task, own, other = random_task(tiny, pairs=3, length=5), "corrupt", "clean"
    features = {"L1.mlp": some(tiny)["L1.mlp"]}
    at = "blocks.1.hook_mlp_out"
    held: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> Tensor:
        held["x"] = value.detach().requires_grad_()
        return held["x"]

    values = {}
    for side in (other, own):
        metric = task.metric(tiny.run_with_hooks(getattr(task, side), fwd_hooks=[(at, keep)]))
        values[side] = held["x"]
    (slope,) = torch.autograd.grad(metric.sum(), held["x"])
    d = features["L1.mlp"]
    change = d.encode(values[other].detach()) - d.encode(values[own].detach())
    expected = torch.einsum("ptf,fd,ptd->pft", change, d.w_dec, slope)
    scores = attribute(tiny, task, rules=GRADIENT, features=features, components="feature")
    numbers = [Component.parse(c).head for c in scores.components[:-1]]
    torch.testing.assert_close(scores.nodes[:, :-1], expected[:, numbers], rtol=1e-4, atol=1e-6)
    left = sorted(set(range(20)) - set(numbers))
    assert not bool(expected[:, left].any())  # what differs nowhere is not kept


def test_the_path_of_a_site_is_integrated_gradients_of_that_site_alone(tiny: Any) -> None:
    """Marks et al. 2024: the site moves from the own to the other run, all else follows."""
    task, site, steps = random_task(tiny, pairs=2, length=4), "L1.mlp", 3
    at = "blocks.1.hook_mlp_out"
    _, own = tiny.run_with_cache(task.corrupt, names_filter=at)
    _, other = tiny.run_with_cache(task.clean, names_filter=at)
    slope = torch.zeros_like(own[at])
    for step in range(steps):
        between = torch.lerp(own[at], other[at], (step + 0.5) / steps).detach().requires_grad_()
        metric = task.metric(
            tiny.run_with_hooks(task.corrupt, fwd_hooks=[(at, lambda _, hook, x=between: x)])
        )
        slope += torch.autograd.grad(metric.sum(), between)[0] / steps
    options: dict[str, Any] = {"features": {site: some(tiny)[site]}, "components": [site]}
    scores = attribute(tiny, task, rules=GRADIENT, steps=steps, path="site", **options)
    expected = ((other[at] - own[at]) * slope).sum(-1)
    torch.testing.assert_close(scores.nodes[:, 0], expected.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scores.nodes[:, 1:].sum(1), scores.nodes[:, 0], rtol=1e-4, atol=1e-6)
    assert scores.rules == "GRADIENT (3 steps of each site)"


def test_scores_say_their_dictionaries_and_keep_them(tiny: Any, tmp_path: Any) -> None:
    features = some(tiny)
    scores = attribute(tiny, random_task(tiny, pairs=2), features=features, keep=2)
    said = scores.provenance.dictionaries
    assert said.startswith(f"L0.mlp {features['L0.mlp'].fingerprint}, L1.resid ")
    again = Scores.load(scores.save(tmp_path / "s.safetensors"))
    assert again.components == scores.components and again.provenance == scores.provenance
    assert again.kinds()[-2:] == ("feature", "rest")
    assert attribute(tiny, random_task(tiny, pairs=2)).provenance.dictionaries == ""


# -- exact effects ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ablation", ["patch", "zero", "mean"])
@on("tiny", "llama", "gpt2")
def test_a_feature_is_patched_as_by_hand(tiny: Any, ablation: str) -> None:
    task, site = random_task(tiny, pairs=3, length=4), "L1.mlp"
    d, at = some(tiny)[site], "blocks.1.hook_mlp_out"
    scores = attribute(tiny, task, features={site: d}, components="feature", keep=3)
    effect = patch(tiny, task, components=scores.components, features={site: d},
                   ablation=ablation, **QUIET)  # fmt: skip
    assert effect.components == scores.components
    assert effect.provenance.dictionaries == scores.provenance.dictionaries
    held = {s: tiny.run_with_cache(getattr(task, s), names_filter=at)[1][at].detach()
            for s in ("clean", "corrupt")}  # fmt: skip
    numbers = [Component.parse(c).head for c in scores.components[:-1]]

    def divided(x: Tensor) -> tuple[Tensor, Tensor]:
        values = d.encode(x)[..., numbers]
        return values, x - values @ d.w_dec[numbers]

    own, other = divided(held["corrupt"]), divided(held["clean"])
    if ablation == "zero":
        other = tuple(torch.zeros_like(t) for t in other)
    elif ablation == "mean":
        other = tuple(t.mean((0, 1), keepdim=True).expand_as(t) for t in other)
    with torch.no_grad():
        before = task.metric(tiny(task.corrupt))
        for column, name in enumerate(effect.components):
            i = column if "/f" in name else None
            step = other[1] - own[1] if i is None else (
                (other[0] - own[0])[..., i, None] * d.w_dec[numbers[i]]
            )  # fmt: skip
            for pos in range(4):

                def add(x: Tensor, hook: Any, step: Tensor = step, pos: int = pos) -> Tensor:
                    x = x.clone()
                    x[:, pos] += step[:, pos]
                    return x

                metric = task.metric(tiny.run_with_hooks(task.corrupt, fwd_hooks=[(at, add)]))
                found = effect.nodes[:, column, pos]
                torch.testing.assert_close(found, metric - before, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_on_a_linear_model_scores_of_features_are_exact(linear: Any, direction: str) -> None:  # noqa: F811
    task, width = random_task(linear, pairs=3, length=4), linear.cfg.d_model
    features = {site: dictionary(width, seed=i)
                for i, site in enumerate(("L0.mlp", "L1.resid", "final"))}  # fmt: skip
    for d in features.values():  # what nobody writes to, or norms take off, stays as it is
        d.w_dec[:, :FIXED] = 0
        d.w_dec[:, FIXED:] -= d.w_dec[:, FIXED:].mean(1, keepdim=True)
    options: dict[str, Any] = {"features": features, "direction": direction}
    scores = attribute(linear, task, rules=GRADIENT, components="feature", **options)
    effect = patch(linear, task, components=scores.components, **options, **QUIET)
    scale = float(effect.nodes.abs().max())
    torch.testing.assert_close(scores.nodes, effect.nodes, rtol=1e-4, atol=2e-5 * scale)


def test_all_of_a_sites_features_at_once_are_the_site(tiny: Any) -> None:
    task = random_task(tiny, pairs=2, length=4)
    features = {"L1.resid": some(tiny)["L1.resid"]}
    rest = patch(tiny, task, components=["L1.resid", "L1.resid/rest"], features=features, **QUIET)
    torch.testing.assert_close(rest.nodes[:, 0], rest.nodes[:, 1])  # no feature is kept apart
    scores = attribute(tiny, task, features=features, components="feature")
    assert list(agreement(scores, patch(
        tiny, task, components=scores.components, features=features, **QUIET)).kind
    ) == ["feature", "rest"]  # fmt: skip


def test_cells_of_features_are_of_their_sweep(tiny: Any, tmp_path: Any) -> None:
    task, features = random_task(tiny, pairs=2, length=4), {"L1.mlp": some(tiny)["L1.mlp"]}
    file = tmp_path / "sweep.safetensors"
    options: dict[str, Any] = {"features": features, "resume": file, **QUIET}
    one = patch(tiny, task, components=["L1.mlp/f3", "L1.mlp/rest"], **options)
    again = patch(tiny, task, components=["L1.mlp/f3", "L1.mlp/rest"], **options)
    assert torch.equal(one.nodes, again.nodes)
    with pytest.raises(ValueError, match=r"differs in features: 'L1\.mlp/f3', now 'L1\.mlp/f3 L1"):
        patch(tiny, task, components=["L1.mlp/f3", "L1.mlp/f4", "L1.mlp/rest"], **options)
    with pytest.raises(ValueError, match="a cell must be a component or an edge of"):
        Runs(tiny, task, features=features).measure([Cell("L1.mlp/f3", pos=0)], **QUIET)


# -- edges -----------------------------------------------------------------------------------------


@on("tiny", "llama", "gpt2")
def test_edges_into_a_feature_sum_to_its_score(tiny: Any) -> None:
    task, features = random_task(tiny, pairs=3, length=5), some(tiny)
    edges = attribute(tiny, task, rules=DEEPLIFT, level="edge", features=features, keep=4)
    nodes = attribute(tiny, task, rules=DEEPLIFT, features=features, keep=4, components="feature")
    scores = dict(zip(*nodes.by_component(), strict=True))
    assert edges.readers == (*(f"{name}.in" for name in nodes.components), "logits.in")
    for column, reader in enumerate(edges.readers[:-1]):
        expected = float(scores[reader.removesuffix(".in")])
        assert float(edges.edges[:, column].sum()) == pytest.approx(expected, rel=1e-4, abs=2e-5)
    assert float(edges.edges[:, -1].sum()) == pytest.approx(float(edges.gap.mean()), rel=1e-4)
    assert not bool(edges.edges[~edges.layout.exists].any())
    # what the final features write is all that the logits read
    last = [i for i, name in enumerate(edges.writers) if not name.startswith("final/")]
    assert not bool(edges.edges[last, -1].any())
    assert edges.provenance.dictionaries == nodes.provenance.dictionaries


def test_an_edge_is_what_one_feature_does_to_the_next(tiny: Any) -> None:
    """By hand, under GRADIENT: the upstream change, through the block, to the value downstream."""
    task = random_task(tiny, pairs=2, length=4)
    up, down = dictionary(tiny.cfg.d_model, seed=7), dictionary(tiny.cfg.d_model, seed=8)
    features = {"L1.resid": up, "L2.resid": down}
    edges = attribute(tiny, task, rules=GRADIENT, level="edge", features=features, keep=5)
    first, second = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
    _, other = tiny.run_with_cache(task.clean, names_filter=first)
    held: dict[str, Tensor] = {}

    def leaf(x: Tensor, hook: Any) -> Tensor:
        held[hook.name] = x.detach().requires_grad_()
        return held[hook.name]

    def both(x: Tensor, hook: Any) -> Tensor:
        held["arriving"] = x
        return leaf(x, hook)

    hooks = [(first, leaf), (second, both)]
    metric = task.metric(tiny.run_with_hooks(task.corrupt, fwd_hooks=hooks))
    names = list(held)
    (_, _, at) = names[0], names[1], names[-1]
    (coefficient,) = torch.autograd.grad(metric.sum(), held[at], retain_graph=True)
    entering = held[names[0]]
    for writer in [w for w in edges.writers if w.startswith("L1.resid/f")]:
        u = Component.parse(writer).head
        change = (up.encode(other[first]) - up.encode(entering))[..., u].detach()
        for reader in [r for r in edges.readers if r.startswith("L2.resid/f")]:
            d = Component.of_reader(reader)[0].head
            value = down.encode(held["arriving"])[..., d]
            worth = (value * (coefficient @ down.w_dec[d])).sum()
            (back,) = torch.autograd.grad(worth, entering, retain_graph=True)
            expected = float((back @ up.w_dec[u] * change).sum()) / len(task)
            found = float(edges.edges[edges.layout.row[writer], edges.layout.column[reader]])
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_a_circuit_of_features_is_a_circuit(tiny: Any, tmp_path: Any) -> None:
    task, features = random_task(tiny, pairs=2, length=4), some(tiny)
    edges = attribute(tiny, task, level="edge", features=features, keep=4)
    circuit = top(edges, edges=20)
    assert set(circuit) <= set(assemble(edges)) and circuit.nodes["embed"]["kind"] == "embed"
    for suffix in ("json", "svg", "graphml", "html", "csv", "dot", "mmd"):
        save(circuit, tmp_path / f"c.{suffix}")
    again = load(tmp_path / "c.json")
    assert set(again.edges) == set(circuit.edges)
    assert again.graph["dictionaries"] == edges.provenance.dictionaries
    told = labelled(circuit, pd.DataFrame({"feature": ["L9.mlp/f1", "embed"], "text": ["a", "b<"]}))
    assert told.nodes["embed"]["text"] == "b<" and "text" not in circuit.nodes["embed"]
    assert " · b&lt;" in save(told, tmp_path / "told.svg").read_text()
    assert "b\\u003c" in save(told, tmp_path / "told.html").read_text()  # in the explorer too
    assert load(save(told, tmp_path / "told.json")).nodes["embed"]["text"] == "b<"
    with pytest.raises(ValueError, match="must be by names of nodes of the circuit, such as 'embe"):
        labelled(circuit, {"L9.mlp/f1": "a"})
    with pytest.raises(ValueError, match="must have the columns 'feature' and 'text'; got name"):
        labelled(circuit, pd.DataFrame({"name": ["embed"]}))
    named = attribute(tiny, task, level="edge", features=features,
                      components=["L1.mlp/f3", "L1.resid/f2", "L1.resid/f5"])  # fmt: skip
    assert named.writers == ("embed", "L1.resid/f2", "L1.resid/f5", "L1.resid/rest", "L1.mlp/f3",
                             "L1.mlp/rest")  # fmt: skip


# -- circuits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ablation", ["patch", "mean", "zero"])
@on("tiny", "llama", "gpt2")
def test_circuits_of_features_between_all_and_nothing(tiny: Any, ablation: str) -> None:
    task, features = able_task(tiny, pairs=3, length=4), some(tiny)
    scores = [attribute(tiny, task, rules=r, features=features, components="feature")
              for r in (RELP, GRADIENT)]  # fmt: skip
    table = evaluate_features(tiny, task, scores, features=features, sizes=(2, 5),
                              ablation=ablation, **QUIET)  # fmt: skip
    assert set(table.rules) == {"RELP", "GRADIENT", "random"}
    whole = table[table.features == table.features.max()]
    kept = whole[whole.errors == "in"]
    assert kept.faithfulness.tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    assert kept.completeness.tolist() == pytest.approx([0.0] * 3, abs=1e-5)
    assert bool((table.low <= table.faithfulness + 1e-9).all())
    one, other = (whole[whole.rules == r].faithfulness.tolist() for r in ("RELP", "random"))
    assert one == pytest.approx(other, abs=1e-5)  # all are kept, in any order


def test_a_circuit_of_features_is_run_as_by_hand(tiny: Any) -> None:
    task, site, at = able_task(tiny, pairs=3, length=4), "L1.mlp", "blocks.1.hook_mlp_out"
    d = some(tiny)[site]
    scores = attribute(tiny, task, features={site: d}, components="feature")
    table = evaluate_features(tiny, task, scores, features={site: d}, sizes=(2,), random=0, **QUIET)
    names, sizes = scores.by_component()
    order = sorted(range(len(names) - 1), key=lambda i: -abs(float(sizes[i])))[:2]
    numbers = [Component.parse(names[i]).head for i in order]
    _, other = tiny.run_with_cache(task.corrupt, names_filter=at)

    def mixed(x: Tensor, hook: Any) -> Tensor:  # without errors: the others' values all at once
        change = (d.encode(x) - d.encode(other[at]))[..., numbers]
        return other[at] + change @ d.w_dec[numbers]

    with torch.no_grad():
        full = float(task.metric(tiny(task.clean)).mean())
        none, some_ = (
            float(task.metric(tiny.run_with_hooks(task.clean, fwd_hooks=[(at, hook)])).mean())
            for hook in (lambda _, hook: other[at], mixed)
        )
    expected = (some_ - none) / (full - none)
    row = table[(table.features == 2) & (table.errors == "out")]
    assert float(row.faithfulness.iloc[0]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_a_circuit_keeps_the_features_that_are_its_nodes(tiny: Any) -> None:
    task, features = able_task(tiny, pairs=3, length=4), some(tiny)
    edges = attribute(tiny, task, level="edge", features=features, keep=4)
    circuit = top(edges, edges=20)
    scores = attribute(tiny, task, rules=GRADIENT, features=features, components="feature")
    table = evaluate_features(tiny, task, [circuit, scores], features=features, sizes=(3,), **QUIET)
    mine = table[table.rules == "RELP"]
    kept = [name for name in circuit if "/f" in name]
    assert mine.features.tolist() == [len(kept)] * 2 and mine.errors.tolist() == ["in", "out"]
    assert table.features.max() == 5 * 20  # all features of all dictionaries
    whole = table[(table.rules == "GRADIENT") & (table.features == 100) & (table.errors == "in")]
    assert float(whole.faithfulness.iloc[0]) == pytest.approx(1, abs=1e-5)
    alone = evaluate_features(tiny, task, circuit, features=features, random=0, **QUIET)
    assert alone.faithfulness.tolist() == pytest.approx(mine.faithfulness.tolist(), abs=1e-6)
    with pytest.raises(ValueError, match="must have names of its own.*got RELP for 2; see Scores"):
        evaluate_features(tiny, task, [circuit, circuit], features=features)
    with pytest.raises(ValueError, match="one of features with evaluate_features"):
        faithfulness(tiny, task, circuit)


# -- steering --------------------------------------------------------------------------------------


def test_a_feature_is_set_and_the_model_is_as_before(tiny: Any) -> None:
    task, features = random_task(tiny, pairs=2, length=4), some(tiny)
    d, at = features["L1.mlp"], "blocks.1.hook_mlp_out"
    with torch.no_grad():
        plain, cache = tiny.run_with_cache(task.clean, names_filter=at)
        with steered(tiny, {"L1.mlp/f3": 4.0, "L1.mlp/f5": 0.0}, features=features):
            found, held = tiny.run_with_cache(task.clean, names_filter=at)
        assert torch.equal(tiny(task.clean), plain) and not torch.allclose(found, plain)
    own = d.encode(cache[at])
    expected = cache[at] + (4.0 - own[..., 3, None]) * d.w_dec[3] - own[..., 5, None] * d.w_dec[5]
    torch.testing.assert_close(held[at], expected, rtol=1e-4, atol=1e-5)


def test_a_transcoders_feature_is_set_by_what_it_reads(tiny: Any) -> None:
    task, features = random_task(tiny, pairs=2, length=4), some(tiny)
    d, names = features["L0.mlp"], ("blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out")
    with torch.no_grad():
        _, cache = tiny.run_with_cache(task.clean, names_filter=lambda n: n in names)
        with steered(tiny, {"L0.mlp/f2": 1.5}, features=features):
            _, held = tiny.run_with_cache(task.clean, names_filter=names[1])
    step = (1.5 - d.encode(cache[names[0]])[..., 2, None]) * d.w_dec[2]
    torch.testing.assert_close(held[names[1]], cache[names[1]] + step, rtol=1e-4, atol=1e-5)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": {"L9.mlp": 0}}, r"must be given by sites of '.*', as 'L0\.mlp', .*'L9\.mlp'"),
        ({"features": {"L0.q": 0}}, r"as 'L0\.mlp', 'L1\.resid', .*; got 'L0\.q'; a transcoder's"),
        ({"features": {"L0.mlp": 3}}, r"a dictionary must be a relp\.Dictionary, the path of"),
        ({"features": {"L1.mlp": "L0.mlp"}}, r"it reads 'L0\.mlp_in'|its file says"),
        ({"features": {"L1.mlp": "narrow"}}, r"must read \d+ and write \d+ numbers at 'L1\.mlp'"),
        ({"keep": 3}, r"`keep` must be a whole number of at least 1, beside `features`; got 3"),
        ({"features": {"L1.mlp": "L1.mlp"}, "keep": 0}, r"`keep` must be .*; got 0; leave it out"),
        (
            {"features": {"L1.mlp": "L1.mlp"}, "level": "edge", "positions": True},
            r"edges between features are .*; got positions; leave that out, or use level='node'",
        ),
        (
            {
                "features": {"L1.mlp": "L1.mlp"},
                "level": "edge",
                "keep": 2,
                "components": ["L1.mlp/f1"],
            },
            r"got keep beside components, which name them; leave that out",
        ),
        (
            {"features": {"L1.mlp": "L1.mlp"}, "level": "edge", "rules": PARTWAY},
            r"got rules that are partway; leave that out",
        ),
        (
            {"features": {"L1.mlp": "L1.mlp"}, "level": "edge", "components": ["L1.attn/f2"]},
            r"components of a dictionary need it in `features`; got 'L1\.attn/f2' and",
        ),
        (
            {"features": {"L1.mlp": "L1.mlp"}, "level": "edge", "components": ["L1.mlp/f99"]},
            r"features of 'L1\.mlp' must be below 20, .*; got 'L1\.mlp/f99'; count from 0",
        ),
        ({"path": "site", "steps": 2, "level": "edge"}, "`path='site'` is for node scores"),
        ({"path": "site"}, "`path='site'` needs `steps` above 1; got 1"),
    ],
)
def test_what_does_not_fit_is_refused(tiny: Any, options: dict[str, Any], message: str) -> None:
    task, known = random_task(tiny, pairs=2, length=4), some(tiny)
    known["narrow"] = dictionary(3)
    if isinstance(options.get("features"), dict):
        given = {site: known.get(d, d) for site, d in options["features"].items()}
        options = {**options, "features": given}
    with pytest.raises((ValueError, TypeError), match=message):
        attribute(tiny, task, **options, **QUIET)


def test_features_are_given_by_site(tiny: Any) -> None:
    jaxtyping.config.update("jaxtyping_disable", True)  # or the annotations refuse it first
    try:
        with pytest.raises(TypeError, match="`features` must be a mapping from sites to dictiona"):
            attribute(tiny, random_task(tiny, pairs=2), features=[1])  # type: ignore[arg-type]
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_a_dictionary_that_explains_little_is_said(tiny: Any) -> None:
    task, d = random_task(tiny, pairs=2, length=4), dictionary(tiny.cfg.d_model, seed=4)
    with pytest.warns(UserWarning, match=r"leaves \d+% of the variance of 'L1\.mlp' on these prom"):
        attribute(tiny, task, features={"L1.mlp": d})
    width, eye = tiny.cfg.d_model, torch.eye(tiny.cfg.d_model)
    both, none = torch.cat([eye, -eye]), torch.zeros(2 * width)
    exact = Dictionary(both.T, both, none, torch.zeros(width), Relu())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = attribute(tiny, task, features={"L1.mlp": exact}, components="feature")
    assert float(scores.nodes[:, -1].abs().max()) < 1e-6  # nothing is left over


def test_circuits_of_features_are_compared_pair_by_pair(tiny: Any) -> None:
    task, features = able_task(tiny, pairs=5, length=4), {"L1.mlp": some(tiny)["L1.mlp"]}
    scores = [attribute(tiny, task, rules=r, features=features, components="feature")
              for r in (RELP, GRADIENT)]  # fmt: skip
    ask = partial(evaluate_features, tiny, task, features=features, sizes=(2, 5), **QUIET)
    table = ask(scores, against="GRADIENT").set_index(["rules", "features", "errors"])
    assert bool(table.loc["GRADIENT"].difference.isna().all())
    for size, errors in ((2, "in"), (5, "out")):
        row, base = (table.loc[rules, size, errors] for rules in ("RELP", "GRADIENT"))
        difference = row.faithfulness - base.faithfulness
        assert row.difference == pytest.approx(difference, abs=1e-6)
        assert row.difference_low - 1e-6 <= difference <= row.difference_high + 1e-6
        assert (32 * row.p_value) % 1 == pytest.approx(0, abs=1e-9)  # all 2^5 ways to swap
        assert row.p_value >= 1 / 16
    renamed = [scores[0], scores[0].renamed("again")]
    same = ask(renamed, against="again", random=0).query("rules == 'RELP'")
    assert same.difference.tolist() == [0.0] * len(same) and set(same.p_value) == {1.0}
    with pytest.raises(ValueError, match="`against` must be one of RELP, GRADIENT, random; got 'x"):
        ask(scores, against="x")


def test_circuits_of_a_model_that_cannot_do_the_task_are_doubted(tiny: Any) -> None:
    task, features = able_task(tiny, pairs=3, length=4), {"L1.mlp": some(tiny)["L1.mlp"]}
    wrong = Task.from_tokens(task.clean, task.corrupt, task.foils, task.answers)
    scores = attribute(tiny, wrong, features=features, components="feature")
    with pytest.warns(UserWarning, match="it is right on 0 of 3 .* between clean and ablated runs"):
        evaluate_features(tiny, wrong, scores, features=features, sizes=(2,), **QUIET)


def test_circuits_and_steering_refuse_in_a_sentence(tiny: Any) -> None:
    task, features = random_task(tiny, pairs=2, length=4), {"L1.mlp": some(tiny)["L1.mlp"]}
    with pytest.raises(ValueError, match="`scores` must hold features; those of 'RELP' are of emb"):
        evaluate_features(tiny, task, attribute(tiny, task), features=features)
    with pytest.raises(ValueError, match="components of a dictionary need it in `features`"):
        patch(tiny, task, components=["L1.mlp/f2"], **QUIET)
    for values, message in (
        ({"L1.mlp": 1.0}, r"`values` must be finite numbers by names of features, .*'L1\.mlp'"),
        ({"L1.mlp/f2": float("nan")}, r"got 'L1\.mlp/f2': nan"),
        ({}, "`values` must name one feature or more; got none"),
        ({"L1.mlp/f20": 1.0}, r"features of 'L1\.mlp' must be below 20"),
    ):
        with pytest.raises(ValueError, match=message), steered(tiny, values, features=features):
            tiny(task.clean)
    with (
        pytest.raises(RuntimeError, match="an edited site must be passed when the model runs"),
        steered(tiny, {"L1.mlp/f2": 1.0}, features=features),
    ):
        pass


def test_features_of_a_site_need_no_neighbours(tiny: Any) -> None:
    sites = Sites.of(tiny)
    assert sites.part("L1.mlp/f3") == ("L1.mlp", 0, 1) and sites.part("final/rest")[0] == "final"
    assert Component.parse("L1.mlp/f3") == ("L1.mlp/f3", "feature", 1, 3)
    assert Component.parse("final/rest") == ("final/rest", "rest", -1, -1)
