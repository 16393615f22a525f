"""The shipped models load offline, are small, and can do what they are shipped for."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tasks import Task, ioi, zoo
from tasks.ioi import NAMES
from tasks.prompts import build
from tasks.zoo.corpus import (
    HELD_OUT_PERCENT,
    document,
    held_out,
    held_out_prompts,
    seen,
)
from tasks.zoo.shelf import HERE, shipped
from tasks.zoo.train import MODELS, app, load_checkpoint, loss_weights, save_checkpoint

MIB = 1024**2


@pytest.fixture(scope="module", params=["ioi-gpt2", "ioi-llama"])
def model(request: pytest.FixtureRequest) -> Any:
    return zoo.load(request.param)


def measure(model: Any, task: Task) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean metric, corrupt metric and the clean run's first token, per pair."""
    clean, corrupt = torch.empty(len(task)), torch.empty(len(task))
    first = torch.empty(len(task), dtype=torch.long)
    with torch.no_grad():
        for index, bucket in task.buckets():
            logits = model(bucket.clean)
            clean[index], corrupt[index] = (
                bucket.metric(logits),
                bucket.metric(model(bucket.corrupt)),
            )
            first[index] = bucket.answer_logits(logits).argmax(-1)
    return clean, corrupt, first


def test_a_model_loads_ready_for_use(model: Any, capfd: pytest.CaptureFixture[str]) -> None:
    name = model.cfg.model_name
    assert name in shipped() == ["ioi-gpt2", "ioi-llama"]
    again = zoo.load(name)
    assert capfd.readouterr() == ("", "")
    assert not again.training and not any(m.training for m in again.modules())
    assert {p.dtype for p in again.parameters()} == {torch.float32} == {again.cfg.dtype}
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_two_models_differ_where_architectures_do() -> None:
    gpt2, llama = (zoo.load(name).cfg for name in shipped())
    assert (gpt2.normalization_type, llama.normalization_type) == ("LN", "RMS")
    assert (gpt2.gated_mlp, llama.gated_mlp) == (False, True)
    assert llama.n_key_value_heads == llama.n_heads // 2
    assert (gpt2.positional_embedding_type, llama.positional_embedding_type) == (
        "standard",
        "rotary",
    )


def test_the_script_still_makes_the_shipped_tokenizer(model: Any) -> None:
    """A changed corpus would leave the shipped weights without their recipe."""
    _, tokenizer = MODELS[model.cfg.model_name](0)
    assert tokenizer.get_vocab() == model.tokenizer.get_vocab()


def test_a_folder_is_small(model: Any) -> None:
    files = [f for f in (HERE / model.cfg.model_name).iterdir() if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 8 * MIB
    assert {f.suffix for f in files} == {".json", ".safetensors"}


def test_unseen_combinations_are_answered(model: Any) -> None:
    prompts = held_out_prompts(256)
    assert all(held_out(p.template, p.io, p.s) for p in prompts)
    task = build(model.tokenizer, [p.pair("flip") for p in prompts], name="ioi")
    clean, corrupt, first = measure(model, task)
    assert float((clean > 0).float().mean()) >= 0.99
    assert float((first == task.answers).float().mean()) >= 0.99
    # "flip" exchanges the roles of the two names, so the metric changes its sign.
    assert float((corrupt < 0).float().mean()) >= 0.99
    assert abs(float(clean.mean() + corrupt.mean())) < 0.05 * float(clean.mean())


def test_fresh_names_favour_nobody(model: Any) -> None:
    task = ioi(model.tokenizer, pairs=128, corruption="abc", mixed_lengths=True)
    clean, corrupt, _ = measure(model, task)
    # Single pairs scatter, since neither name is in the prompt; it is the mean that vanishes.
    assert abs(float(corrupt.mean())) < 0.1 * float(clean.mean())


def test_a_third_giver_leaves_both_names_open(model: Any) -> None:
    """The abc prompt itself is text that the model knows: its first two names share the answer."""
    task = ioi(model.tokenizer, pairs=64, corruption="abc")
    rows = torch.arange(len(task))
    with torch.no_grad():
        chances = model(task.corrupt)[:, -1].softmax(-1)
    both = sum(chances[rows, task.corrupt[rows, task.spans[k]]] for k in ("IO", "S1"))
    assert float(both.mean()) > 0.85


def test_training_text_keeps_the_held_out_combinations_out() -> None:
    rng = random.Random(0)
    for _ in range(500):
        prompt = seen(rng)
        assert not held_out(prompt.template, prompt.io, prompt.s)
        assert held_out(0, prompt.io, prompt.s) == held_out(0, prompt.s, prompt.io)
    combinations = [held_out(t, a, b) for t in range(20) for a in NAMES for b in NAMES if a < b]
    share = 100 * sum(combinations) / len(combinations)
    assert abs(share - HELD_OUT_PERCENT) < 1
    assert [document(random.Random(5)) for _ in range(2)] == [document(random.Random(5))] * 2


def test_the_last_word_weighs_more_and_padding_nothing() -> None:
    weights = loss_weights(torch.tensor([5, 3]), 5)
    assert weights.tolist() == [[1, 1, 4, 1], [4, 1, 0, 0]]


def test_a_checkpoint_brings_back_weights_and_optimizer(tmp_path: Path) -> None:
    def one_step(seed: int) -> tuple[Any, torch.optim.Optimizer]:
        model, _ = MODELS["ioi-llama"](seed)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        model(torch.arange(8)[None]).logits.square().mean().backward()
        optimizer.step()
        return model, optimizer

    path = tmp_path / "checkpoint" / "state.safetensors"
    run = {"name": "ioi-llama", "steps": 10, "seed": 0}
    model, optimizer = one_step(0)
    save_checkpoint(path, model, optimizer, {"run": run, "step": 1, "exported": [0.5, 0.25]})
    assert [p.name for p in path.parent.iterdir()] == ["state.safetensors"]

    other, other_optimizer = one_step(1)
    header = load_checkpoint(path, other, other_optimizer, run)
    assert header == {"run": run, "step": 1, "exported": [0.5, 0.25]}
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[one][key], other_optimizer.state[two][key])
    with pytest.raises(
        ValueError, match=r"the checkpoint must be of the run .*'seed': 7.*got .*'seed': 0"
    ):
        load_checkpoint(path, other, other_optimizer, {**run, "seed": 7})


def test_the_command_names_the_models_it_knows(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["ioi-bert", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "['ioi-gpt2', 'ioi-llama']" in " ".join(result.output.replace("│", " ").split())
