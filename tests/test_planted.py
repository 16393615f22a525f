"""Planted circuits: what is said to be true is what patching finds, and what should break does.

`pytest -s tests/test_planted.py -k built_to_break` prints what each preset makes of each circuit.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from circuits import acdc, assemble, auroc, completeness, faithfulness, patch
from circuits.graph import real_edges
from relp import GRADIENT, PRESETS, EdgeScores, attribute
from tasks import Task, planted, zoo
from tasks.planted.__main__ import app
from tasks.planted.factory import Planted
from tasks.planted.stream import Head, Neuron, Stream

OTHER = {"denoise": "noise", "noise": "denoise"}
DIALS = [
    {"distractors": 8},
    pytest.param({}, marks=pytest.mark.long),
    pytest.param({"noise": 0.03, "distractors": 4, "seed": 1}, marks=pytest.mark.long),
]
"""Among heads that do other things, as constructed, and with weights that are not quite clean."""
BROKEN = {
    "cancellation": {"GRADIENT": 0.95, "RELP": 0.95},
    "saturation": {"GRADIENT": 0.9, "RELP": 0.9},
    "parity": {"GRADIENT": 0.75, "RELP": 0.75},
    "balance": {"GRADIENT": 0.8, "RELP": 0.8, "DEEPLIFT": 0.8, "GRADIENT ×5": 0.8},
    "backup": {"GRADIENT": 0.95, "RELP": 0.95},
    "induction": {"CP_LRP": 0.8},
    "ioi_chain": {"CP_LRP": 0.8},
}
"""The most that the area under the ROC curve may be, by what each circuit is built to break."""
by_name = pytest.mark.parametrize("name", planted.names())


@cache
def made(name: str, **dials: Any) -> Planted:
    return planted.plant(name, pairs=8, **dials)


@cache
def measured(name: str, direction: str = "", **dials: Any) -> EdgeScores:
    one = made(name, **dials)
    return effects(one, direction or one.direction)


def effects(one: Planted, direction: str) -> Any:
    return patch(one.model, one.task, level="edge", direction=direction, progress=False)


def mask(scores: EdgeScores, edges: frozenset[str]) -> Tensor:
    """Which edges are named; all of them must be edges of the model."""
    names = [[f"{w}->{r}" for r in scores.readers] for w in scores.writers]
    found = torch.tensor([[name in edges for name in row] for row in names])
    assert int((found & scores.layout.exists).sum()) == len(edges)
    return found


def graph(scores: EdgeScores, edges: frozenset[str]) -> nx.MultiDiGraph:
    return assemble(scores, mask(scores, edges))


def area(scores: EdgeScores, one: Planted) -> float:
    """How often a true edge outranks a false one, ties half; hidden edges are neither."""
    true = mask(scores, one.edges)
    false = scores.layout.exists & ~true & ~mask(scores, one.hidden)
    a, b = (scores.edges[m].abs().double() for m in (true, false))
    return float(((a[:, None] > b).double() + (a[:, None] == b) / 2).mean())


# -- the truth -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dials", DIALS, ids=str)
@by_name
def test_exact_patching_finds_the_true_edges_and_no_others(
    name: str, dials: dict[str, Any]
) -> None:
    one, found = made(name, **dials), measured(name, **dials)
    true = mask(found, one.edges)
    false = found.layout.exists & ~true
    size, gap = found.edges.abs(), float(found.gap.abs().mean())
    assert area(found, one) == 1
    assert size[true].min() > 0.2 * gap
    assert size[false].max() < (0.1 if "noise" in dials else 0.01) * gap


@pytest.mark.parametrize("dials", DIALS, ids=str)
@by_name
def test_the_true_edges_do_the_task_and_the_rest_does_nothing_of_it(
    name: str, dials: dict[str, Any]
) -> None:
    one, found = made(name, **dials), measured(name, **dials)
    tolerance = 0.1 if "noise" in dials else 0.05
    circuit, whole = graph(found, one.edges), graph(found, one.edges | one.hidden)
    shares = faithfulness(one.model, one.task, [circuit, whole], progress=False)
    assert shares == pytest.approx([1, 1], abs=tolerance)
    assert completeness(one.model, one.task, whole) == pytest.approx(0, abs=tolerance)


@pytest.mark.parametrize("distractors", [0, 8])
@by_name
def test_the_task_is_done_on_every_pair(name: str, distractors: int) -> None:
    one = made(name, distractors=distractors)
    with torch.no_grad():
        clean, corrupt = (one.task.metric(one.model(t)) for t in (one.task.clean, one.task.corrupt))
    assert clean.min() > 5 and corrupt.max() < -5
    assert max(clean.max(), -corrupt.min()) < 7  # far from where float32 or a softmax ends


@by_name
def test_models_are_tiny_and_norms_hand_features_on_as_they_are(name: str) -> None:
    one = made(name)
    assert one.original.num_parameters() < 50_000
    seen: list[tuple[Tensor, Tensor]] = []
    for module in one.original.modules():
        if "Norm" in type(module).__name__:
            module.register_forward_hook(lambda _, x, y: seen.append((x[0], y)))
    with torch.no_grad():
        logits = one.original(one.task.clean).logits
    for module in one.original.modules():
        module._forward_hooks.clear()
    assert len(seen) == 2 * one.model.cfg.n_layers + 1
    for stream, read in seen:
        torch.testing.assert_close(read[..., 3:], stream[..., 3:], atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(read[..., 0], torch.ones(read.shape[:2]), atol=2e-4, rtol=0)
        assert not read[..., 1:3].any()
    with torch.no_grad():
        torch.testing.assert_close(one.model(one.task.clean), logits, atol=2e-4, rtol=0)


def test_the_area_is_that_of_the_package() -> None:
    one, scores = made("saturation", distractors=8), gradients("saturation")
    (row,) = auroc(scores, graph(scores, one.edges)).itertuples()
    assert row.auroc == pytest.approx(area(scores, one))


# -- what each is built to break -------------------------------------------------------------------


def gradients(name: str) -> Any:
    one = made(name, distractors=8)
    return attribute(
        one.model, one.task, rules=GRADIENT, level="edge", direction=one.direction, progress=False
    )


@pytest.mark.parametrize("name", BROKEN)
def test_what_each_is_built_to_break_breaks(name: str) -> None:
    one = made(name, distractors=8)
    methods: dict[str, dict[str, Any]] = {n: {"rules": rules} for n, rules in PRESETS.items()}
    methods["GRADIENT ×5"] = {"rules": GRADIENT, "steps": 5}
    direction = one.direction
    found = {
        method: area(attribute(one.model, one.task, level="edge", direction=direction, **how), one)
        for method, how in methods.items()
    }
    print(f"\n{name:13s}", "  ".join(f"{method} {value:.2f}" for method, value in found.items()))
    for method, most in BROKEN[name].items():
        assert found[method] < most, method


@pytest.mark.parametrize("name", ["cancellation", "saturation", "parity"])
def test_gradients_miss_by_orders_of_magnitude_what_is_upstream(name: str) -> None:
    one, effect = made(name, distractors=8), measured(name, distractors=8)
    first = frozenset(edge for edge in one.edges if edge.startswith("embed->"))
    true = mask(effect, first)
    assert (gradients(name).edges[true].abs() < 1e-2 * effect.edges[true].abs()).all()


@pytest.mark.parametrize("name", ["and_gate", "or_gate"])
def test_gates_hide_their_inputs_from_the_other_direction(name: str) -> None:
    one = made(name, distractors=8)
    inputs = mask(measured(name, distractors=8), one.edges - {"L0.mlp->logits.in"})
    seen = measured(name, distractors=8)
    hidden = measured(name, OTHER[one.direction], distractors=8)
    gap = float(seen.gap.mean().abs())
    assert (seen.edges[inputs].abs() > 0.9 * gap).all()
    assert (hidden.edges[inputs].abs() < 0.01 * gap).all()
    assert area(hidden, one) < 0.9


@pytest.mark.parametrize(
    "name", [n for n in planted.names() if n not in ("and_gate", "or_gate", "backup")]
)
def test_the_others_show_in_both_directions(name: str) -> None:
    one = made(name)
    assert area(measured(name, OTHER[one.direction]), one) == 1


# -- edges that act only while others are cut ------------------------------------------------------


def share(one: Planted, *cut: str) -> float:
    """What the whole model does without some edges."""
    found = measured(one.name)
    every = {f"{u}->{d['reader']}" for u, _, _, d in real_edges(assemble(found))}
    return faithfulness(one.model, one.task, graph(found, frozenset(every - set(cut))))


def test_the_backup_does_its_part_once_the_main_head_is_cut() -> None:
    one = made("backup")
    assert one.hidden == {"embed->L1H0.v", "L1H0->logits.in"}
    assert share(one, "embed->L0H0.v") == pytest.approx(0.7, abs=0.01)
    for edge in one.hidden:  # nothing alone, all that is left together with the other cut
        assert share(one, edge) == pytest.approx(1, abs=0.01)
        assert share(one, "embed->L0H0.v", edge) == pytest.approx(0, abs=0.01)
    assert share(one, "L0H0->L1H0.q") == pytest.approx(1.7, abs=0.01)
    # so that the edges that one-edge patching sees do not make the rest silent
    alone = graph(measured("backup"), one.edges)
    assert completeness(one.model, one.task, alone) == pytest.approx(0.7, abs=0.01)


def test_the_alarm_rings_if_one_wire_is_cut() -> None:
    one = made("balance")
    (hidden,) = one.hidden
    assert share(one, hidden) == pytest.approx(1, abs=0.01)
    for wire in ("L0H0->L0.mlp.in", "L0H1->L0.mlp.in"):
        assert share(one, wire) == pytest.approx(-1, abs=0.01)
        assert share(one, wire, hidden) == pytest.approx(1, abs=0.01)
    assert share(one, "L0H0->L0.mlp.in", "L0H1->L0.mlp.in") == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("name", ["induction", "saturation"])
def test_acdc_recovers_the_circuit(name: str) -> None:
    """By cutting edge after edge, from an all but unrelated implementation of edges."""
    one = made(name, distractors=2)
    found = acdc(one.model, one.task, tau=0.5, progress=False)
    assert {f"{u}->{d['reader']}" for u, _, _, d in real_edges(found)} == one.edges


# -- making, saving, dials -------------------------------------------------------------------------


def test_a_circuit_is_a_function_of_the_package_too() -> None:
    one = planted.induction(pairs=4, seed=3)
    assert one.name == "induction" and len(one.task) == 4
    assert one.truth() == planted.plant("induction", pairs=4, seed=3).truth()
    assert set(planted.names()) <= set(dir(planted))
    with pytest.raises(AttributeError, match="has no attribute 'deduction'"):
        planted.deduction  # noqa: B018


def test_seeds_decide_everything_and_no_global_state_is_touched() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    dials: dict[str, Any] = {"pairs": 4, "noise": 0.1, "distractors": 4}
    states = [planted.plant("parity", seed=s, **dials).original.state_dict() for s in (0, 0, 1)]
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states[:2]), strict=True))
    assert not torch.equal(states[0]["lm_head.weight"], states[2]["lm_head.weight"])


@pytest.mark.parametrize("name", ["induction", "saturation"])
def test_noise_is_a_share_of_the_weights_themselves(name: str) -> None:
    plain, noisy = (made(name, noise=noise).original.state_dict() for noise in (0.0, 0.1))
    one = noisy["lm_head.weight"] - plain["lm_head.weight"]
    size = plain["lm_head.weight"].square().mean().sqrt()
    assert one.std() == pytest.approx(0.1 * float(size), rel=0.1)
    assert all(torch.equal(plain[k], noisy[k]) for k in plain if "norm" in k or "ln_" in k)


def test_distractors_are_active_and_differ_between_the_runs() -> None:
    one = made("saturation", distractors=8)
    assert one.model.cfg.n_heads == 6  # two of the circuit and eight more, in pairs on two layers
    effect = attribute(one.model, one.task, components=["head"])
    moved = dict(zip(effect.components, effect.nodes.abs().amax((0, 2)).tolist(), strict=True))
    assert sum(score > 0 for score in moved.values()) == 10


def test_saved_circuits_load_as_any_model(tmp_path: Path) -> None:
    one = made("saturation", distractors=2)
    folder = tmp_path / "saturation"
    one.save(folder)
    again = zoo.load(str(folder))
    with torch.no_grad():
        assert torch.equal(again(one.task.clean), one.model(one.task.clean))
    truth = json.loads((folder / "planted.json").read_text())
    assert truth == one.truth() and set(truth["edges"]) == one.edges
    answers = [[f" {word}" for word in truth[side]] for side in ("answers", "foils")]
    task = Task.from_prompts(again.tokenizer, truth["clean"], truth["corrupt"], *answers)
    for side in ("clean", "corrupt", "answers", "foils"):
        assert torch.equal(getattr(task, side), getattr(one.task, side))
    assert list(tmp_path.iterdir()) == [folder]
    with pytest.raises(FileExistsError, match="must be a new one"):
        one.save(folder)
    with pytest.raises(FileNotFoundError, match="must lie in one that exists; '.*none' is none; c"):
        one.save(tmp_path / "none" / "saturation")


def test_the_command_saves_or_says_why_not(tmp_path: Path) -> None:
    folder = str(tmp_path / "gate")
    run = CliRunner().invoke(app, ["or_gate", folder, "--noise", "0.1", "--distractors", "2"])
    assert run.exit_code == 0 and "or_gate: 5 true edges (denoise)" in run.output
    assert zoo.load(folder).cfg.n_layers == 2
    for wrong in (["or_gate", folder], ["nand", f"{folder}2"], ["or_gate", f"{folder}/no/where"]):
        assert CliRunner().invoke(app, wrong).exit_code == 2
    assert [p.name for p in tmp_path.iterdir()] == ["gate"]


@pytest.mark.parametrize(
    ("dials", "said"),
    [
        ({"pairs": 0}, r"`pairs` must be a whole number of at least 1; got 0; ask for 16"),
        ({"noise": -0.1}, r"`noise` must be a share .* 0 or more; got -0\.1; 0 leaves"),
        ({"noise": float("nan")}, r"`noise` must be a share .* got nan"),
        ({"distractors": -1}, r"`distractors` must be a whole number .* got -1; ask for 8"),
    ],
)
def test_dials_out_of_range_are_refused(dials: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        planted.plant("parity", **dials)


@pytest.mark.parametrize(("name", "kinds"), [("induction", 3), ("ioi_chain", 2), ("parity", 2)])
def test_there_are_pairs_enough_for_every_edge_to_show(name: str, kinds: int) -> None:
    with pytest.raises(ValueError, match=rf"at least {kinds} for '{name}', .* got {kinds - 1}; "):
        planted.plant(name, pairs=kinds - 1)
    one = planted.plant(name, pairs=kinds)
    assert area(effects(one, one.direction), one) == 1


def test_an_unknown_circuit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be one of induction, .*; got 'nand'; `planted\."):
        planted.plant("nand")


# -- the language ----------------------------------------------------------------------------------


def test_rows_are_coordinates_by_group_and_label() -> None:
    s = Stream(token=("a", "b"), place=3, seen=1)
    assert s.width == 3 + 2 + 3 + 1
    assert s["token"].nonzero().tolist() == [[0, 3], [1, 4]]
    assert s["place", (2, 0)].argmax(1).tolist() == [7, 5]
    assert torch.equal(s["token", "b"], s["token", ("b",)])
    assert s["one"].argmax() == 0 and s["seen"].shape == (1, s.width)
    with pytest.raises(KeyError):
        s["token", "c"]


def test_rows_of_a_head_or_neuron_must_fit() -> None:
    s = Stream(token=("a", "b"), seen=1)
    assert Head("L2H10", s["one"], s["one"], value=s["seen"], out=s["seen"]).at == (2, 10)
    with pytest.raises(TypeError):
        Head("L0H0", s["token"], s["one"], value=s["seen"], out=s["seen"])
    with pytest.raises(TypeError):
        Neuron(0, reads=s["token"], writes=s["seen"])
