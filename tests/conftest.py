"""Models that several suites share: tiny random ones in the hub's layout, and the shipped."""

from __future__ import annotations

import copy
import gc
import subprocess
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import checking
import jaxtyping
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from relp import (
    Component,
    Direction,
    EdgeEffects,
    EdgeScores,
    Effects,
    Layout,
    NodeEffects,
    NodeScores,
    Pairs,
    Provenance,
    Scores,
)
from tasks import Task, zoo
from tasks.ioi import NAMES, OBJECTS, PLACES, TEMPLATES

# Small models gain nothing from threads, and threads that wait for a busy core cost minutes.
torch.set_num_threads(1)


# -- the run ---------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="a skipped test is a failure")


def pytest_collection_finish() -> None:
    """A sweep collects garbage first; what is imported by now need not be walked each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("no_skips") and reporter and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_runtest_setup() -> None:
    checking.calls.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """What a program said before it failed is told with the test's failure."""
    try:
        return (yield)
    except subprocess.CalledProcessError as error:
        for said in (error.stdout, error.stderr):
            text = said.decode(errors="replace") if isinstance(said, bytes) else said
            error.add_note((text or "")[-3000:])
        raise


# -- models ----------------------------------------------------------------------------------------


def made(kind: type[Scores] = Scores, **labels: Any) -> Any:
    """Scores, or effects, of labels that stand side by side: of nodes or edges, as is given."""
    forms = (NodeEffects, EdgeEffects) if issubclass(kind, Effects) else (NodeScores, EdgeScores)
    parts = {name: value(**_taken(labels, value)) for name, value in PARTS.items()}
    if "nodes" in labels:
        return forms[0](**parts, **labels)
    return forms[1](**parts, layout=_layout(**_taken(labels, Layout)), **labels)


def altered(result: Any, **labels: Any) -> Any:
    """A result with other labels, wherever these are kept."""
    parts = {**PARTS, "layout": Layout} if isinstance(result, EdgeScores) else PARTS
    for name, kind in parts.items():
        if taken := _taken(labels, kind):
            labels[name] = replace(getattr(result, name), **taken)
    return replace(result, **labels)


def _layout(writers: Any, readers: Any, parallel: bool = False) -> Layout:
    return Layout.of(writers, readers, parallel)


PARTS = {"provenance": Provenance, "pairs": Pairs}


def _taken(labels: dict[str, Any], kind: Any) -> dict[str, Any]:
    taken = {f.name: labels.pop(f.name) for f in fields(kind) if f.name in labels}
    return taken | ({"direction": Direction(taken["direction"])} if "direction" in taken else {})


def save_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer that knows IOI's words, saved as the hub does; gives its size."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    words = [f" {w}" for w in (*NAMES, *OBJECTS, *PLACES)]
    bpe.train_from_iterator([*TEMPLATES, "".join(words), *words] * 4, trainer)
    end = "<|endoftext|>"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=end, eos_token=end, unk_token=end
    )
    fast.save_pretrained(folder)
    return len(fast)


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    size = save_tokenizer(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=size, n_layer=3, n_head=4, n_embd=32, n_positions=64, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    size = save_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        hidden_size=32, intermediate_size=48, max_position_embeddings=64, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def boot(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return warm(TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=dtype).eval())


def warm(model: Any) -> Any:
    """A bridge installs hooks of its own at the first run; `state` should not see those as ours."""
    with torch.no_grad():
        model(torch.tensor([[1, 2]]))
    return model


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def tiny(request: pytest.FixtureRequest) -> Any:
    """A tiny random model of each style."""
    return boot(request.getfixturevalue(f"{request.param}_folder"))


def on(fixture: str, model: str, *others: str) -> pytest.MarkDecorator:
    """`@on("tiny", "llama", "gpt2")`: each run takes the first model, a long proof the others."""
    long = [pytest.param(other, marks=pytest.mark.long) for other in others]
    return pytest.mark.parametrize(fixture, [model, *long], indirect=True)


@pytest.fixture(scope="session", params=["ioi-gpt2", "ioi-llama"])
def shipped(request: pytest.FixtureRequest) -> Any:
    """A model that comes with the package."""
    return warm(zoo.load(request.param))


@pytest.fixture(scope="module")
def annotations_unchecked() -> Iterator[None]:
    """Checks at each call would be three quarters of the time of the suite; others make them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def same_model_after(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does with a shared model, it must leave it as it was."""
    shared = [request.getfixturevalue(n) for n in ("tiny", "shipped") if n in request.fixturenames]
    before = [state(m) for m in shared]
    yield
    for model, was in zip(shared, before, strict=True):
        now = state(model)
        assert now == was, [a for a, b in zip(now, was, strict=True) if a != b]


def state(model: Any) -> list[tuple[Any, ...]]:
    """Hooks, flags, mode, methods, gradients and weights of every part of a model."""
    parts = [
        (
            name,
            module.training,
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._backward_hooks),
            "forward" in vars(module),
        )
        for name, module in model.named_modules()
    ]
    weights = [
        (name, p.requires_grad, p.grad is None, float(p.detach().double().sum()))
        for name, p in model.named_parameters()
    ]
    return [*parts, *weights]


def precedes(writer: Component, reader: Component, *, parallel: bool = False) -> bool:
    """Whether a reader hears a writer, case by case: what `Layout.exists` must say."""
    if writer.kind == "logits" or reader.kind == "embed":
        return False
    if writer.kind == "embed" or reader.kind == "logits":
        return True
    if writer.layer != reader.layer:
        return writer.layer < reader.layer
    mixed = writer.kind in ("head", "attn", "mixer")
    return not parallel and mixed and reader.kind in ("mlp", "neuron")


def random_task(model: Any, *, pairs: int = 4, length: int = 7, seed: int = 0) -> Task:
    """Pairs of random tokens with random answers: no structure to hide behind."""
    generator = torch.Generator().manual_seed(seed)
    size = int(model.cfg.d_vocab)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(0, size, shape, generator=generator)

    clean, corrupt, answers, foils = (
        draw(*shape) for shape in ((pairs, length), (pairs, length), (pairs,), (pairs,))
    )
    foils = torch.where(foils == answers, (foils + 1) % size, foils)
    return Task.from_tokens(clean, corrupt, answers, foils)


def able_task(model: Any, *, pairs: int = 4, length: int = 7, seed: int = 0) -> Task:
    """As `random_task`, but `model` can do it: the answer is what it says to the clean prompt.

    The foil is the token that the clean prompt lowers most, so that every pair has a real gap.
    """
    task = random_task(model, pairs=pairs, length=length, seed=seed)
    with torch.no_grad():
        clean, corrupt = (model(tokens)[:, -1].float() for tokens in (task.clean, task.corrupt))
    foils = (clean - corrupt).argmin(-1)
    return Task.from_tokens(task.clean, task.corrupt, clean.argmax(-1), foils)


def ragged_task(model: Any, *, seed: int = 0) -> Task:
    """Pairs of three lengths, answered before their last token, and not at one place per length."""
    lengths, ends = (6, 4, 6, 7, 4), (3, 2, 4, 5, 1)
    even = random_task(model, pairs=len(lengths), length=max(lengths), seed=seed)
    clean, corrupt = (
        [row[:length] for row, length in zip(side, lengths, strict=True)]
        for side in (even.clean, even.corrupt)
    )
    spans = {"name": (2, 0, 1, 3, 1), "end": ends}
    return Task.from_tokens(clean, corrupt, even.answers, even.foils, spans=spans)


def without_a_difference(task: Task) -> Task:
    """The clean prompts on both sides, which no task can be built with."""
    same = copy.copy(task)
    vars(same)["corrupt"] = task.clean
    return same


@pytest.fixture
def everything_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and softmaxes of transformers compute in float32, whatever the model is in."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
