"""What a caller may have around a model must not change results in silence: modes of torch,
precision, hooks, compiled modules, adapters, and weights that are elsewhere."""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import able_task, boot, on, random_task, state, warm
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, LlamaForCausalLM

from circuits import assemble, faithfulness, patch, top
from relp import GRADIENT, RELP, attribute
from relp.bridge import Sites, bias, editing, reading, weight
from relp.bridge.live import Live
from relp.bridge.norms import norm_parameters
from relp.bridge.rerun import Rerun, _same
from relp.bridge.run import _linear, own_forward
from relp.bridge.source import fingerprint
from tasks import Task
from tasks.zoo.shelf import HERE


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def numbers(model: Any, task: Task) -> list[Tensor]:
    """Node and edge scores and exact effects."""
    nodes = attribute(model, task).nodes
    edges = attribute(model, task, level="edge").edges
    effects = patch(model, task, components=["mlp"], progress=False).nodes
    circuit = top(assemble(attribute(model, task, level="edge")), edges=20)
    with torch.inference_mode(False):
        share = torch.tensor(faithfulness(model, task, circuit), dtype=torch.float64)
    return [t for t in (nodes, edges, effects, share) if t is not None]


# -- modes -----------------------------------------------------------------------------------------

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@on("tiny", "llama", "gpt2")
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_the_modes_of_the_caller_change_nothing(tiny: Any, mode: Any) -> None:
    task = able_task(tiny, pairs=2, length=5)
    expected = numbers(tiny, task)
    with mode():
        before = (torch.get_default_dtype(), torch.is_autocast_enabled("cpu"))
        found = numbers(tiny, task)
        assert (torch.get_default_dtype(), torch.is_autocast_enabled("cpu")) == before
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs) and not ours.requires_grad and not ours.is_inference()


def test_inputs_that_require_grad_leave_no_graph_in_the_results(tiny: Any) -> None:
    """`enable_input_require_grads`, which gradient checkpointing and k-bit training call."""
    task = able_task(tiny, pairs=2, length=5)
    expected = numbers(tiny, task)
    embedding = tiny.original_model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _, __, out: out.requires_grad_(True))
    try:
        found = numbers(tiny, task)
    finally:
        handle.remove()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs) and not ours.requires_grad


def test_compiled_models_run_as_they_are_written(gpt2_folder: Path) -> None:
    """No rule and no hook reaches what a compiler has made of a module."""
    model = boot(gpt2_folder)
    task = able_task(model, pairs=2, length=4)
    expected = numbers(model, task)
    whole = torch.compile(model, backend="eager")
    assert all(map(torch.equal, numbers(whole, task), expected))
    model.blocks[1].mlp.compile(backend="eager")
    assert all(map(torch.equal, numbers(model, task), expected))


# -- hooks -----------------------------------------------------------------------------------------


def test_a_hook_on_one_row_of_the_batch_is_refused(tiny: Any) -> None:
    """Many runs share a batch, so that it would act on one of them."""
    task = able_task(tiny, pairs=1, length=5)

    def steer(act: Tensor, hook: Any) -> Tensor:
        act = act.clone()
        act[0, -1] += 2 * torch.arange(act.shape[-1]).sin()
        return act

    def on_every_row(act: Tensor, hook: Any) -> Tensor:
        act = act.clone()
        act[:, -1] += torch.arange(act.shape[-1]).sin()
        return act

    before = state(tiny)
    with (
        tiny.hooks(fwd_hooks=[("blocks.1.hook_out", steer)]),
        pytest.raises(RuntimeError, match="hooks must treat all rows of a batch alike"),
    ):
        patch(tiny, task, components=["mlp"], progress=False)
    circuit = top(assemble(attribute(tiny, task, level="edge")), edges=20)
    with (
        tiny.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", steer)]),
        pytest.raises(RuntimeError, match="all edges together must give the clean run"),
    ):
        faithfulness(tiny, task, circuit)
    with tiny.hooks(fwd_hooks=[("blocks.1.hook_out", on_every_row)]):
        together = patch(tiny, task, components=["mlp"], progress=False)
        alone = patch(tiny, task, components=["mlp"], batch_size=1, progress=False)
    assert together.nodes is not None and alone.nodes is not None
    torch.testing.assert_close(together.nodes, alone.nodes, rtol=1e-4, atol=1e-5)
    assert state(tiny) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_forward_of_the_unembeddings_own_is_used_and_outlives_a_sweep(
    gpt2_folder: Path, dtype: torch.dtype
) -> None:
    """As accelerate sets one. Nothing of ours may compute logits past it, in any precision."""
    model = boot(gpt2_folder, dtype)
    task = able_task(model, pairs=2, length=4)
    inner = model.unembed.original_component
    calls = []

    def tripled(x: Tensor) -> Tensor:
        calls.append(1)
        out: Tensor = 3 * type(inner).forward(inner, x)
        return out

    plain = patch(model, task, components=["L1.mlp"], progress=False).clean
    inner.forward = tripled
    found = patch(model, task, components=["L1.mlp"], progress=False).clean
    assert vars(inner)["forward"] is tripled and calls
    torch.testing.assert_close(found, 3 * plain, rtol=3 * torch.finfo(dtype).eps, atol=0.0)


def test_a_forward_of_ones_own_takes_the_place_of_another_and_gives_it_back() -> None:
    layer = nn.Linear(2, 2)
    mine = layer.forward = lambda x: x + 1
    with own_forward(layer, lambda x: x + 2):
        assert layer(torch.zeros(1)) == 2
    assert vars(layer)["forward"] is mine and layer(torch.zeros(1)) == 1
    del layer.forward
    with pytest.raises(KeyError), own_forward(layer, lambda x: x + 2):
        raise KeyError
    assert "forward" not in vars(layer)


def test_models_that_read_both_ways_run_all_positions(tmp_path: Path) -> None:
    """What is before a change hears of it there, from the second block after it on."""
    config = BertConfig(
        vocab_size=zoo_tokenizer(tmp_path), hidden_size=16, num_hidden_layers=4,
        num_attention_heads=2, intermediate_size=24, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    model = boot(tmp_path)
    task = random_task(model, pairs=2, length=6)
    sites = Sites.of(model)
    # few runs share a batch, or all would begin where the first of them does
    found = patch(model, task, components=["L0.mlp"], batch_size=2, progress=False).nodes
    assert found is not None
    with torch.no_grad(), reading(sites, ("L0.mlp",)) as clean:
        model(task.clean)
    for pos in (1, 4):

        def put(value: Tensor, pos: int = pos) -> Tensor:
            value = value.clone()
            value[:, pos] = clean["L0.mlp"][:, pos]
            return value

        with torch.no_grad():
            own = task.metric(model(task.corrupt))
            with editing(sites, {"L0.mlp": put}):
                expected = task.metric(model(task.corrupt)) - own
        torch.testing.assert_close(found[:, 0, pos], expected, rtol=1e-4, atol=1e-5)


def zoo_tokenizer(folder: Path) -> int:
    tokenizer = AutoTokenizer.from_pretrained(HERE / "ioi-llama")
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


# -- threads ---------------------------------------------------------------------------------------


def test_verbs_of_several_threads_on_one_model_wait_for_each_other(gpt2_folder: Path) -> None:
    model = boot(gpt2_folder)
    task = able_task(model, pairs=2, length=4)
    expected, before, same = numbers(model, task), state(model), []

    def measure() -> None:
        same.extend(map(torch.equal, numbers(model, task), expected))

    threads = [threading.Thread(target=measure) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 3 * len(expected) and state(model) == before


def test_what_is_put_on_a_model_acts_in_its_own_thread(tiny: Any) -> None:
    sites, tokens = Sites.of(tiny), torch.tensor([[1, 2, 3]])
    plain, seen = tiny(tokens).detach(), []

    def elsewhere() -> None:
        with torch.no_grad():
            seen.append(tiny(tokens))

    thread = threading.Thread(target=elsewhere)
    with (
        torch.no_grad(),
        editing(sites, {"L1.mlp": torch.zeros_like}),
        own_forward(tiny.blocks[0], lambda x, *_, **__: x),
    ):
        thread.start()
        thread.join()
        assert not torch.equal(tiny(tokens), plain)
    assert torch.equal(seen[0], plain)


# -- precision -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def halved(request: pytest.FixtureRequest, gpt2_folder: Path) -> tuple[Any, Any]:
    """The same model twice: rounded to half precision, and the rounded weights in float32."""
    half, same = boot(gpt2_folder, request.param), boot(gpt2_folder)
    ours = {id(p) for p in same.original_model.parameters()}
    assert ours
    with torch.no_grad():
        for p in same.original_model.parameters():
            p.copy_(p.to(request.param))
        for block in same.blocks:  # the bridge splits joint matrices into copies
            for part in (block.attn.q, block.attn.k, block.attn.v):
                inner = part.original_component
                inner.weight.copy_(inner.weight.to(request.param))
                inner.bias.copy_(inner.bias.to(request.param))
    return half, same


def test_the_last_product_is_in_single_precision(halved: tuple[Any, Any]) -> None:
    """Or effects would be steps of the logits' own precision."""
    half, _ = halved
    task = random_task(half, pairs=4, length=5)
    sites = Sites.of(half)
    with torch.no_grad(), reading(sites, ("unembed",)) as seen:
        rounded = half(task.clean)
    stream, last = seen["unembed"][:, -1].float(), half.unembed.original_component.weight.float()
    logits = stream @ last.T
    rows = torch.arange(len(task))
    expected = logits[rows, task.answers] - logits[rows, task.foils]
    for metric in (
        attribute(half, task).clean,
        patch(half, task, components=["L2.mlp"], progress=False).clean,
        attribute(half, task.with_metric(difference_of_all)).clean,
    ):
        torch.testing.assert_close(metric, expected, rtol=1e-5, atol=1e-6)
    assert (task.metric(rounded).float() - expected).abs().max() > 1e-4
    assert half(task.clean).dtype == rounded.dtype


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_its_graph_does_not_keep_the_matrix_in_single_precision(device: str) -> None:
    """With a large vocabulary that would be more than all else."""
    matrix = torch.ones(50, 8, dtype=torch.bfloat16, device=device)
    x = torch.ones(2, 8, device=device, requires_grad=True)
    with Live((matrix, x)) as live:
        logits = _linear(x, matrix)
        gc.collect()
        assert live.now == logits.nbytes
    (slope,) = torch.autograd.grad(logits.sum(), x)
    assert slope.shape == x.shape and (device == "meta" or bool((slope == 50).all()))


def difference_of_all(logits: Tensor, task: Task) -> Tensor:
    """A metric of the caller's, for which all logits are computed."""
    assert logits.dtype == torch.float32
    return logits[:, -1].gather(1, task.answers[:, None])[:, 0] - logits[:, -1].gather(
        1, task.foils[:, None]
    ).squeeze(1)


def test_effects_know_below_what_they_are_rounding(halved: tuple[Any, Any]) -> None:
    half, same = halved
    task = able_task(half, pairs=4, length=5)
    coarse, fine = (patch(m, task, progress=False) for m in (half, same))
    assert coarse.nodes is not None and fine.nodes is not None
    eps = torch.finfo(half.original_model.dtype).eps
    last_place = eps * torch.maximum(coarse.clean.abs(), coarse.corrupt.abs())
    assert coarse.resolution == pytest.approx(float(last_place.mean()), rel=0.5)
    assert 0 < fine.resolution < coarse.resolution / 100
    wrong = (coarse.nodes - fine.nodes).abs()
    assert float((wrong <= coarse.resolution).float().mean()) > 0.95
    sure = coarse.nodes.abs() > 4 * coarse.resolution
    assert bool((coarse.nodes.sign() == fine.nodes.sign())[sure].all()) and int(sure.sum()) > 10


# -- projections that are not their weight ---------------------------------------------------------


class Adapted(nn.Module):
    """A low-rank adapter beside a linear layer, with the attributes that peft's has."""

    def __init__(self, base: Any, scale: float) -> None:
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(0)
        first = scale * torch.randn(base.in_features, 2, generator=generator)
        self.down = nn.Parameter(first)
        self.up = nn.Parameter(scale * torch.randn(2, base.out_features, generator=generator))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + x @ self.down @ self.up
        return out


class Saturating(Adapted):
    """No linear map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def each_projection(model: Any) -> Iterator[Any]:
    for block in model.blocks:
        yield from (block.attn.q, block.attn.v, block.attn.o, block.mlp.out)


@pytest.mark.parametrize("scale", [0.3, 0.003])
def test_edges_of_adapted_projections_are_those_of_the_merged_model(
    llama_folder: Path, scale: float
) -> None:
    adapted, merged = boot(llama_folder), boot(llama_folder)
    for ours, theirs in zip(each_projection(adapted), each_projection(merged), strict=True):
        adapter = Adapted(ours.original_component, scale).eval()
        ours.set_original_component(adapter)
        with torch.no_grad():
            theirs.original_component.weight.add_((adapter.down @ adapter.up).T)
    task = able_task(adapted, pairs=2, length=5)
    base = attribute(boot(llama_folder), task, rules=GRADIENT, level="edge").edges
    pairs = list(zip(numbers(adapted, task), numbers(merged, task), strict=True))
    edges = [attribute(m, task, rules=GRADIENT, level="edge").edges for m in (adapted, merged)]
    exact = [
        patch(m, task, level="edge", edges=[("L0H1", "L2H3.q"), ("L1.mlp", "logits.in")],
              progress=False).edges.nan_to_num() for m in (adapted, merged)
    ]  # fmt: skip
    for found, expected in [*pairs, tuple(edges), tuple(exact)]:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert edges[0] is not None and edges[1] is not None and base is not None
    changed = (edges[1] - base).norm()
    assert float((edges[0] - edges[1]).norm() / changed) < 0.02


def test_projections_that_are_no_linear_map_are_refused(llama_folder: Path) -> None:
    model = boot(llama_folder)
    query = model.blocks[1].attn.q
    query.set_original_component(Saturating(query.original_component, 0.3).eval())
    task = able_task(model, pairs=2, length=5)
    attribute(model, task)  # nodes need no matrix
    with pytest.raises(RuntimeError, match="must be a linear map to have edges; a Saturating diff"):
        attribute(model, task, level="edge")


# -- weights that are elsewhere --------------------------------------------------------------------


def test_offloaded_weights_give_the_same_numbers(llama_folder: Path, tmp_path: Path) -> None:
    """As `device_map="auto"` leaves a model that does not fit."""
    away = ("model.embed_tokens", "model.layers.1", "model.norm")
    here = ("model.layers.0", "model.layers.2", "model.rotary_emb", "lm_head")
    inner = LlamaForCausalLM.from_pretrained(
        llama_folder,
        device_map=dict.fromkeys(away, "disk") | dict.fromkeys(here, "cpu"),
        offload_folder=str(tmp_path),
    )
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    model = TransformerBridge.boot_transformers(
        str(llama_folder), hf_model=inner, tokenizer=tokenizer, device="cpu"
    )
    model, plain = warm(model.eval()), boot(llama_folder)
    assert any(p.is_meta for p in model.original_model.parameters())
    assert Sites.of(model).device.type == "cpu"
    task = able_task(plain, pairs=2, length=5)
    for found, expected in zip(numbers(model, task), numbers(plain, task), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    ours, theirs = model.blocks[1], plain.blocks[1]
    assert torch.equal(weight(ours.attn.q), weight(theirs.attn.q)) and bias(ours.attn.q) is None
    scale, expected_scale = (norm_parameters(b.ln2).weight for b in (ours, theirs))
    assert scale is not None and expected_scale is not None and torch.equal(scale, expected_scale)
    assert fingerprint(model) == fingerprint(plain)


def test_streams_are_compared_row_by_row() -> None:
    """That of a first token may be thousands of times the others', and would hide what differs."""
    expected = torch.tensor([[1e6, 0.0], [1.0, 2.0]])
    found = expected.clone()
    found[1, 0] += 0.01
    assert not _same(found, expected)
    found[1, 0] = 1 + 1e-5
    assert _same(found, expected)


def test_a_run_is_the_same_with_and_without_what_it_keeps(tiny: Any) -> None:
    """What varies without any change is known, and as small as rounding."""
    rerun = Rerun.of(Sites.of(tiny), random_task(tiny, pairs=3, length=6), (), side="clean")
    assert 0 <= rerun.noise < 1e-5
    for start in (0, 4):
        nothing = rerun({}, copies=3, layer=1, start=rerun.start(start))
        assert float(nothing.abs().max()) < 1e-5


def test_scores_under_rules_do_not_depend_on_the_mode_either(shipped: Any) -> None:
    task = able_task(shipped, pairs=2, length=5)
    plain = attribute(shipped, task, rules=RELP).nodes
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = attribute(shipped, task, rules=RELP).nodes
    assert plain is not None and found is not None and torch.equal(found, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64,
                                   torch.bool, torch.uint8, torch.float8_e4m3fn])  # fmt: skip
@pytest.mark.parametrize("shape", [(), (3,), (4, 3), (2, 4, 3), (0, 3), (3, 0)])
def test_a_fingerprint_is_of_the_bits_of_any_tensor(dtype: torch.dtype, shape: Any) -> None:
    def holder(flip: bool) -> nn.Module:
        module = nn.Module()
        value = torch.arange(64)[: math.prod(shape)].reshape(shape).to(dtype)
        if flip and value.numel():
            value.view(-1)[-1] = 0 if value.flatten()[-1].to(torch.complex64) != 0 else 1
        module.register_buffer("value", value)
        return module

    one, same, other = (fingerprint(holder(flip)) for flip in (False, False, True))
    assert one == same and (one[1] == other[1]) == (math.prod(shape) == 0)
    assert (one[0] == "") == (not dtype.is_floating_point)
    turned = holder(False)
    turned.value = turned.value.mT.contiguous().mT if len(shape) > 1 else turned.value
    assert fingerprint(turned) == one  # however it lies in memory
