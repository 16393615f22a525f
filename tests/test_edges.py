"""Edge scores and effects against TransformerLens, and one edge moved at a time, on every kind of
block."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import boot, on, ragged_task, random_task, save_tokenizer, warm
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.attribution_patching import (
    EdgeAttributionConfig,
    attribution_patch,
)

from circuits import assemble, patch
from relp import DEEPLIFT, GRADIENT, PARTWAY, RELP, Rules, Scores, attribute, edges, propagate
from relp.bridge import rerun
from relp.bridge.norms import NormMap
from relp.bridge.room import available
from relp.bridge.sites import Sites
from relp.layout import Component
from relp.rulebook import PRESETS
from tasks import Task

WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {**WIDE, "intermediate_size": 48}
GROUPED = {**GATED, "num_key_value_heads": 2}
LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "num_key_value_heads": 4, "first_k_dense_replace": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "GPT2": {"n_layer": 2, "n_head": 4, "n_embd": 32},
    "Llama": GROUPED,
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},  # adds the stream inside its parts
    "Falcon": WIDE,  # parallel, one key/value head
    "GPTNeoX": GATED,  # parallel, a norm each
    "GPTJ": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},  # parallel, one norm
    "OPT": {**WIDE, "ffn_dim": 64, "word_embed_proj_dim": 32},  # an MLP on merged positions
    "Qwen3": {**GROUPED, "head_dim": 8},  # QK-norm
    "Gemma2": {**GROUPED, "head_dim": 8},  # norms before and behind
    "Gemma3": {**GROUPED, "head_dim": 8},
    "Olmo2": GATED,  # norms behind only
    "DeepseekV3": {**GATED, **LATENT},  # latent attention
    "Mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "Mamba2": {
        "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 4, "head_dim": 16,
        "n_groups": 1, "chunk_size": 4,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def named(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[str, Any]:
    """A random model in float64, so that finite differences have digits to lose."""
    return request.param, build(request.param, tmp_path_factory.mktemp("edges"), MODELS)


def build(name: str, folder: Path, table: dict[str, dict[str, Any]]) -> Any:
    size = save_tokenizer(folder)
    kind = "Gemma3Text" if name == "Gemma3" else name
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=size, bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.2,
        **table[name],
    )  # fmt: skip
    torch.manual_seed(0)
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{name}{head}")(config)
    for part, weights in model.named_parameters():  # norms of ones and zero biases hide mistakes
        if "norm" in part.lower() or "ln_" in part or part.endswith("bias"):
            weights.data += 0.2 * torch.randn(weights.shape)
    model.save_pretrained(folder)
    return warm(boot(folder, dtype=torch.float64))


def totals(scores: Scores, names: tuple[str, ...]) -> Tensor:
    assert scores.nodes is not None
    return scores.nodes.mean(0).sum(-1)[[scores.components.index(n) for n in names]]


@pytest.mark.parametrize("rules", [GRADIENT, RELP, DEEPLIFT], ids=lambda r: r.name)
def test_a_writers_edges_sum_to_its_node(named: tuple[str, Any], rules: Any) -> None:
    _, model = named
    task = random_task(model, pairs=3)
    nodes = attribute(model, task, rules=rules)
    edges = attribute(model, task, rules=rules, level="edge")
    assert edges.edges is not None
    expected = totals(nodes, edges.writers)
    assert float((edges.edges.sum(1) - expected).abs().max() / expected.abs().max()) < 1e-5
    if rules is DEEPLIFT:
        gap = float(edges.gap.mean())
        assert float(edges.edges[0].sum()) == pytest.approx(gap, rel=1e-5)
        assert float(edges.edges[:, -1].sum()) == pytest.approx(gap, rel=1e-5)


@on("tiny", "llama", "gpt2")
@pytest.mark.parametrize("rules", [RELP, PARTWAY], ids=lambda r: r.name)
def test_any_number_of_tokens_at_a_time_gives_the_same(
    tiny: Any, rules: Rules, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = ragged_task(tiny)
    kinds = (False, True, "spans")
    tables = [by(tiny, task, rules, positions) for positions in kinds]
    for size in (1, 3) if rules is RELP else (3,):
        monkeypatch.setattr(edges, "tokens_at_once", lambda *_, size=size, **__: size)
        for positions, expected in zip(kinds, tables, strict=True):
            same(by(tiny, task, rules, positions), expected)
    for pos in range(3 if rules is RELP else 0):  # one position after the other, and nothing at it
        cut = by(tiny, task.select([1, 4]), rules, positions=True)
        one = [by(tiny, task.select([i]), rules, positions=True)[pos] for i in (1, 4)]
        same(cut[pos], sum(one) / 2)
    if rules is RELP:
        same(tables[1].sum(0), tables[0])
        same(tables[2].sum(0), tables[0])


def by(model: Any, task: Any, rules: Rules, positions: bool | str) -> Tensor:
    scores = attribute(model, task, rules=rules, level="edge", positions=positions)
    assert scores.edges is not None
    return scores.edges


def same(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


@on("tiny", "llama")
def test_where_memory_runs_out_fewer_tokens_go_on(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, inner, sizes = random_task(tiny), edges._scores, []
    expected = by(tiny, task, RELP, positions=True)

    def scores(sites: Any, seen: Any, rules: Any, counts: Any, buffer: Any) -> Tensor:
        sizes.append(sum(counts))
        if most and sum(counts) > most.pop():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return inner(sites, seen, rules, counts, buffer)

    monkeypatch.setattr(edges, "_scores", scores)
    monkeypatch.setattr(edges, "tokens_at_once", lambda *_, **__: 10)
    most = [0, 10]  # the second chunk does not fit
    same(by(tiny, task, RELP, positions=True), expected)
    assert sizes == [10, 10, 5, 5, 5, 3]
    most = [0] * 20 + [10]
    with pytest.raises(RuntimeError, match="for one token at a time; it ran out at token 10 of 28"):
        by(tiny, task, RELP, positions=True)


@on("tiny", "llama")
def test_more_than_fits_by_position_is_refused(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task = random_task(tiny)
    monkeypatch.setattr(edges, "available", lambda _: 20)
    for rules, twice in ((RELP, r"\("), (PARTWAY, r"\(2 x ")):
        with pytest.raises(ValueError, match=f"{twice}7 positions x 16 writers x 28 readers"):
            by(tiny, task, rules, positions=True)
        assert by(tiny, task, rules, positions="spans").isfinite().all()
    monkeypatch.setattr(edges, "available", lambda _: 3_100_000_000)
    with pytest.raises(ValueError) as refused:
        edges._must_fit(2048, 1057, 1569, tables=1)
    assert str(refused.value) == (
        "edge scores by position must fit into memory; they are 13.6 GB (2,048 positions x 1,057 "
        "writers x 1,569 readers), and 3.1 GB are free; sum them over spans (positions='spans'), "
        "leave `positions` out, or score shorter prompts"
    )


def test_what_is_free_is_bounded_by_the_limits_of_the_process() -> None:
    resource = pytest.importorskip("resource")
    free, before = available(torch.device("cpu")), resource.getrlimit(resource.RLIMIT_AS)
    assert 1 << 20 < free < 1 << 50
    status = Path("/proc/self/status").read_text().split()
    size = int(status[status.index("VmSize:") + 1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (size + (256 << 20), before[1]))
    try:
        assert 0 <= available(torch.device("cpu")) <= 256 << 20
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Reference:
    """One edge moved at a time in the running model; shares no code with the package."""

    def __init__(self, model: Any, task: Any) -> None:
        self.model, self.task = model, task
        self.clean, self.corrupt = self.run("clean"), self.run("corrupt")

    def points(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {"final": self.model.ln_final.hook_in}
        for i, block in enumerate(self.model.blocks):
            found[f"{i}.in"] = block.hook_in
            mixer = block.attn if hasattr(block, "attn") else block.mixer
            if "k" in dict(mixer.named_children()):
                found |= {f"{i}.{s}": getattr(mixer, s).hook_out for s in "qkv"}
                found[f"{i}.z"] = mixer.o.hook_in
            out = getattr(
                mixer, "o", mixer
            )  # Bloom's attention adds the stream to what it puts out
            found |= {f"{i}.mixer_in": mixer.hook_in, f"{i}.mixer": out.hook_out}
            if hasattr(block, "mlp"):
                # OPT has no module that holds its MLP
                first = block.mlp if block.mlp.name else getattr(block.mlp, "in")
                found |= {f"{i}.mlp_in": first.hook_in, f"{i}.mlp": block.hook_mlp_out}
        return found

    def run(self, side: str, edits: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """All tensors of a run, and the metric; `edits` replaces some of them."""
        kept: dict[str, Tensor] = {}

        def hook(name: str) -> Callable[..., Tensor]:
            def visit(_: nn.Module, __: Any, value: Tensor) -> Tensor:
                new = (edits or {}).get(name)
                value = value if new is None else new.reshape(value.shape)
                kept[name] = value.reshape(len(self.task), -1, value.shape[-1])
                return value

            return visit

        with ExitStack() as stack, torch.no_grad():
            for name, point in self.points().items():
                stack.callback(point.register_forward_hook(hook(name)).remove)
            kept["metric"] = self.task.metric(self.model(getattr(self.task, side)))
        return kept

    def change(self, writer: Component) -> Tensor:
        """What the writer adds to the stream, clean minus corrupt; to first order behind a norm."""
        i, block = writer.layer, self.model.blocks[writer.layer]
        if writer.kind != "head":
            site = "0.in" if writer.kind == "embed" else f"{i}.{writer.kind}"
            return self.clean[site] - self.corrupt[site]
        added = self.added(writer)
        if not hasattr(block, "ln1_post"):
            return added
        here, small = self.corrupt[f"{i}.mixer"], 1e-5
        return (block.ln1_post(here + small * added) - block.ln1_post(here - small * added)) / (
            2 * small
        )

    def added(self, head: Component) -> Tensor:
        """What one head puts out, clean minus corrupt."""
        site, o = f"{head.layer}.z", self.model.blocks[head.layer].attn.o
        step = self.clean[site] - self.corrupt[site]
        z, size = torch.zeros_like(step), step.shape[-1] // self.model.cfg.n_heads
        at = slice(head.head * size, (head.head + 1) * size)
        z[..., at] = step[..., at]
        return o(z) - o(torch.zeros_like(z))

    def whole_change(self, writer: Component) -> Tensor:
        """The same, not to first order: y = w x r of an RMS norm changes by w (mean r · Δx + mean
        x · Δr); a head has the share of Δr that it has of the change of Σ x²."""
        if writer.kind != "head" or not hasattr(
            block := self.model.blocks[writer.layer], "ln1_post"
        ):
            return self.change(writer)
        x, x_ = (run[f"{writer.layer}.mixer"] for run in (self.corrupt, self.clean))
        inner = block.ln1_post.original_component
        eps = inner.eps if hasattr(inner, "eps") else inner.variance_epsilon
        r, r_ = ((y.square().mean(-1, keepdim=True) + eps).rsqrt() for y in (x, x_))
        w = block.ln1_post(torch.ones_like(x)) * math.sqrt(1 + eps)
        added, middle = self.added(writer), (x + x_) / 2
        share = (middle * added).sum(-1, keepdim=True) / (middle * (x_ - x)).sum(-1, keepdim=True)
        return w * ((r + r_) / 2 * added + middle * (r_ - r) * share)

    def read(self, reader: Component, slot: str, move: Tensor) -> dict[str, Tensor]:
        """The corrupt run's edits that give one reader a stream moved by `move`."""
        if reader.kind == "logits":
            return {"final": self.corrupt["final"] + move}
        i, block = reader.layer, self.model.blocks[reader.layer]
        stream = self.corrupt[f"{i}.in"]
        ln1 = getattr(block, "ln1", getattr(block, "norm", nn.Identity()))
        if reader.kind == "mixer":
            return {f"{i}.mixer_in": ln1(stream + move)}
        if reader.kind == "mlp":
            parallel = self.model.cfg.parallel_attn_mlp
            added = self.corrupt[f"{i}.mixer"]
            added = block.ln1_post(added) if hasattr(block, "ln1_post") else added
            stream = stream if parallel else stream + added
            ln2 = getattr(block, "ln2", ln1 if parallel else nn.Identity())
            return {f"{i}.mlp_in": ln2(stream + move)}
        projection = getattr(block.attn, slot)
        moved, own = projection(ln1(stream + move)), self.corrupt[f"{i}.{slot}"].clone()
        kv = getattr(self.model.cfg, "n_key_value_heads", None) or self.model.cfg.n_heads
        size = own.shape[-1] // (self.model.cfg.n_heads if slot == "q" else kv)
        at = slice(reader.head * size, (reader.head + 1) * size)
        own[..., at] = moved[..., at]
        return {f"{i}.{slot}": own}

    def score(self, writer: str, reader: str) -> float:
        """Central difference of the mean metric along the edge."""
        move, small = self.change(Component.parse(writer)), 1e-4
        ends = [self.metric(reader, sign * small * move) for sign in (1, -1)]
        return float(ends[0] - ends[1]) / (2 * small)

    def effect(self, writer: str, reader: str) -> float:
        """What the edge's whole change does to the mean metric."""
        metric = self.metric(reader, self.whole_change(Component.parse(writer)))
        return float(metric - self.corrupt["metric"].mean())

    def metric(self, reader: str, move: Tensor) -> Tensor:
        """Mean metric of the corrupt run if one reader's stream is moved."""
        return self.run("corrupt", self.read(*Component.of_reader(reader), move))["metric"].mean()


def some(scores: Scores) -> Iterator[tuple[str, str, float]]:
    """Every third edge; the others that exist are not looked at, those that do not are 0."""
    assert scores.edges is not None
    exists, count = scores.layout.exists, 0
    assert bool((scores.edges[~exists] == 0).all())
    for w, r in exists.nonzero().tolist():
        if (w + r) % 3 == 0 or len(scores.readers) < 10:
            count += 1
            yield scores.writers[w], scores.readers[r], float(scores.edges[w, r])
    assert count >= 6


@torch.no_grad()
def test_single_edges_by_finite_differences(
    named: tuple[str, Any], request: pytest.FixtureRequest
) -> None:
    _, model = named
    task = random_task(model, pairs=2, length=5)
    scores = attribute(model, task, rules=GRADIENT, level="edge")
    assert scores.edges is not None
    request.getfixturevalue("everything_double")
    reference = Reference(model, task)
    unmoved = torch.zeros_like(reference.corrupt["0.in"])
    for reader in scores.readers[::5]:  # the reference rebuilds what it means to rebuild
        for site, value in reference.read(*Component.of_reader(reader), unmoved).items():
            torch.testing.assert_close(value, reference.corrupt[site].reshape(value.shape))
    scale = float(scores.edges.abs().max())
    for writer, reader, found in some(scores):
        expected = reference.score(writer, reader)
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5 * scale), (writer, reader)


@torch.no_grad()
def test_exact_effects_of_single_edges(
    named: tuple[str, Any], request: pytest.FixtureRequest
) -> None:
    """One reader's input is rebuilt, and the whole model runs again: nothing skipped or batched."""
    _, model = named
    task = random_task(model, pairs=2, length=5)
    effects = patch(model, task, level="edge", progress=False)
    assert effects.edges is not None
    request.getfixturevalue("everything_double")
    reference = Reference(model, task)
    scale = float(effects.edges.abs().max())
    for writer, reader, found in some(effects):
        expected = reference.effect(writer, reader)
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5 * scale), (writer, reader)


def test_blocks_that_run_at_one_position_give_what_whole_ones_do(
    named: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = named
    task = random_task(model, pairs=2, length=5)
    found = patch(model, task, progress=False)
    assert rerun.Rerun.of(Sites.of(model), task, (), side="clean").pointwise
    monkeypatch.setattr(rerun, "_is_pointwise", lambda _: False)
    whole = patch(model, task, progress=False)
    assert found.nodes is not None and whole.nodes is not None
    torch.testing.assert_close(found.nodes, whole.nodes)


def test_gradient_edges_are_transformer_lens_attribution_patch(tmp_path: Path) -> None:
    """Same sign, same run for the gradient; it keeps positions and takes one pair at a time."""
    model = build("GPT2", tmp_path, MODELS)
    pair = random_task(model, pairs=1, length=5)
    theirs = attribution_patch(
        model,
        pair.clean,
        pair.corrupt,
        lambda logits: logits[0, -1, pair.answers[0]] - logits[0, -1, pair.foils[0]],
        EdgeAttributionConfig(granularity="edge"),
    ).edge_scores
    summed: Counter[tuple[str, str]] = Counter()
    for (source, target), score in theirs.items():
        kinds = {"embed": "embed", "mlp_out": "L{}.mlp", "attn_head_out": "L{}H{}"}
        writer = kinds[source.kind].format(source.layer, source.head)
        slots = {"mlp_in": "L{}.mlp.in", "logits": "logits.in"}
        slots |= {f"{s}_input": "L{}H{}" + f".{s}" for s in "qkv"}
        summed[writer, slots[target.kind].format(target.layer, target.head)] += score
    ours = attribute(model, pair, rules=GRADIENT, level="edge").to_dataframe()
    assert len(ours) == len(summed)
    scale = max(abs(s) for s in summed.values())
    for writer, reader, score in zip(ours["writer"], ours["reader"], ours["score"], strict=True):
        assert score == pytest.approx(summed[writer, reader], rel=1e-5, abs=1e-6 * scale)


@pytest.mark.parametrize(("name", "edges"), [("GPT2", 32_491), ("GPTNeoX", 32_347)])
def test_published_edge_counts(name: str, edges: int, tmp_path: Path) -> None:
    """GPT-2 small and Pythia-160M: 12 layers of 12 heads; in the latter the MLP is parallel."""
    sizes = {
        "GPT2": {"n_layer": 12, "n_head": 12, "n_embd": 24},
        "GPTNeoX": {
            "hidden_size": 48, "num_hidden_layers": 12, "num_attention_heads": 12,
            "intermediate_size": 24,
        },
    }  # fmt: skip
    model = build(name, tmp_path, sizes)
    scores = attribute(model, random_task(model, pairs=1, length=3), level="edge")
    graph = assemble(scores)
    assert (len(scores.writers), len(scores.readers)) == (157, 445)
    assert graph.graph["total_edges"] == len(scores.to_dataframe()) == edges
    assert graph.has_edge("L3H2", "L3.mlp") == (name == "GPT2")
    path = scores.save(tmp_path / "scores.safetensors")
    assert Scores.load(path).parallel == (name == "GPTNeoX")


@pytest.mark.parametrize("rules", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_the_linear_map_of_a_norm_is_that_of_the_rules(kind: Any, rules: Rules) -> None:
    """`propagate` gives the map one coefficient at a time; a push is its adjoint."""
    torch.manual_seed(0)
    norm = kind(16, eps=1e-5)
    norm.weight.data += torch.randn(16)
    norm.uses_rms_norm, norm.uses_weight_offset = kind is nn.RMSNorm, False
    own, other, c, change = torch.randn(4, 2, 3, 16)
    x = own.clone().requires_grad_()
    with propagate(rules, root=norm) as report:
        y = norm(x)
    if rules.needs_reference:
        with report.reference():
            norm(other)
    (expected,) = torch.autograd.grad(y, x, c)
    found = NormMap.of(norm, own, other, rules)
    torch.testing.assert_close(found.pull(c), expected, rtol=1e-4, atol=1e-5)
    one, two = (found.push(change) * c).sum(), (change * expected).sum()
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    if rules.norm == "secant":
        torch.testing.assert_close(
            found.push(other - own), norm(other) - norm(own), atol=1e-5, rtol=1e-4
        )
    w, z = torch.randn(8, 16), torch.randn(2, 3, 8)
    heads = torch.empty(2, 2, 3, 16)
    found.pull_through(w, z, heads)
    for h, part in enumerate((slice(0, 4), slice(4, 8))):
        torch.testing.assert_close(
            heads[h], found.pull(z[..., part] @ w[part]), rtol=1e-4, atol=1e-5
        )


def test_another_norm_is_refused() -> None:
    class Odd(nn.LayerNorm):
        uses_rms_norm, uses_weight_offset = False, False

        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    x = torch.randn(2, 3, 8)
    with pytest.raises(RuntimeError, match="norms that are layer or RMS norms; a Odd differs"):
        NormMap.of(Odd(8), x, x, RELP)


def test_norms_of_the_stream_itself_are_refused(tmp_path: Path) -> None:
    size = save_tokenizer(tmp_path)
    config = transformers.BertConfig(vocab_size=size, pad_token_id=0, **GATED)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    model = warm(boot(tmp_path))
    task = random_task(model, pairs=2)
    assert attribute(model, task).nodes is not None
    with pytest.raises(RuntimeError, match=r"normalises the stream itself \(BERT, .*level='node'"):
        attribute(model, task, level="edge")


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    size = save_tokenizer(tmp_path)
    config = transformers.T5Config(
        vocab_size=size, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    model = TransformerBridge.boot_transformers(str(tmp_path), device="cpu").eval()
    task = Task.from_tokens([[1]], [[2]], [0], [1])
    with pytest.raises(
        TypeError, match=r"without blocks, ln_final .*relp\.propagate and relp\.cov"
    ):
        attribute(model, task)
