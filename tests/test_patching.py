"""Exact patching against one plain forward pass per cell, and circuits against the replica."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import able_task, boot, on, ragged_task, random_task, save_tokenizer
from replica import Replica
from safetensors import safe_open
from torch import Tensor, nn
from transformer_lens import patching
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from circuits import agreement, assemble, faithfulness, patch, top
from circuits.exact.progress import Progress
from circuits.graph import real_edges, size
from relp import GRADIENT, RELP, Component, Effects, attribute
from relp.bridge import versions
from relp.bridge.rerun import Rerun
from relp.bridge.sites import Sites, reading
from tasks import Task, ioi

EVERYWHERE = slice(None)


def other_run(value: Tensor) -> Tensor:
    return value


def plainly(
    model: Any,
    task: Task,
    name: str,
    pos: Any,
    own: str,
    instead: Callable[[Tensor], Tensor] = other_run,
) -> Tensor:
    """One component at one position, one hook, the whole model: nothing skipped or batched."""
    component = Component.parse(name)
    block = model.blocks[max(component.layer, 0)]
    point = {
        "embed": block.hook_in,
        "resid": block.hook_in,
        "head": block.attn.o.hook_in,
        "attn": block.attn.hook_out,
        "mlp": block.mlp.hook_out,
        "neuron": block.mlp.out.hook_in,
    }[component.kind]
    kept: list[Tensor] = []

    def note(_: nn.Module, __: Any, value: Tensor) -> None:
        kept.append(value)

    def write(_: nn.Module, __: Any, value: Tensor) -> Tensor:
        value = value.clone()
        part = slice(None)
        if component.kind in ("head", "neuron"):
            size = value.shape[-1] // model.cfg.n_heads if component.kind == "head" else 1
            part = slice(component.head * size, (component.head + 1) * size)
        value[:, pos, part] = instead(kept[0]).expand_as(value)[:, pos, part]
        return value

    other = "corrupt" if own == "clean" else "clean"
    results = []
    with torch.no_grad():
        for hook, side in ((note, other), (None, own), (write, own)):
            handle = point.register_forward_hook(hook) if hook else None
            results.append(task.metric(model(getattr(task, side))))
            if handle:
                handle.remove()
    return results[2] - results[1]


@on("tiny", "llama", "gpt2")
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_every_cell_equals_a_plain_run(tiny: Any, direction: str) -> None:
    task = random_task(tiny, pairs=3, length=5)
    effects = patch(tiny, task, direction=direction, batch_size=7, progress=False)
    own = {"denoise": "corrupt", "noise": "clean"}[direction]
    assert isinstance(effects, Effects)
    assert effects.nodes is not None
    for row, name in enumerate(effects.components):
        for pos in range(5):
            expected = plainly(tiny, task, name, pos, own)
            torch.testing.assert_close(effects.nodes[:, row, pos], expected, rtol=1e-4, atol=1e-5)


def test_layout_is_that_of_scores(shipped: Any) -> None:
    task = ioi(shipped.tokenizer, pairs=2, seed=0)
    scores = attribute(shipped, task)
    effects = patch(shipped, task, progress=False)
    assert effects.components == scores.components
    assert effects.nodes is not None and scores.nodes is not None
    assert effects.nodes.shape == scores.nodes.shape
    assert torch.equal(effects.clean, scores.clean)
    assert effects.rules == "exact"


def test_chosen_components_and_mixed_lengths(tiny: Any) -> None:
    one, two = random_task(tiny, pairs=2, length=4), random_task(tiny, pairs=2, length=6, seed=1)
    mixed = Task.from_tokens(
        [*one.clean, *two.clean], [*one.corrupt, *two.corrupt],
        torch.cat([one.answers, two.answers]), torch.cat([one.foils, two.foils]),
    )  # fmt: skip
    effects = patch(tiny, mixed, components=["mlp", "L1H2"], progress=False)
    assert effects.components == ("L0.mlp", "L1H2", "L1.mlp", "L2.mlp")
    alone = patch(tiny, one, components=["mlp", "L1H2"], progress=False)
    assert effects.nodes is not None and alone.nodes is not None
    torch.testing.assert_close(effects.nodes[:2, :, :4], alone.nodes)
    assert torch.equal(effects.nodes[:2, :, 4:], torch.zeros(2, 4, 2))
    with pytest.raises(ValueError, match="got 'neurons'; see Scores.components"):
        patch(tiny, mixed, components=["neurons"])


def test_neurons_and_all_positions_at_once(tiny: Any) -> None:
    task = random_task(tiny, pairs=2, length=4)
    asked = ["L1N3", "L2H0", "resid", "L0.mlp"]
    effects = patch(tiny, task, components=asked, positions=False, progress=False)
    assert effects.nodes is not None and effects.nodes.shape == (2, 6, 1)
    assert set(effects.to_dataframe()["token"]) == {"all positions"}
    for row, name in enumerate(effects.components):
        expected = plainly(tiny, task, name, EVERYWHERE, "corrupt")
        torch.testing.assert_close(effects.nodes[:, row, 0], expected, rtol=1e-4, atol=1e-5)
    every = patch(tiny, task, components=["neuron"], positions=False, progress=False)
    assert every.nodes is not None and len(every.components) == 3 * tiny.cfg.d_mlp
    neuron = every.nodes[:, every.components.index("L1N3")]
    torch.testing.assert_close(neuron, effects.nodes[:, effects.components.index("L1N3")])


@pytest.mark.parametrize("ablation", ["zero", "mean", "mean_per_position"])
def test_ablations_by_hand(tiny: Any, ablation: str) -> None:
    task = random_task(tiny, pairs=3, length=4)
    instead = {
        "zero": torch.zeros_like,
        "mean": lambda value: value.mean((0, 1), keepdim=True),
        "mean_per_position": lambda value: value.mean(0, keepdim=True),
    }[ablation]
    asked = ["L0.mlp", "L1H2", "L2.attn"]
    effects = patch(tiny, task, components=asked, ablation=ablation, batch_size=2, progress=False)
    assert effects.nodes is not None and effects.rules == f"exact ({ablation} ablation)"
    for row, name in enumerate(effects.components):
        for pos in range(4):
            expected = plainly(tiny, task, name, pos, "corrupt", instead)
            torch.testing.assert_close(effects.nodes[:, row, pos], expected, rtol=1e-4, atol=1e-5)


@on("tiny", "llama", "gpt2")
@pytest.mark.parametrize("ablation", ["patch", "zero", "mean", "mean_per_position"])
def test_pairs_that_end_at_different_places(tiny: Any, ablation: str) -> None:
    """What is behind a pair's answer cannot be heard, and means are over tokens that exist."""
    task = ragged_task(tiny)
    asked = ["L0.mlp", "L1H2", "L2.resid"]
    effects = patch(tiny, task, components=asked, ablation=ablation, batch_size=2, progress=False)
    assert effects.nodes is not None
    lengths, ends = task.lengths.tolist(), task.spans["end"].tolist()
    for row, name in enumerate(effects.components):
        held = [activation(tiny, task.select([i]), name) for i in range(len(task))]
        mean = torch.cat(held).mean(0)
        for i, (length, end) in enumerate(zip(lengths, ends, strict=True)):
            for pos in range(length):
                there = torch.stack([values[pos] for values in held if len(values) > pos])
                instead = {
                    "patch": held[i][pos],
                    "zero": torch.zeros_like(mean),
                    "mean": mean,
                    "mean_per_position": there.mean(0),
                }[ablation]
                alone = task.select([i])
                expected = plainly(tiny, alone, name, pos, "corrupt", partial(constant, instead))
                found = effects.nodes[i, row, pos]
                torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-5)
                assert pos <= end or float(found.abs()) <= 4 * effects.resolution
        assert not effects.nodes[:, row][torch.arange(7) >= task.lengths[:, None]].any()


def constant(instead: Tensor, _: Tensor) -> Tensor:
    return instead


def activation(model: Any, task: Task, name: str) -> Tensor:
    """What a component's site holds in the clean run of one pair: `[pos, d]`."""
    sites = Sites.of(model)
    site, _, _ = sites.part(name)
    with torch.no_grad(), reading(sites, (site,)) as seen:
        model(task.clean)
    return seen[site][0]


def test_equals_transformer_lens(tiny: Any) -> None:
    task = random_task(tiny, pairs=3, length=5)
    with torch.no_grad():
        _, cache = tiny.run_with_cache(task.clean)
        theirs = patching.get_act_patch_attn_head_out_by_pos(
            tiny, task.corrupt, cache, lambda logits: task.metric(logits).mean()
        )
    effects = patch(tiny, task, components=["head"], progress=False)
    assert effects.nodes is not None
    ours = (effects.nodes.mean(0) + effects.corrupt.mean()).unflatten(0, (3, 4)).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_what_a_cell_does_not_change_does_not_run(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, runs = Rerun.__call__, []

    def call(self: Rerun, *args: Any, layer: int, start: int, **kwargs: Any) -> Tensor:
        runs.append((layer, start))
        return inner(self, *args, layer=layer, start=start, **kwargs)

    monkeypatch.setattr(Rerun, "__call__", call)
    task = random_task(tiny, pairs=2, length=4)
    asked: dict[str, Any] = {"batch_size": 2, "progress": False}
    patch(tiny, task, components=["L1.mlp"], **asked)
    assert runs == [(2, 3), (2, 2), (2, 1), (2, 0)]  # what a block's MLP adds, the next one hears
    runs.clear()
    patch(tiny, task, components=["L1.resid"], batch_size=16, progress=False)
    assert runs == [(1, 1), (1, 0)]  # few enough positions run for nothing
    runs.clear()
    last = patch(tiny, task, components=["L2H1"], **asked)
    assert runs == [(3, 3)]  # behind the last block the answer position alone is read
    assert last.nodes is not None and bool((last.nodes[:, 0, :3] == 0).all())


# -- edges -----------------------------------------------------------------------------------------


def path_patched(replica: Replica, task: Task, own: str, edge: tuple[str, str], pos: Any) -> Tensor:
    """The replica with one reader's input rebuilt: float64, the whole model."""
    other = "corrupt" if own == "clean" else "clean"
    mine, theirs = replica.run(getattr(task, own)), replica.run(getattr(task, other))
    writer, reader = edge

    def read(name: str, residual: Tensor) -> Tensor:
        residual = residual.clone()
        if name == reader:
            residual[:, pos] += (theirs.writers[writer] - mine.writers[writer])[:, pos]
        return residual

    changed = replica.run(getattr(task, own), read=read)
    return task.metric(changed.logits) - task.metric(mine.logits)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_every_edge_equals_a_slow_run(tiny: Any, direction: str) -> None:
    task = random_task(tiny, pairs=2, length=4)
    own = {"denoise": "corrupt", "noise": "clean"}[direction]
    effects = patch(tiny, task, level="edge", direction=direction, progress=False)
    estimate = attribute(tiny, task, level="edge", direction=direction)
    assert effects.edges is not None and estimate.edges is not None
    assert (effects.writers, effects.readers) == (estimate.writers, estimate.readers)
    assert bool(((estimate.edges != 0) <= (effects.edges != 0)).all())
    replica = Replica(tiny, GRADIENT)
    for i, (u, v, _, data) in enumerate(real_edges(assemble(effects))):
        edge = (u, data["reader"])
        if i % 7 == 0 or v == "logits":
            with torch.no_grad():
                expected = path_patched(replica, task, own, edge, EVERYWHERE).mean()
            assert data["score"] == pytest.approx(float(expected), abs=1e-5), edge


def test_chosen_edges_by_position(tiny: Any) -> None:
    task = random_task(tiny, pairs=2, length=4)
    kv = "L2KV1" if tiny.cfg.n_key_value_heads == 2 else "L2H1"
    asked = [
        ("embed", f"{kv}.k"),
        ("L0H1", "L2H3.q"),
        ("L1.mlp", "L2.mlp.in"),
        ("L2H0", "logits.in"),
    ]
    effects = patch(tiny, task, level="edge", edges=asked, positions=True, progress=False)
    assert effects.edges is not None
    replica = Replica(tiny, GRADIENT)
    measured = ~effects.edges.isnan() & (effects.edges != 0)
    for writer, reader in asked:
        w, r = effects.writers.index(writer), effects.readers.index(reader)
        for pos in range(4):
            with torch.no_grad():
                expected = path_patched(replica, task, "corrupt", (writer, reader), pos).mean()
            assert float(effects.edges[pos, w, r]) == pytest.approx(float(expected), abs=1e-5)
        measured[:, w, r] = False
    assert not bool(measured.any())
    assert (
        int(effects.edges[0].isnan().sum())
        == size(assemble(attribute(tiny, task, level="edge"))) - 4
    )
    with pytest.raises(ValueError, match=r"got \('L2H0', 'L1\.mlp\.in'\); see Scores\.writers"):
        patch(tiny, task, level="edge", edges=[("L2H0", "L1.mlp.in")])
    with pytest.raises(ValueError, match="got the other one with level='node'"):
        patch(tiny, task, edges=asked)


def test_edges_of_parallel_blocks(tmp_path: Path) -> None:
    """Attention and MLP read one stream: an MLP hears the heads of earlier blocks alone."""
    vocabulary = save_tokenizer(tmp_path)
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, bos_token_id=0, eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    model = boot(tmp_path)
    task = random_task(model, pairs=2, length=4)
    effects = patch(model, task, level="edge", progress=False)
    assert effects.edges is not None
    table = dict(zip(effects.writers, effects.edges, strict=True))
    column = {r: i for i, r in enumerate(effects.readers)}
    assert bool((table["L1H2"][: column["logits.in"]] == 0).all())
    with pytest.raises(ValueError, match=r"got \('L1H2', 'L1\.mlp\.in'\)"):
        patch(model, task, level="edge", edges=[("L1H2", "L1.mlp.in")])

    block, streams, added = model.blocks[1], [], []
    handles = [
        block.hook_in.register_forward_hook(lambda *a: streams.append(a[2])),
        model.blocks[0].mlp.hook_out.register_forward_hook(lambda *a: added.append(a[2])),
    ]
    with torch.no_grad():
        before = task.metric(model(task.corrupt))
        model(task.clean)
        for handle in handles:
            handle.remove()
        stream = streams[0] + added[1] - added[0]
        into_mlp, keys = block.ln2(stream), block.attn.k(block.ln1(stream))
        for reader, point, new, part in (
            ("L1.mlp.in", block.mlp.hook_in, into_mlp, EVERYWHERE),
            ("L1H2.k", block.attn.k.hook_out, keys, slice(16, 24)),
        ):

            def write(_: Any, __: Any, value: Tensor, new: Any = new, part: Any = part) -> Tensor:
                value = value.clone()
                value[..., part] = new[..., part]
                return value

            handle = point.register_forward_hook(write)
            expected = (task.metric(model(task.corrupt)) - before).mean()
            handle.remove()
            found = float(table["L0.mlp"][column[reader]])
            assert found == pytest.approx(float(expected), abs=1e-6)


# -- long sweeps -----------------------------------------------------------------------------------


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    inner, done = Rerun.__call__, []

    def call(self: Rerun, *args: Any, **kwargs: Any) -> Tensor:
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(1)
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(Rerun, "__call__", call)


@pytest.mark.parametrize("level", ["node", "edge"])
def test_an_interrupted_sweep_goes_on(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    task, file = random_task(tiny, pairs=3, length=4), tmp_path / "sweep.safetensors"
    arguments: dict[str, Any] = {"level": level, "batch_size": 6, "progress": False}
    arguments |= {"components": ["head"]} if level == "node" else {"edges": some_edges(tiny)}
    whole = patch(tiny, task, **arguments)
    with monkeypatch.context() as patched:
        interrupt(patched, after=3)
        with pytest.raises(KeyboardInterrupt) as stop:
            patch(tiny, task, resume=file, **arguments)
    with safe_open(str(file), framework="pt") as kept:
        done = ~kept.get_tensor("effects").isnan()
    assert 0 < int(done.sum()) < done.numel()
    assert str(stop.value) == (
        f"interrupted: {int(done.sum())} of {done.numel()} effects are kept in {str(file)!r}; make "
        "the same call again, with this `resume`, to go on"
    )
    with monkeypatch.context() as patched:
        interrupt(patched, after=1)
        with pytest.raises(KeyboardInterrupt, match="nothing is kept; give `resume="):
            patch(tiny, task, **arguments)
    resumed = patch(tiny, task, resume=file, **arguments)
    name = f"{level}s"
    torch.testing.assert_close(getattr(resumed, name), getattr(whole, name), equal_nan=True)
    with monkeypatch.context() as patched:
        interrupt(patched, after=0)
        again = patch(tiny, task, resume=file, **arguments)
    assert torch.equal(getattr(again, name).nan_to_num(), getattr(resumed, name).nan_to_num())
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


def some_edges(model: Any) -> list[tuple[str, str]]:
    last = "L2KV0" if model.cfg.n_key_value_heads == 2 else "L2H0"
    return [(f"L{i}H{h}", f"{last}.v") for i in range(2) for h in range(4)]


def test_the_file_of_another_sweep_is_refused(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "sweep.safetensors"
    task = random_task(tiny, pairs=2, length=3)

    def sweep(task: Task = task, **arguments: Any) -> Effects:
        arguments = {"components": ["mlp"], **arguments}
        return patch(tiny, task, resume=file, progress=False, **arguments)

    sweep()
    with pytest.raises(ValueError, match=r"differs in direction: 'denoise', now 'noise'; choose"):
        sweep(direction="noise")
    with pytest.raises(ValueError, match="differs in ablation"):
        sweep(ablation="zero")
    with pytest.raises(ValueError, match="differs in prompts"):
        sweep(random_task(tiny, pairs=2, length=3, seed=1))
    with pytest.raises(ValueError, match="differs in metric"):
        sweep(task.with_metric("probability_difference"))
    weight = tiny.blocks[2].attn.o.original_component.weight  # [d_in, d_out], or the other way
    with torch.no_grad():
        before, rows = weight.clone(), weight.shape[0] // 4
        weight[: 2 * rows] = weight[: 2 * rows].roll(rows, 0)  # the same numbers elsewhere
        with pytest.raises(ValueError, match="differs in weights"):
            sweep()
        weight.copy_(before)
    with (
        tiny.hooks(fwd_hooks=[("blocks.1.hook_out", lambda act, hook: 1.5 * act)]),
        pytest.raises(ValueError, match="the metric of its runs is another now"),
    ):
        sweep()
    with monkeypatch.context() as other:
        older = {"torch": "0.0"}
        other.setattr("relp.bridge.source.version", lambda name: older.get(name, "1"))
        versions.cache_clear()
        with pytest.raises(ValueError, match=r"in versions: '.*torch 2.*', now '.*torch 0\.0"):
            sweep()
    monkeypatch.setattr("relp.bridge.source.LIBRARIES", ("relp-that-is-a-checkout",))
    versions.cache_clear()
    with pytest.raises(ValueError, match=r"now 'relp-that-is-a-checkout not installed'"):
        sweep()
    monkeypatch.undo()
    versions.cache_clear()
    sweep(random_task(tiny, pairs=2, length=3)).save(file)
    with pytest.raises(ValueError, match="must be a file that an interrupted sweep wrote"):
        sweep()
    with pytest.raises(ValueError, match=r"must be a \.safetensors file; got 'sweep\.pt'"):
        patch(tiny, task, resume="sweep.pt")
    with pytest.raises(FileNotFoundError, match="must lie in an existing folder"):
        patch(tiny, task, resume=tmp_path / "none" / "sweep.safetensors", progress=False)


def bars(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What a bar showed, step by step."""
    return [part for part in re.split(r"[\r\n]", capsys.readouterr().err) if "exact" in part]


def test_the_bar_counts_what_will_run(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what changes nothing: half of the positions here, nor what was measured before."""
    task = random_task(tiny, pairs=2, length=6)
    corrupt = torch.cat([task.clean[:, :3], task.corrupt[:, 3:]], 1)
    task = Task.from_tokens(task.clean, corrupt, task.answers, task.foils)
    shown: list[tuple[int, int]] = []
    inner = Progress.advance

    def advance(self: Any, work: int, runs: int) -> None:
        inner(self, work, runs)
        shown.append((self._bar.n, self._bar.total))

    monkeypatch.setattr(Progress, "advance", advance)
    file = tmp_path / "sweep.safetensors"
    arguments: dict[str, Any] = {"components": ["resid"], "batch_size": 2, "resume": file}
    with monkeypatch.context() as patched:
        interrupt(patched, after=4)
        with pytest.raises(KeyboardInterrupt):
            patch(tiny, task, **arguments)
    # Positions 3, 4 and 5 of blocks 0, 1 and 2: what is run is 3, 2 and 1 positions, of 4, 3 and 2
    # blocks, the unembedding counted as one; times two pairs.
    whole = 2 * (3 + 2 + 1) * (4 + 3 + 2)
    assert [total for _, total in shown] == [whole] * 4
    assert [n for n, _ in shown] == [2 * 4 * 1, 2 * 4 * 3, 2 * 4 * 6, 2 * (4 * 6 + 3 * 1)]
    done = shown[-1][0]
    shown.clear()
    patch(tiny, task, **arguments)
    assert {total for _, total in shown} == {whole - done} == {shown[-1][0]}
    assert len(shown) == 9 - 4


def test_slow_sweeps_say_so_once(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    task = random_task(tiny, pairs=4, length=4).with_metric(mean_spread)
    patch(tiny, task, components=["L1.mlp"], batch_size=1)
    said = [line for line in bars(capsys) if "all positions" in line]
    assert said == [
        "exact effects: each run is of all positions, because the metric 'mean_spread' may read "
        "all positions; it takes 2 to 3 times as long as one from the change on"
    ]
    patch(tiny, task, components=["L1.mlp"], progress=False)
    patch(tiny, random_task(tiny), components=["L1.mlp"])
    assert not any("all positions" in line for line in bars(capsys))


@on("tiny", "llama", "gpt2")
def test_smaller_batches_when_memory_runs_out(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task = random_task(tiny, pairs=3, length=4)
    expected = patch(tiny, task, components=["head"], progress=False)
    inner, sizes = Rerun.__call__, []

    def call(self: Rerun, *args: Any, copies: int, **kwargs: Any) -> Tensor:
        sizes.append(copies * len(self.task))
        if sizes[-1] > 4:  # as many last positions as one prompt has
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return inner(self, *args, copies=copies, **kwargs)

    monkeypatch.setattr(Rerun, "__call__", call)
    found = patch(tiny, task, components=["head"], batch_size=12, progress=False)
    assert found.nodes is not None and expected.nodes is not None
    torch.testing.assert_close(found.nodes, expected.nodes)
    assert max(sizes) == 12 and sizes[-1] <= 4


def mean_spread(logits: Tensor) -> Tensor:
    return logits.float().std(-1).mean(1)


@pytest.mark.parametrize("metric", ["probability_difference", mean_spread])
def test_metrics_that_read_all_tokens_or_all_positions(tiny: Any, metric: Any) -> None:
    task = random_task(tiny, pairs=2, length=4).with_metric(metric)
    effects = patch(tiny, task, components=["attn"], progress=False)
    assert effects.nodes is not None
    for row, name in enumerate(effects.components):
        for pos in (1, 3):
            expected = plainly(tiny, task, name, pos, "corrupt")
            torch.testing.assert_close(effects.nodes[:, row, pos], expected, rtol=1e-4, atol=1e-5)


def test_hooks_behind_the_unembedding_that_mix_tokens(tiny: Any) -> None:
    """Of a logit difference it computes few tokens: not if all of them come together later."""
    task = random_task(tiny, pairs=2, length=4)
    handle = tiny.unembed.hook_out.register_forward_hook(lambda _, __, x: 99 * x.softmax(-1))
    try:
        effects = patch(tiny, task, components=["L1.attn"], progress=False)
        assert effects.nodes is not None
        for pos in (1, 3):
            expected = plainly(tiny, task, "L1.attn", pos, "corrupt")
            torch.testing.assert_close(effects.nodes[:, 0, pos], expected, rtol=1e-4, atol=1e-5)
    finally:
        handle.remove()


@pytest.mark.parametrize("at", [slice(1, 2), 2])
def test_hooks_at_one_position_stay_there(tiny: Any, at: Any) -> None:
    """Also where a run would begin later, or see but one position."""

    def steer(_: nn.Module, __: Any, value: Tensor) -> Tensor:
        value = value.clone()
        value[:, at] *= -3
        return value

    task = random_task(tiny, pairs=2, length=5)
    handle = tiny.blocks[1].mlp.hook_out.register_forward_hook(steer)
    try:
        effects = patch(tiny, task, components=["attn"], progress=False)
        assert effects.nodes is not None
        for row, name in enumerate(effects.components):
            for pos in range(5):
                expected = plainly(tiny, task, name, pos, "corrupt")
                found = effects.nodes[:, row, pos]
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    finally:
        handle.remove()


def test_hooks_still_fire_after_patching_also_after_an_error(tiny: Any) -> None:
    task = random_task(tiny)
    calls = []

    def fragile(logits: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 3:
            raise KeyError("no more")
        return logits[:, -1, 0]

    with pytest.raises(KeyError, match="no more"):
        patch(tiny, task.with_metric(fragile), components=["L2.mlp"], progress=False)
    fired = []
    names = [f"blocks.{i}.attn.hook_z" for i in range(len(tiny.blocks))]
    tiny.run_with_hooks(task.clean, fwd_hooks=[(n, lambda v, hook: fired.append(1)) for n in names])
    assert len(fired) == len(names)


def test_agreement_is_numpys_and_perfect_with_itself(tiny: Any) -> None:
    task = random_task(tiny)
    scores = attribute(tiny, task, rules=GRADIENT)
    effects = patch(tiny, task, progress=False)
    table = agreement([scores, effects], effects).set_index(["rules", "kind"])
    for kind in effects.kinds():
        row = table.loc[("exact", kind)]
        assert row["pearson"] == pytest.approx(1)
        assert row["spearman"] == pytest.approx(1)
        assert row["relative_error"] == 0
        assert row["pairs"] == len(task)
    _, x = scores.of_kind("mlp")
    _, y = effects.of_kind("mlp")
    rows = [torch.stack([a.flatten(), b.flatten()]) for a, b in zip(x, y, strict=True)]
    rs = [torch.corrcoef(r)[0, 1] for r in rows]
    errors = [(r[0] - r[1]).norm() / r[1].norm() for r in rows]
    row = table.loc[("GRADIENT", "mlp")]
    assert row["pearson"] == pytest.approx(float(torch.stack(rs).mean()), abs=1e-5)
    assert row["relative_error"] == pytest.approx(float(torch.stack(errors).mean()), abs=1e-5)
    noise = patch(tiny, task, components=["mlp"], direction="noise", progress=False)
    with pytest.raises(ValueError, match="must be of the same direction; got 'denoise' and"):
        agreement(scores, noise)
    others = attribute(tiny, random_task(tiny, seed=9))
    with pytest.raises(ValueError, match="must be of the same pairs; their 'clean' differ"):
        agreement(others, effects)
    edges = attribute(tiny, task, level="edge")
    with pytest.raises(ValueError, match="must be of the same level; got 'edge' and 'node'"):
        agreement(edges, effects)


@pytest.mark.parametrize("positions", [False, True])
def test_all_edges_are_faithful_and_none_are_not(shipped: Any, positions: bool) -> None:
    task = ioi(shipped.tokenizer, pairs=2, seed=0)
    graph = assemble(attribute(shipped, task, level="edge", positions=positions))
    empty = top(graph, edges=0)
    assert faithfulness(shipped, task, graph) == pytest.approx(1, abs=1e-4)
    assert faithfulness(shipped, task, empty) == pytest.approx(0, abs=1e-6)


def heard_by(circuit: Any) -> dict[tuple[str, int], set[str]]:
    found: dict[tuple[str, int], set[str]] = {}
    for u, _, _, data in real_edges(circuit):
        found.setdefault((data["reader"], data["pos"]), set()).add(u)
    return found


@pytest.mark.parametrize("positions", [False, True])
def test_circuits_equal_a_slow_run_reader_by_reader(tiny: Any, positions: bool) -> None:
    """The replica gives every reader its own residual stream, in float64."""
    task = able_task(tiny, pairs=2, length=5)
    scores = attribute(tiny, task, rules=RELP, level="edge", positions=positions)
    graph = assemble(scores)
    circuits = [top(graph, edges=size(graph) * share // 10) for share in (1, 3, 6)]
    found = faithfulness(tiny, task, circuits, progress=False)
    assert isinstance(found, list)
    replica = Replica(tiny, GRADIENT)
    with torch.no_grad():
        clean, corrupt = replica.run(task.clean), replica.run(task.corrupt)
        full, none = task.metric(clean.logits).mean(), task.metric(corrupt.logits).mean()
        for circuit, share in zip(circuits, found, strict=True):
            expected = float((alone(replica, task, circuit) - none) / (full - none))
            assert share == pytest.approx(expected, abs=1e-4)


def alone(replica: Replica, task: Task, circuit: Any) -> Tensor:
    heard = heard_by(circuit)
    corrupt = replica.run(task.corrupt)
    now: dict[str, Tensor] = {}

    def read(reader: str, residual: Tensor) -> Tensor:
        component = Component.of_reader(reader)[0]
        if component.kind == "logits":
            x = corrupt.sites["final"].clone()
        elif component.kind == "mlp":
            x = corrupt.sites[f"L{component.layer}.mid"].clone()
        else:
            x = corrupt.sites[f"L{component.layer}.resid"].clone()
        for (name, pos), writers in heard.items():
            at = slice(None) if pos < 0 else slice(pos, pos + 1)
            for writer in writers if name == reader else ():
                x[:, at] += now[writer][:, at] - corrupt.writers[writer][:, at]
        return x

    return task.metric(replica.run(task.clean, read=read, writers=now).logits).mean()


def test_hooks_that_faithfulness_would_overwrite_are_noticed(tiny: Any) -> None:
    task = random_task(tiny)
    graph = assemble(attribute(tiny, task, level="edge"))
    point = tiny.blocks[1].attn.v.hook_out
    handle = point.register_forward_hook(lambda _, __, value: value * 3)
    try:
        with pytest.raises(RuntimeError, match="all edges together must give the clean run"):
            faithfulness(tiny, task, graph)
    finally:
        handle.remove()


def test_circuits_by_position_need_prompts_of_their_length(tiny: Any) -> None:
    graph = assemble(attribute(tiny, random_task(tiny, length=6), level="edge", positions=True))
    with pytest.raises(ValueError, match="is not one of"):
        faithfulness(tiny, random_task(tiny, length=5), graph)


def test_signed_circuits_help_in_either_direction(shipped: Any) -> None:
    task = ioi(shipped.tokenizer, pairs=4, seed=0)
    for direction in ("denoise", "noise"):
        graph = assemble(attribute(shipped, task, level="edge", direction=direction))
        circuit = top(graph, edges=size(graph) // 5, signed=True)
        assert faithfulness(shipped, task, circuit) > 0.8


def test_wrong_circuits_are_refused(tiny: Any) -> None:
    task = random_task(tiny)
    graph = assemble(attribute(tiny, task, level="edge"))
    same = task.with_metric(lambda logits: logits[:, -1, 0] * 0)
    with pytest.raises(ValueError, match="needs a metric that differs"):
        faithfulness(tiny, same, graph)
    graph.add_edge("L2.mlp", "L0.mlp", key="in", reader="L0.mlp.in", score=1.0, slot="in",
                   structural=False, pos=-1)  # fmt: skip
    with pytest.raises(ValueError, match=r"'L2\.mlp' -> 'L0\.mlp\.in' is not one of 'tiny-"):
        faithfulness(tiny, task, graph)
