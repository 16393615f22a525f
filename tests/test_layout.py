"""Layouts: places, order and edges, against lists written out by hand."""

import copy
import pickle

import pytest
import torch
from architectures import ARCHITECTURES
from conftest import precedes
from test_graph import make_scores
from test_scores import full_message

from relp.bridge.sites import Sites
from relp.layout import Component, Layout

HEADS = ("L0H0", "L0H1", "L0H2", "L0H3")
GROUPED = Layout(
    ("embed", *HEADS, "L0.mlp"),
    (*(f"{h}.q" for h in HEADS), "L0KV0.k", "L0KV1.k", "L0KV0.v", "L0KV1.v", "L0.mlp.in",
     "logits.in"),
)  # fmt: skip


def test_rows_and_columns_are_places_in_the_table() -> None:
    assert [GROUPED.row[w] for w in GROUPED.writers] == list(range(6))
    assert [GROUPED.column[r] for r in GROUPED.readers] == list(range(10))
    assert GROUPED.sources[1] == Component("L0H0", "head", 0, 0)
    assert GROUPED.targets[4] == (Component("L0KV0", "kv", 0, 0), "k")


@pytest.mark.parametrize("parallel", [False, True])
def test_which_edges_exist(parallel: bool) -> None:
    found = Layout(GROUPED.writers, GROUPED.readers, parallel).exists.int().tolist()
    heads = [[0] * 8 + [int(not parallel), 1]] * 4
    assert found == [[1] * 10, *heads, [0] * 9 + [1]]


@pytest.mark.parametrize("name", ["GPT2", "Llama", "GPTJ", "Mamba"])
def test_edges_of_models_are_those_whose_writer_precedes_the_reader(name, tmp_path) -> None:
    layout = Sites.of(ARCHITECTURES[name].build(tmp_path)).layout
    for writer, row in zip(layout.sources, layout.exists.tolist(), strict=True):
        for (owner, _), there in zip(layout.targets, row, strict=True):
            assert there == precedes(writer, owner, parallel=layout.parallel)


def test_components_are_in_the_order_of_a_forward_pass_whatever_the_tables() -> None:
    layout = Layout(
        ("L1.mlp", "L0N7", "L0.mlp", "L0H1", "embed", "L0N3", "L0H0", "L1.mixer"),
        ("logits.in", "L1.mlp.in", "L0KV0.k", "L0H0.q"),
    )
    assert [c.name for c in layout.components] == [
        "embed", "L0KV0", "L0H0", "L0H1", "L0N3", "L0N7", "L0.mlp", "L1.mixer", "L1.mlp", "logits",
    ]  # fmt: skip


def test_query_heads_are_split_evenly_over_key_value_heads() -> None:
    assert GROUPED.serves == {"L0KV0": HEADS[:2], "L0KV1": HEADS[2:]}
    assert make_scores(heads=4).layout.serves == {}
    uneven = Layout(("L3H0", "L3H1", "L3H2"), ("L3KV0.k", "L3KV1.k"))
    assert full_message(lambda: uneven.serves) == (
        "query heads must divide evenly over key/value heads: layer 3 has 3 and 2; give scores "
        "that hold all heads of a layer"
    )


def test_a_name_stands_once() -> None:
    for what, given in (
        ("writer", lambda: Layout(("embed", "L0H0", "embed"), ())),
        ("reader", lambda: Layout((), ("embed", "L0H0", "embed"))),
    ):
        assert full_message(given) == (
            f"every {what} must be named once; got 'embed' 2 times; leave the others out"
        )


def test_scores_and_sites_of_one_model_share_a_layout(tiny) -> None:
    sites, scores = Sites.of(tiny), make_scores()
    assert sites.layout == Layout(sites.writers, sites.readers, sites.parallel)
    assert Sites.of(tiny).layout is sites.layout
    assert make_scores(seed=1).layout is scores.layout
    assert make_scores(parallel=True).layout.parallel
    before = dict(vars(scores))
    assert bool(scores.layout.exists.any()) and vars(scores) == before  # copies carry no mask
    for same in (copy.deepcopy(scores), pickle.loads(pickle.dumps(scores))):
        assert same.layout is scores.layout


def test_a_layout_first_asked_for_in_inference_mode_serves_outside() -> None:
    layout = Layout(*(tuple(names) for names in (GROUPED.writers, GROUPED.readers)))
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)  # in which 905 is 904
        with torch.inference_mode():
            assert not layout.exists.is_inference()
        deep = Layout(("L300.mlp", "L301H0"), ("L301H0.q", "L301.mlp.in"))
        assert deep.exists.int().tolist() == [[1, 1], [0, 1]]
    finally:
        torch.set_default_dtype(default)
    weights = torch.ones(6, 10, requires_grad=True)
    torch.where(layout.exists, weights, 0.0).sum().backward()
    assert torch.equal(weights.grad, layout.exists.float())
