"""EAP-IG's and MIB's files: a file written by hand, counts, and everything back as it was."""

import inspect
import json
from pathlib import Path

import pytest
from architectures import ARCHITECTURES
from conftest import boot, save_tokenizer
from test_files import same
from test_graph import make_scores, names
from transformers import GPT2Config, GPT2LMHeadModel

from circuits import assemble, between, from_mib, load, save, to_mib, top
from circuits.graph import real_edges, size

TINY = {"gpt2": {"layers": 3, "heads": 4}, "llama": {"layers": 3, "heads": 4, "kv_heads": 2}}

# as EAP-IG's Graph.to_json writes a model of one layer with two heads
BY_HAND = {
    "cfg": {"n_layers": 1, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8},
    "nodes": {
        "input": {"in_graph": True},
        "a0.h0": {"in_graph": False},
        "a0.h1": {"in_graph": True},
        "m0": {"in_graph": False},
        "logits": {"in_graph": True},
    },
    "edges": {
        "input->a0.h0<q>": {"score": 0.5, "in_graph": False},
        "input->a0.h0<k>": {"score": 0.0, "in_graph": False},
        "input->a0.h0<v>": {"score": 0.25, "in_graph": False},
        "input->a0.h1<q>": {"score": 0.0, "in_graph": False},
        "input->a0.h1<k>": {"score": 0.0, "in_graph": False},
        "input->a0.h1<v>": {"score": 1.5, "in_graph": True},
        "input->m0": {"score": -0.125, "in_graph": False},
        "a0.h0->m0": {"score": 0.0, "in_graph": False},
        "a0.h1->m0": {"score": 0.0, "in_graph": False},
        "input->logits": {"score": 0.0, "in_graph": False},
        "a0.h0->logits": {"score": 0.0, "in_graph": False},
        "a0.h1->logits": {"score": 2.0, "in_graph": True},
        "m0->logits": {"score": -3.0, "in_graph": False},
    },
}


@pytest.fixture
def style(request: pytest.FixtureRequest) -> str:
    return request.node.callspec.params["tiny"]


def shaped(style: str, **options):
    """A graph of the shape of a tiny model."""
    return assemble(make_scores(**TINY[style], **options))


def write(path: Path, data: object) -> Path:
    path.write_text(json.dumps(data))
    return path


def test_a_file_of_eap_ig_is_read(tmp_path):
    path = write(tmp_path / "graph.json", BY_HAND)
    graph = from_mib(path)
    assert size(graph) == graph.graph["total_edges"] == len(BY_HAND["edges"])
    assert list(graph) == ["embed", "L0H0", "L0H1", "L0.mlp", "logits"]
    assert graph.edges["embed", "L0H0", "q"]["score"] == 0.5
    assert graph.edges["L0.mlp", "logits", "in"]["score"] == -3.0
    assert graph.nodes["embed"]["score"] == 0.5 + 0.25 + 1.5 - 0.125
    assert graph.graph["direction"] == "denoise" and graph.graph["rules"] == "unknown"
    assert names(top(graph, edges=2)) == names(from_mib(path, in_graph=True))
    assert names(from_mib(path, in_graph=True)) == {
        ("embed", "L0H1", "v"), ("L0H1", "logits", "in")
    }  # fmt: skip


def test_edges_that_a_file_leaves_out_count_as_zero_and_unmarked(tmp_path):
    few = {name: BY_HAND["edges"][name] for name in ("input->a0.h1<v>", "a0.h1->logits")}
    path = write(tmp_path / "graph.json", {**BY_HAND, "edges": few})
    assert size(from_mib(path)) == len(BY_HAND["edges"])
    assert sorted(d["score"] for *_, d in real_edges(from_mib(path)))[-3:] == [0.0, 1.5, 2.0]
    assert names(from_mib(path, in_graph=True)) == {
        ("embed", "L0H1", "v"), ("L0H1", "logits", "in")
    }  # fmt: skip


def test_parallel_blocks_have_no_edge_from_their_heads_to_their_mlp(tmp_path):
    parallel = {**BY_HAND, "cfg": {**BY_HAND["cfg"], "parallel_attn_mlp": True}}
    with pytest.raises(ValueError, match="has no edge 'a0.h0->m0'"):
        from_mib(write(tmp_path / "graph.json", parallel))
    parallel["edges"] = {k: v for k, v in BY_HAND["edges"].items() if k[-4:] != "->m0"}
    graph = from_mib(write(tmp_path / "graph.json", parallel))
    assert size(graph) == graph.graph["total_edges"] == len(BY_HAND["edges"]) - 2
    assert not graph.has_edge("L0H1", "L0.mlp")
    assert graph.edges["L0H1", "logits", "in"]["score"] == 2.0


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_round_trip(tiny, style, direction, tmp_path):
    graph = shaped(style, direction=direction)
    circuit = top(graph, edges=40)
    path = to_mib(graph, tmp_path / "importances.json", tiny, circuit=circuit)
    assert same(from_mib(path, tiny), graph)
    assert same(from_mib(path, tiny, in_graph=True), circuit)
    assert [p.name for p in tmp_path.iterdir()] == ["importances.json"]


def test_positive_scores_help_in_either_direction(tiny, style, tmp_path):
    graph = shaped(style, direction="noise")
    data = json.loads(to_mib(graph, tmp_path / "c.json", tiny).read_text())
    assert data["edges"]["m1->logits"]["score"] == -graph.edges["L1.mlp", "logits", "in"]["score"]


def test_the_file_has_eap_igs_keys(tiny, style, tmp_path):
    graph = shaped(style)
    circuit = between(graph, ["L0H1", "L2.mlp"])
    data = json.loads(to_mib(graph, tmp_path / "c.json", tiny, circuit=circuit).read_text())
    assert data["cfg"] == {
        "n_layers": 3, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 32
    }  # fmt: skip
    inside = {name for name, node in data["nodes"].items() if node["in_graph"]}
    assert len(data["nodes"]) == 17 and inside == {"input", "a0.h1", "m2", "logits"}
    assert all(set(edge) == {"score", "in_graph"} for edge in data["edges"].values())
    # layer l has 12 readers of 1 + 5l writers and an MLP that reads 5 + 5l; logits read 16
    assert len(data["edges"]) == 12 * (1 + 6 + 11) + (5 + 10 + 15) + 16


@pytest.mark.parametrize("tiny", ["llama"], indirect=True)
def test_a_group_shares_the_score_of_its_key_value_head(tiny, tmp_path):
    graph = shaped("llama")
    path = to_mib(graph, tmp_path / "c.json", tiny, circuit=between(graph, ["L0H1", "L1H2"]))
    data = json.loads(path.read_text())["edges"]
    whole = graph.edges["L0H1", "L1KV1", "v"]["score"]
    assert data["a0.h1->a1.h2<v>"] == {"score": whole / 2, "in_graph": True}
    assert data["a0.h1->a1.h3<v>"] == {"score": whole / 2, "in_graph": False}
    ungrouped = from_mib(path)
    assert "L1KV1" not in ungrouped and ungrouped.nodes["L0H1"]["score"] == pytest.approx(
        graph.nodes["L0H1"]["score"]
    )
    with pytest.raises(ValueError, match="'L0H0.k' is not"):
        to_mib(ungrouped, tmp_path / "d.json", tiny)
    # one edge of a group is enough, and its scores add up
    half = json.loads(path.read_text())
    for head, marked in ((2, False), (3, True)):
        half["edges"][f"a0.h1->a1.h{head}<v>"] = {"score": float(head), "in_graph": marked}
    kept = from_mib(write(tmp_path / "half.json", half), tiny, in_graph=True)
    assert kept.edges["L0H1", "L1KV1", "v"]["score"] == 5.0


def test_the_suffix_means_this_format_for_save_and_load(tiny, style, tmp_path):
    graph = shaped(style)
    circuit = top(graph, edges=40)
    path = save(circuit, tmp_path / "c.mib.json", model=tiny)
    assert path == tmp_path / "c.mib.json"
    assert path.read_bytes() == to_mib(circuit, tmp_path / "d.json", tiny).read_bytes()
    assert same(load(path, model=tiny), from_mib(path, tiny))
    assert same(load(path), from_mib(path))
    assert size(load(path, model=tiny)) == size(graph) > size(circuit)
    assert names(from_mib(path, tiny, in_graph=True)) == names(circuit)


def test_the_suffix_is_said_to_need_a_model(tmp_path):
    with pytest.raises(ValueError) as error:
        save(shaped("gpt2"), tmp_path / "c.mib.json")
    assert str(error.value) == (
        "`model` must be the TransformerBridge that the circuit is about, as .mib.json holds its "
        "shape; got None; call circuits.save(circuit, path, model=model)"
    )
    with pytest.raises(TypeError, match=r"must be a networkx.MultiDiGraph; got EdgeScores"):
        inspect.unwrap(save)(make_scores(), tmp_path / "c.mib.json")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load(tmp_path / "c.mib.json")
    save(shaped("gpt2"), tmp_path / "c.json").rename(tmp_path / "c.mib.json")
    with pytest.raises(ValueError, match=r"use circuits.load, renamed if they end in \.mib\.json"):
        load(tmp_path / "c.mib.json")
    with pytest.raises(ValueError, match="for graphs of EAP-IG and MIB from_mib"):
        load(write(tmp_path / "graph.json", BY_HAND))


def test_a_failure_leaves_the_old_file_and_nothing_else(gpt2_folder, tmp_path, monkeypatch):
    model = boot(gpt2_folder)
    path = to_mib(shaped("gpt2"), tmp_path / "c.json", model)
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        to_mib(shaped("gpt2", seed=1), path, model)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_gpt2_small_has_32491_edges(tmp_path):
    config = {"n_layer": 12, "n_head": 12, "n_embd": 24, "n_positions": 16}
    size_of = save_tokenizer(tmp_path)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=size_of, bos_token_id=0, **config))
    model.save_pretrained(tmp_path)
    circuit = assemble(make_scores(layers=1, heads=12))
    data = json.loads(to_mib(circuit, tmp_path / "c.json", boot(tmp_path)).read_text())
    assert len(data["nodes"]) == 158 and len(data["edges"]) == 32_491
    assert sum(edge["in_graph"] for edge in data["edges"].values()) == size(circuit)
    scores = {round(d["score"], 9) for *_, d in real_edges(circuit)}
    assert {round(e["score"], 9) for e in data["edges"].values()} == scores | {0.0}


def test_what_the_format_cannot_hold_is_refused(tmp_path, gpt2_folder):
    model = boot(gpt2_folder)
    with pytest.raises(ValueError, match="must be .json; got 'c.pt'"):
        to_mib(shaped("gpt2"), tmp_path / "c.pt", model)
    with pytest.raises(ValueError, match="summed over positions"):
        to_mib(shaped("gpt2", positions=2), tmp_path / "c.json", model)
    with pytest.raises(ValueError, match="'embed' -> 'L3H0.q' is not"):
        to_mib(between(assemble(make_scores(layers=4)), ["L3H0", "L3.mlp"]), tmp_path / "c.json",
               model)  # fmt: skip
    graph = shaped("gpt2")
    graph.edges["embed", "logits", "in"]["score"] = float("inf")
    with pytest.raises(ValueError, match="scores must be finite"):
        to_mib(graph, tmp_path / "c.json", model)
    with pytest.raises(
        ValueError, match="whole characters, .*; the graph has half a surrogate pair"
    ):
        to_mib(shaped("gpt2", task="a\ud800b"), tmp_path / "c.json", model)
    with pytest.raises(FileNotFoundError, match="must lie in an existing folder"):
        to_mib(shaped("gpt2"), tmp_path / "ioi_gpt2" / "c.json", model)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="'n_layers': 1"):
        from_mib(write(tmp_path / "c.json", BY_HAND), model)


def test_a_model_without_heads_is_refused(tmp_path):
    mamba = ARCHITECTURES["Mamba"].build(tmp_path)
    with pytest.raises(ValueError, match=r"blocks of heads and an MLP only; .* has others"):
        from_mib(write(tmp_path / "graph.json", BY_HAND), mamba)


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        {"cfg": BY_HAND["cfg"]},
        {**BY_HAND, "cfg": {"n_layers": 1}},
        {**BY_HAND, "edges": {"input->m7": {"score": 1.0, "in_graph": True}}},
        {**BY_HAND, "edges": {"input->m0": {"score": float("nan"), "in_graph": True}}},
        {**BY_HAND, "edges": {"input->m0": 1.0}},
        {**BY_HAND, "relp": {"model": 3}},
    ],
)
def test_foreign_files_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match="must be a graph in EAP-IG's JSON"):
        from_mib(write(tmp_path / "c.json", wrong))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", 9999 * b"["])
def test_what_is_no_json_is_refused(content, tmp_path):
    path = tmp_path / "c.mib.json"
    path.write_bytes(content)
    for read in (from_mib, load):
        with pytest.raises(ValueError, match="must be a graph in EAP-IG's JSON"):
            read(path)


def test_files_that_are_not_there_or_pickled(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        from_mib(tmp_path / "c.json")
    (tmp_path / "c.pt").touch()
    with pytest.raises(ValueError) as error:
        from_mib(tmp_path / "c.pt")
    assert str(error.value) == (
        "the file must be .json; 'c.pt' is pickled, and reading it could run code; convert it with "
        "EAP-IG: Graph.from_pt(path).to_json(path)"
    )
