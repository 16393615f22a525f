"""Labelled results: names, tables worked out by hand, and files that come back as they were."""

import copy
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, asdict, fields, is_dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from conftest import altered, made, precedes
from safetensors.torch import save_file
from torch import Tensor

from relp import Component, Effects, Scores
from relp.scores import ALL_POSITIONS

LABELS = {
    "model": "tiny",
    "task": "toy",
    "rules": "RELP",
    "direction": "denoise",
    "metric": "logit_difference",
    "clean": torch.tensor([2.0, 4.0]),
    "corrupt": torch.tensor([-1.0, 0.5]),
    "lengths": torch.tensor([2, 2]),
}
COMPONENTS = ("embed", "L0.resid", "L0H0", "L0H1", "L0.attn", "L0.mlp")


def node_scores(kind: type[Scores] = Scores, **options: Any) -> Scores:
    """Pair 0: component c at position p has 10 c + p; pair 1: twice that, negative."""
    first = 10.0 * torch.arange(6)[:, None] + torch.arange(2)
    nodes = torch.stack([first, -2 * first])
    return made(kind, **(LABELS | {"components": COMPONENTS, "nodes": nodes} | options))


def edge_scores(kind: type[Scores] = Scores, *, positions: bool = False, **options: Any) -> Scores:
    """Two writers, three readers; `L0.mlp -> L0H0.q` does not exist."""
    table = torch.tensor([[1.0, -2.0, 3.0], [0.0, 0.0, -4.0]])
    edges = torch.stack([table, 10 * table]) if positions else table
    names = {"writers": ("embed", "L0.mlp"), "readers": ("L0H0.q", "L0.mlp.in", "logits.in")}
    return made(kind, **(LABELS | names | {"edges": edges} | options))


def full_message(call: Callable[[], object], kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as error:
        call()
    assert type(error.value) is kind
    return str(error.value)


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("embed", ("embed", -1, -1)),
        ("logits", ("logits", -1, -1)),
        ("L9H6", ("head", 9, 6)),
        ("L12KV3", ("kv", 12, 3)),
        ("L3N17", ("neuron", 3, 17)),
        ("L0.attn", ("attn", 0, -1)),
        ("L10.mlp", ("mlp", 10, -1)),
        ("L1.mixer", ("mixer", 1, -1)),
        ("L2.resid", ("resid", 2, -1)),
    ],
)
def test_a_name_is_taken_apart(name: str, parts: tuple[str, int, int]) -> None:
    assert Component.parse(name) == (name, *parts)


@pytest.mark.parametrize("name", ["", "L9", "L9H", "H6", "L9H6.q", "L9.mlp.in", "l9h6", "L9H6 "])
def test_other_names_are_refused(name: str) -> None:
    assert full_message(lambda: Component.parse(name)) == (
        "a component must be named like embed, L9H6, L9KV1, L9N17, L9.mlp, L9.attn, L9.resid, "
        f"L9.mlp/f1021 or logits; got {name!r}; a reader's slot (.q .k .v .in) is not part of the "
        "name"
    )


def test_a_reader_is_a_component_and_a_slot() -> None:
    for reader, name, slot in (
        ("L9H6.q", "L9H6", "q"),
        ("L9KV1.k", "L9KV1", "k"),
        ("L9KV1.v", "L9KV1", "v"),
        ("L3.mlp.in", "L3.mlp", "in"),
        ("logits.in", "logits", "in"),
    ):
        assert Component.of_reader(reader) == (Component.parse(name), slot)
    for reader in ("L9H6", "L3.mlp", "logits"):
        assert full_message(lambda reader=reader: Component.of_reader(reader)) == (
            f"a reader must end in one of ('q', 'k', 'v', 'in'); got {reader!r}; "
            "write for instance L9H6.q, L3.mlp.in or logits.in"
        )


def test_what_precedes_what_follows_the_order_of_a_forward_pass() -> None:
    """Each block: attention reads, attention writes, MLP reads, MLP writes."""
    blocks = range(3)
    written = {"embed": 0.0, "logits": float("inf")}
    read = {"embed": 0.0, "logits": float("inf")}
    for i in blocks:
        start = 4 * i + 1
        read |= dict.fromkeys((f"L{i}H0", f"L{i}H1", f"L{i}KV0", f"L{i}.mixer"), start)
        written |= dict.fromkeys((f"L{i}H0", f"L{i}H1", f"L{i}.attn", f"L{i}.mixer"), start + 1)
        read[f"L{i}.mlp"], written[f"L{i}.mlp"] = start + 2, start + 3
    for writer, reader in product(written, read):
        got = precedes(Component.parse(writer), Component.parse(reader))
        assert got == (written[writer] < read[reader]), (writer, reader)


def test_neurons_read_and_write_as_their_layers_mlp_does() -> None:
    """Parallel blocks: the MLP reads what the block's heads read, not what they write."""
    for reader in ("L1N5", "L1.mlp"):
        parsed = Component.parse(reader)
        for writer in ("L1H0", "L1.attn", "L1.mixer"):
            assert precedes(Component.parse(writer), parsed)
            assert not precedes(Component.parse(writer), parsed, parallel=True)
        for writer, before in (("L0N3", True), ("L0.mlp", True), ("L1N3", False), ("L2H0", False)):
            for parallel in (False, True):
                assert precedes(Component.parse(writer), parsed, parallel=parallel) == before
        assert not precedes(parsed, Component.parse("L1H0"))
        assert precedes(parsed, Component.parse("L2H0"), parallel=True)


# -- what a result holds ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"components": COMPONENTS[:5]},
            "`nodes` must be [pair, component, pos] with 5 components; got [2, 6, 2]; name each of "
            "them once",
        ),
        (
            {"direction": "up"},
            "`direction` must be 'denoise' or 'noise'; got 'up'; 'denoise' patches clean values "
            "into the corrupt run",
        ),
    ],
    ids=["components", "direction"],
)
def test_node_scores_are_consistent(change: dict[str, Any], message: str) -> None:
    assert full_message(lambda: altered(node_scores(), **change)) == message


@pytest.mark.parametrize("positions", [False, True])
def test_edge_scores_are_consistent(positions: bool) -> None:
    shape = "[2, 2, 3]" if positions else "[2, 3]"
    assert full_message(lambda: edge_scores(positions=positions, writers=("embed",))) == (
        f"`edges` must end in [writer 1, reader 3]; got {shape}; give scores and layout of one "
        "model"
    )


def test_a_result_is_frozen_and_says_where_it_comes_from() -> None:
    scores = node_scores(spans={"end": torch.tensor([1, 1])})
    with pytest.raises(FrozenInstanceError):
        scores.provenance = None  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        scores.provenance.rules = "GRADIENT"  # type: ignore[misc]
    with pytest.raises(TypeError):
        scores.spans["S1"] = torch.tensor([0, 0])  # type: ignore[index]
    assert scores.title == "RELP · tiny · toy · denoise"
    labels = (
        "model='tiny', task='toy', rules='RELP', direction='denoise', metric='logit_difference')"
    )
    for result, what in (
        (scores, "NodeScores(nodes[2, 6, 2] [pair, component, pos]"),
        (node_scores(Effects), "NodeEffects(nodes[2, 6, 2] [pair, component, pos]"),
        (edge_scores(), "EdgeScores(edges[2, 3] [writer, reader]"),
        (edge_scores(positions=True), "EdgeScores(edges[2, 2, 3] [pos, writer, reader]"),
    ):
        assert repr(result) == f"{what}, {labels}"
    assert (scores.level, edge_scores().level) == ("node", "edge")


@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda scores: pickle.loads(pickle.dumps(scores))],
    ids=["deep copy", "another process"],
)
@pytest.mark.parametrize("kind", [Scores, Effects])
@pytest.mark.parametrize("make", [node_scores, edge_scores])
def test_copies_are_results_like_the_first(
    make: Callable[..., Scores], kind: type[Scores], again: Callable[[Scores], Scores]
) -> None:
    result = make(
        kind,
        tokens=("When", " Mary"),
        spans={"end": torch.tensor([1, 0]), "S1": torch.tensor([0, 1])},
        remainder={"blocks.0": 0.5},
    )
    again_made = again(result)
    assert same(again_made, result) and list(again_made.spans) == ["end", "S1"]
    assert again_made.clean.data_ptr() != result.clean.data_ptr()
    assert again_made.spans["end"].data_ptr() != result.spans["end"].data_ptr()
    assert again_made.to_dataframe().equals(result.to_dataframe())
    with pytest.raises(TypeError):
        again_made.spans["end"] = torch.tensor([0, 0])  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        again_made.provenance = None  # type: ignore[misc]


def test_the_gap_has_the_sign_of_a_patch() -> None:
    assert node_scores().gap.tolist() == [3.0, 3.5]
    assert node_scores(direction="noise").gap.tolist() == [-3.0, -3.5]


def test_means_are_over_the_pairs_that_have_the_position() -> None:
    """Position 1 is pair 0's only (10 c + 1), and position 2 is nobody's."""
    nodes = torch.nn.functional.pad(node_scores().nodes, (0, 1))
    nodes[1, :, 1] = 0.0
    scores = node_scores(nodes=nodes, lengths=torch.tensor([2, 1]))
    assert scores.mean.tolist() == [[-5.0 * c, 10.0 * c + 1, 0.0] for c in range(6)]
    assert full_message(lambda: edge_scores().mean, AttributeError) == (
        "'mean' is of node scores; these are of edges; they are averaged over pairs already; call "
        "attribute(model, task, level='node')"
    )


def test_places_are_called_by_token_span_or_number() -> None:
    """A token in quotes where all pairs have it, a span's name where only that is shared."""
    at = {"IO": torch.tensor([1, 1]), "S": torch.tensor([2, 3])}
    nodes = torch.zeros(2, 1, 5)
    scores = node_scores(
        components=("L0.mlp",), nodes=nodes, spans=at, tokens=(" a\"b", "IO", "", "S", "\n"),
        prompt=(" a\"b", " Mary", " had", " a", "\n"),
    )  # fmt: skip
    named = ('" a\\"b"@0', "IO@1", "@2", '"S"@3', '"\\n"@4')
    assert scores.place_labels == named
    assert altered(scores, tokens=()).place_labels == ("@0", "@1", "@2", "@3", "@4")
    assert scores.by_span().place_labels == ("IO", "S", "other")
    assert scores.together().place_labels == ("all positions",)
    assert edge_scores().place_labels == ()


def test_sums_over_spans_follow_each_pair() -> None:
    """Pair 0 has `a` and `b` at 0 and 2; pair 1 both at 1, where the first name counts."""
    nodes = torch.tensor([[[1.0, 2.0, 4.0, 8.0]], [[16.0, 32.0, 0.0, 0.0]]])
    scores = made(
        **(LABELS | {"lengths": torch.tensor([4, 2])}),
        components=("embed",), nodes=nodes,
        spans={"a": torch.tensor([0, 1]), "b": torch.tensor([2, 1])},
    )  # fmt: skip
    summed = scores.by_span()
    assert summed.places == summed.tokens == ("a", "b", "other")
    assert summed.nodes.tolist() == [[[1.0, 4.0, 10.0]], [[32.0, 0.0, 16.0]]]
    assert summed.mean.tolist() == [[16.5, 2.0, 13.0]]  # a prompt has every place, however short
    frame = summed.to_dataframe()
    assert list(frame) == ["component", "kind", "layer", "head", "span", "score"]
    assert frame["span"].tolist() == ["a", "b", "other"] and frame["score"].tolist() == [
        16.5,
        2,
        13,
    ]
    assert summed.by_span() is summed
    whole = altered(scores, nodes=nodes[:, :, :1], tokens=ALL_POSITIONS)
    assert whole.by_span() is whole
    assert full_message(lambda: edge_scores().by_span(), AttributeError).startswith(
        "'by_span' is of node scores; these are of edges; they are averaged over pairs already;"
    )


def test_what_is_not_explained_is_shown() -> None:
    scores = node_scores(remainder={"blocks.0.mlp": 0.5, "blocks.1.<mlp>": -0.75})
    assert repr(scores).endswith("metric='logit_difference', remainder=-0.2500)")
    assert "remainder" not in repr(node_scores())
    shown = "<br>not explained (the runs branch differently): "
    assert f"{shown}blocks.0.mlp +0.5000, blocks.1.&lt;mlp&gt; -0.7500" in scores._repr_html_()
    assert shown not in node_scores()._repr_html_()


def test_components_of_one_kind() -> None:
    scores = node_scores()
    assert scores.kinds() == ("embed", "resid", "head", "attn", "mlp")
    names, values = scores.of_kind("head")
    assert names == ("L0H0", "L0H1")
    assert values.tolist() == [[[20, 21], [30, 31]], [[-40, -42], [-60, -62]]]
    assert full_message(lambda: scores.of_kind("mixer")) == (
        "`kind` must be one of ('embed', 'resid', 'head', 'attn', 'mlp'); got 'mixer'; "
        "see Scores.kinds()"
    )
    assert full_message(lambda: edge_scores().of_kind("head"), AttributeError).startswith(
        "'of_kind' is of node scores; these are of edges; "
    )
    assert scores.edges is None and edge_scores().nodes is None
    for name in ("writers", "layout"):
        assert full_message(lambda name=name: getattr(scores, name), AttributeError) == (
            f"{name!r} is of edge scores; these are of nodes; call attribute(model, task, "
            "level='edge')"
        )
    assert not hasattr(scores, "nothing") and "no attribute" in full_message(
        lambda: scores.nothing, AttributeError
    )


# -- tables ----------------------------------------------------------------------------------------


def test_table_of_nodes() -> None:
    """The mean over the two pairs is (x - 2x) / 2."""
    frame = node_scores(tokens=("When", " Mary")).to_dataframe()
    assert list(frame) == ["component", "kind", "layer", "head", "pos", "token", "score"]
    assert len(frame) == 12
    assert frame.iloc[0].tolist() == ["embed", "embed", -1, -1, 0, "When", 0.0]
    assert frame.iloc[7].tolist() == ["L0H1", "head", 0, 1, 1, " Mary", -15.5]
    assert frame["score"].tolist() == [-(10 * c + p) / 2 for c in range(6) for p in range(2)]


def test_tokens_label_positions_only_where_all_pairs_have_them() -> None:
    uneven = node_scores(tokens=("When", " Mary"), lengths=torch.tensor([2, 1]))
    assert "token" not in uneven.to_dataframe()
    assert "token" not in node_scores().to_dataframe()


def test_table_of_edges_has_those_that_exist() -> None:
    rows = [
        ("embed", "L0H0.q", "q", 1.0),
        ("embed", "L0.mlp.in", "in", -2.0),
        ("embed", "logits.in", "in", 3.0),
        ("L0.mlp", "logits.in", "in", -4.0),
    ]
    frame = edge_scores().to_dataframe()
    assert list(frame) == ["writer", "reader", "slot", "score"]
    assert list(frame.itertuples(index=False, name=None)) == rows

    apart = {"writers": ("embed", "L0H0"), "readers": ("L0H0.q", "L0.mlp.in", "logits.in")}
    for parallel in (False, True):
        pairs = edge_scores(parallel=parallel, **apart).to_dataframe()[["writer", "reader"]]
        assert (("L0H0", "L0.mlp.in") in pairs.itertuples(index=False, name=None)) != parallel

    frame = edge_scores(Effects, positions=True).to_dataframe()
    assert list(frame) == ["writer", "reader", "slot", "pos", "effect"]
    wanted = [(u, r, slot, p, x * (1, 10)[p]) for u, r, slot, x in rows for p in range(2)]
    assert list(frame.itertuples(index=False, name=None)) == wanted


def test_top_is_by_absolute_value_and_keeps_the_sign() -> None:
    top = edge_scores().top(2)
    assert top.index.tolist() == [0, 1]
    assert list(zip(top["writer"], top["reader"], top["score"], strict=True)) == [
        ("L0.mlp", "logits.in", -4.0),
        ("embed", "logits.in", 3.0),
    ]
    assert len(edge_scores().top(100)) == 4
    ties = replace(edge_scores(), edges=torch.ones(2, 3))  # as the table has them
    assert ties.top(3).equals(ties.to_dataframe()[:3])
    assert node_scores(Effects).top(1).iloc[0]["effect"] == -25.5
    assert full_message(lambda: edge_scores().top(0)) == (
        "`k` must be at least 1; got 0; ask for one row or more"
    )


@pytest.mark.parametrize("level", ["node", "edge"])
def test_top_are_rows_of_the_table_largest_first_and_what_was_not_measured_last(level) -> None:
    tokens, generator = ("When", " Mary"), torch.Generator().manual_seed(0)
    effects = (
        node_scores(Effects, tokens=tokens)
        if level == "node"
        else edge_scores(Effects, positions=True, places=tokens)
    )
    shape = (effects.nodes if level == "node" else effects.edges).shape
    values = torch.randint(-2, 3, shape, generator=generator).float()
    values[..., 0] = float("nan")
    effects = replace(effects, **{f"{level}s": values})
    table = effects.to_dataframe()
    rows = list(table.itertuples(index=False, name=None))
    measured = [row for row in rows if row[-1] == row[-1]]
    order = sorted(measured, key=lambda row: -abs(row[-1]))
    assert 0 < len(measured) < len(rows) and order != measured
    for k in (1, 3, len(rows)):
        top = effects.top(k)
        assert top.columns.equals(table.columns) and top.dtypes.equals(table.dtypes)
        found = list(top.itertuples(index=False, name=None))
        assert len(found) == k and found[: len(order)] == order[:k]
    left = [row[:-1] for row in rows if row[-1] != row[-1]]
    assert [row[:-1] for row in found[len(order) :]] == left  # in the order of the table


def test_html_shows_labels_as_text() -> None:
    scores = node_scores(
        model="<b>x</b>", task="a & b", metric="<i>m</i>", tokens=("<s>", "<script>")
    )
    page = scores._repr_html_()
    assert "&lt;b&gt;x&lt;/b&gt; · a &amp; b" in page and "&lt;i&gt;m&lt;/i&gt;: clean" in page
    assert "<b>x</b>" not in page and "<i>" not in page
    assert "<td>&lt;script&gt;</td>" in page and "<script>" not in page and "<td><s>" not in page
    assert page.startswith("<b>NodeScores</b> · RELP · ")
    assert "clean 3.000, corrupt -0.250, 2 pairs" in page and "-25.5000" in page


# -- files -----------------------------------------------------------------------------------------


def same(one: Scores, other: Scores) -> bool:
    """Equal type and equal fields, tensors with their dtypes."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype, value.tolist()
        if hasattr(value, "items"):
            return {k: plain(v) for k, v in value.items()}
        if is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        return type(value), value

    return type(one) is type(other) and plain(one) == plain(other)


@pytest.mark.parametrize("kind", [Scores, Effects])
@pytest.mark.parametrize("make", [node_scores, edge_scores])
def test_a_file_gives_back_what_was_saved(
    make: Callable[..., Scores], kind: type[Scores], tmp_path: Path
) -> None:
    end = torch.tensor([1, 0])
    result = make(
        kind,
        model='a/b "c" 漢字',
        task="</x>",
        tokens=("Ġ", "\n"),
        prompt=("<|x|>", "\n"),
        spans={"end": end, "last": end, "S1 (first)": torch.tensor([[0, 1], [1, 0]])[:, 0]},
        clean=torch.tensor([[2.0, 0.0], [4.0, 0.0]], requires_grad=True)[:, 0],
        remainder={"blocks.0.mlp": 0.5, "blocks.1.mlp": -0.25},
        versions="relp 9.9",
        dtype="bfloat16",
        weights="0123",
        compatibility=True,
        **({"parallel": True} if make is edge_scores else {}),
    )
    path = tmp_path / "scores.safetensors"
    assert result.save(path) == path and Scores.load(str(path)).level == result.level
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    for reader in (Scores, Effects):
        again = reader.load(path)
        assert same(again, result) and type(again.tokens) is tuple
        assert again.to_dataframe().equals(result.to_dataframe())
    assert not same(Scores.load(path), result.renamed("GRADIENT"))


def test_positions_and_half_precision_survive(tmp_path: Path) -> None:
    scores = edge_scores(positions=True)
    scores = replace(scores, edges=scores.edges.to(torch.bfloat16))
    assert same(Scores.load(scores.save(tmp_path / "e.safetensors")), scores)


def test_a_file_replaces_the_one_before(tmp_path: Path) -> None:
    path = node_scores().save(tmp_path / "s.safetensors")
    edge_scores(Effects).save(path)
    assert same(Scores.load(path), edge_scores(Effects))


@pytest.mark.parametrize(
    "wrong",
    [
        {"task": "a\ud800b"},
        {"tokens": ("x", "a\ud800b")},
        {"spans": {"a\ud800b": torch.tensor([0, 1])}},
        {"remainder": {"a\ud800b": 0.0}},
    ],
    ids=["label", "token", "span", "key"],
)
def test_half_a_surrogate_pair_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    assert full_message(lambda: node_scores(**wrong).save(tmp_path / "s.safetensors")) == (
        "text must be whole characters, as files are UTF-8; the result has half a surrogate pair "
        "in 'a\\ud800b'; replace it with text.encode('utf-8', 'replace').decode()"
    )
    for edge in ("\udbff", "\udc00", "\udfff"):
        assert "half a surrogate" in full_message(
            lambda text=edge: node_scores(task=text).save(tmp_path / "s.safetensors")
        )
    assert list(tmp_path.iterdir()) == []
    whole = node_scores(task="\U0001f600", tokens=("漢", "\u200f"))
    assert same(Scores.load(whole.save(tmp_path / "s.safetensors")), whole)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_permissions_follow_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        path = node_scores().save(tmp_path / "s.safetensors")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


def test_what_cannot_be_saved_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert full_message(lambda: node_scores().save(tmp_path / "scores.json")) == (
        "scores must be saved as .safetensors; got 'scores.json'; change the suffix "
        "(a circuit graph is saved with circuits.save)"
    )
    folder = tmp_path / "missing"
    message = full_message(lambda: node_scores().save(folder / "s.safetensors"), FileNotFoundError)
    assert message == (
        f"`path` must lie in an existing folder; {str(folder)!r} is none; create it first"
    )
    assert list(tmp_path.iterdir()) == []

    path = node_scores().save(tmp_path / "s.safetensors")

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        edge_scores().save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
    assert same(Scores.load(path), node_scores())


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # as users run it: the tests' type checker would refuse wrong labels with its own error
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    whole = node_scores().save(tmp_path / "s.safetensors").read_bytes()
    arrays = {"clean": torch.ones(2), "corrupt": torch.ones(2), "lengths": torch.ones(2)}
    path = tmp_path / "other.safetensors"

    def refused(reason: str) -> None:
        message = full_message(lambda: Scores.load(path))
        assert message.startswith(
            f"{str(path)!r} must be a file written by Scores.save; it is not ({reason}"
        )
        assert message.endswith("); for a circuit graph use circuits.load")

    save_file(arrays, path)
    refused("'relp')")
    source = asdict(node_scores().provenance) | {"direction": "up"}
    for header, reason in (
        ("no json", "Expecting value"),
        ("3", ""),
        ("{}", "'type')"),
        ('{"type": "Pickle"}', "'Pickle')"),
        ('{"type": "NodeScores", "rules": "RELP"}', "'provenance')"),
        (
            json.dumps({"type": "NodeScores", "provenance": source}),
            "`direction` must be",
        ),
    ):
        save_file(arrays, path, metadata={"relp": header})
        refused(reason)
    for length in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused("")
    path.write_text("{}")
    refused("")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        Scores.load(tmp_path / "none.safetensors")
