"""How much runs at once, and what happens when memory runs out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_task
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import relp.attribution
from circuits.cli import app
from relp import DEEPLIFT, GRADIENT, PARTWAY, PRESETS, RELP, Rules, attribute, plan
from relp.bridge.capture import Capture
from relp.bridge.captures import capture, captures, needed
from relp.bridge.live import Live
from relp.bridge.memory import Need, attribution_plan
from relp.bridge.room import Room
from relp.bridge.run import precise_logits
from relp.bridge.sites import Sites
from relp.bridge.stream import reader_sites, stream_sites
from relp.nodes import node_sites
from tasks import zoo
from tasks.zoo.outline import outline

GB = 10**9
EVERY = list(PRESETS.values())


def sites_of(model: Any, level: str) -> tuple[Sites, tuple[str, ...], tuple[str, ...]]:
    sites = Sites.of(model)
    if level == "node":
        return sites, node_sites(sites), node_sites(sites)
    return sites, stream_sites(sites), reader_sites(sites)


# -- counting --------------------------------------------------------------------------------------


def test_live_bytes_come_and_go() -> None:
    known = torch.ones(100)
    with Live([known]) as live:
        a = known.view(10, 10)
        assert live.now == 0
        b = a + 1
        c = b[:5]  # no more of its own
        assert live.now == 400
        before = live.begin()
        d = b * c.sum()
        assert (live.now, before) == (800, 400) and live.peak >= 800
        del b, d
        assert live.now == 400  # what `c` is a part of
        del c
        assert live.now == 0


def test_numbers_that_are_missing_are_zero() -> None:
    with Live() as live:
        a = torch.zeros(3, device="meta")
        assert float(a.sum()) == 0 and bool((a > 1).all()) and torch.equal(a, a + 1)
        assert live.now == 12


@pytest.mark.parametrize("level", ["node", "edge"])
@pytest.mark.parametrize("rules", [RELP, DEEPLIFT, PARTWAY], ids=lambda r: r.name)
def test_what_blocks_take_is_what_runs_take(tiny: Any, rules: Rules, level: str) -> None:
    sites, names, at = sites_of(tiny, level)
    task = random_task(tiny, pairs=1, length=40)
    need = needed(sites, task, rules=rules, names=names, coefficients=at, own="corrupt")
    for blocks, expected in ((None, need.whole), (1, need.block)):
        with Live((*tiny.parameters(), *tiny.buffers())) as live:
            seen = capture(sites, task, rules, names, own="corrupt", coefficients=at, blocks=blocks)
            after = live.now
        assert live.peak == pytest.approx(expected, rel=0.2, abs=1e5), blocks
        assert after == pytest.approx(need.kept, rel=0.2, abs=1e5)
        del seen


@pytest.mark.parametrize("name", ["ioi-gpt2", "ioi-llama"])
def test_an_outline_takes_what_the_model_takes(name: str) -> None:
    model, shapes = zoo.load(name), outline(name)
    assert all(t.is_meta for t in (*shapes.parameters(), *shapes.buffers()) if t.dim() > 1)
    task, room = random_task(model, pairs=4, length=12), Room(GB, paced=True)
    for level in ("node", "edge"):
        one, other = (plan(m, task, level=level, room=room) for m in (model, shapes))
        assert (one.pairs, one.blocks) == (other.pairs, other.blocks)
        assert one.bytes == pytest.approx(other.bytes, rel=0.2)


def test_a_model_of_one_block_has_needs_too(llama_folder: Path) -> None:
    config = LlamaConfig.from_pretrained(llama_folder, num_hidden_layers=1)
    inner = LlamaForCausalLM(config).eval()
    model = TransformerBridge.boot_transformers(str(llama_folder), device="cpu", hf_model=inner)
    room = Room(GB, paced=True)
    assert plan(model.eval(), random_task(model, pairs=2), room=room).bytes > 0


# -- block by block --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "level"),
    [*((rules, "edge") for rules in EVERY), (RELP, "node"), (DEEPLIFT, "node"), (PARTWAY, "node")],
    ids=lambda value: getattr(value, "name", value),
)
def test_block_by_block_the_numbers_are_the_same(tiny: Any, rules: Rules, level: str) -> None:
    sites, names, at = sites_of(tiny, level)
    task = random_task(tiny, pairs=2, length=5)
    whole, parts = (
        capture(sites, task, rules, names, own="clean", coefficients=at, blocks=blocks)
        for blocks in (None, 1)
    )
    for table in ("own", "other", "coefficients", "slopes"):
        one, two = getattr(whole, table), getattr(parts, table)
        assert one.keys() == two.keys()
        for site, value in one.items():
            scale = float(value.abs().max())
            torch.testing.assert_close(two[site], value, rtol=1e-5, atol=1e-6 * max(scale, 1))
    torch.testing.assert_close(parts.own_metric, whole.own_metric)
    assert parts.rules == whole.rules


@pytest.mark.parametrize("path", ["inputs", "activations"])
def test_paths_block_by_block(tiny: Any, path: str) -> None:
    sites, names, at = sites_of(tiny, "node")
    task = random_task(tiny, pairs=2, length=4)

    def seen(blocks: int | None) -> list[Capture]:
        return list(
            captures(sites, task, GRADIENT, names, own="corrupt", steps=2, path=path,
                     coefficients=at, blocks=blocks)
        )  # fmt: skip

    for one, two in zip(seen(None), seen(1), strict=True):
        for site, value in one.coefficients.items():
            torch.testing.assert_close(two.coefficients[site], value, rtol=1e-4, atol=1e-6)


def test_rules_for_some_modules_attach_in_any_block(tiny: Any) -> None:
    sites, names, at = sites_of(tiny, "node")
    task = random_task(tiny, pairs=1, length=3)
    last = len(sites.blocks) - 1
    there = RELP.at(f"blocks.{last}.*", softmax="constant")
    one, two = (
        capture(sites, task, there, names, own="clean", coefficients=at, blocks=b)
        for b in (None, 1)
    )
    torch.testing.assert_close(two.coefficients["L0.resid"], one.coefficients["L0.resid"])


def test_blocks_that_hand_on_more_than_the_stream_are_refused(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites, names, at = sites_of(tiny, "node")
    task = random_task(tiny, pairs=1, length=3)
    count = iter(range(100))
    # what another run of the same block would not give
    handle = tiny.blocks[0].register_forward_hook(
        lambda _, __, out: (
            (out[0] + next(count), *out[1:]) if isinstance(out, tuple) else out + next(count)
        )
    )
    with handle, pytest.raises(RuntimeError, match="must depend on the residual stream alone; bl"):
        capture(sites, task, GRADIENT, names, own="clean", coefficients=at, blocks=1)


# -- plans -----------------------------------------------------------------------------------------


def test_plans_fit_the_room() -> None:
    sites = Sites.of(outline("ioi-llama"))
    task = random_task(sites.model, pairs=6, length=8)
    need = Need(whole=100 << 20, block=30 << 20, away=10 << 20, more=5 << 20, kept=20 << 20)

    def made(left: int, *, paced: bool, **options: Any) -> tuple[int, int | None, int]:
        found = attribution_plan(
            sites, task, lambda _: need, room=Room(left << 20, paced=paced), **options
        )
        return found.pairs, found.blocks, found.bytes >> 20

    assert made(10_000, paced=True) == (6, None, 600)  # what a CPU is fastest with
    assert made(250, paced=False) == (2, None, 200)
    assert made(110, paced=True) == (1, 6, 55)  # of 88, all blocks together would be 130
    assert made(20, paced=False) == (1, 2, 15)  # what is captured is in the machine's memory
    assert made(1, paced=False) == (1, 1, 10)  # it may fit after all
    assert made(10_000, paced=True, batch_size=3, work=300 << 20) == (3, None, 360)


def test_small_tasks_are_not_looked_at(tiny: Any) -> None:
    def asked(_: Any) -> Need:
        raise AssertionError

    task = random_task(tiny, pairs=3, length=4)
    assert attribution_plan(Sites.of(tiny), task, asked).note == "3 at a time"


# -- memory runs out -------------------------------------------------------------------------------


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int | None]]:
    """Captures of more than one pair, and of the whole graph, do not fit; what was tried."""
    tried: list[tuple[int, int | None]] = []

    def seen(sites: Any, task: Any, *args: Any, blocks: Any, **kwargs: Any) -> Iterator[Capture]:
        tried.append((len(task), blocks))
        for number, found in enumerate(captures(sites, task, *args, blocks=blocks, **kwargs)):
            if (len(task) > 1 and number > 0) or blocks is None:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            yield found

    monkeypatch.setattr(relp.attribution, "captures", seen)
    return tried


@pytest.mark.parametrize("level", ["node", "edge"])
def test_batches_become_smaller_when_memory_runs_out(
    tiny: Any, scarce: list[tuple[int, int | None]], monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    task = random_task(tiny, pairs=3, length=4)
    found = attribute(tiny, task, rules=GRADIENT, level=level, steps=3, progress=False)
    # pairs that had one of their steps added before the batch was divided are not added twice
    assert scarce[:4] == [(3, None), (2, None), (1, None), (1, len(Sites.of(tiny).blocks) // 2)]
    monkeypatch.undo()
    expected = attribute(tiny, task, rules=GRADIENT, level=level, steps=3, progress=False)
    torch.testing.assert_close(found.table, expected.table, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.clean, expected.clean)


def test_steps_that_are_added_are_not_added_again(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = random_task(tiny, pairs=2, length=4)
    expected = attribute(tiny, task, rules=GRADIENT, steps=3, progress=False)

    def seen(sites: Any, task: Any, *args: Any, **kwargs: Any) -> Iterator[Capture]:
        for number, found in enumerate(captures(sites, task, *args, **kwargs)):
            if len(task) > 1 and number == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            yield found

    monkeypatch.setattr(relp.attribution, "captures", seen)
    found = attribute(tiny, task, rules=GRADIENT, steps=3, progress=False)
    torch.testing.assert_close(found.table, expected.table, rtol=1e-4, atol=1e-5)


def test_one_block_of_one_pair_must_fit(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(*_: Any, **__: Any) -> Iterator[Capture]:
        raise torch.OutOfMemoryError("CUDA out of memory.")
        yield

    monkeypatch.setattr(relp.attribution, "captures", seen)
    with pytest.raises(RuntimeError, match="one block of one pair.*ran out at 4 tokens; give shor"):
        attribute(tiny, random_task(tiny, pairs=2, length=4), progress=False)


def test_half_precision_keeps_no_wider_copy_of_the_unembedding() -> None:
    model = zoo.load("ioi-llama", dtype="bfloat16")
    sites, matrix = Sites.of(model), model.unembed.original_component.weight
    x = torch.randn(2, 1, matrix.shape[1], requires_grad=True)
    with precise_logits(sites), Live((*model.parameters(), *model.buffers())) as live:
        logits = model.unembed.original_component(x)
        held = live.now
    assert logits.dtype == torch.float32 and held < matrix.numel()  # a copy would be 4 times that
    (grad,) = torch.autograd.grad(logits.square().sum(), x)
    expected: Tensor = 2 * (x @ matrix.float().T) @ matrix.float()
    torch.testing.assert_close(grad, expected)


# -- the command -----------------------------------------------------------------------------------


def test_the_command_says_what_others_take() -> None:
    said = CliRunner().invoke(app, ["plan", "discover", "--tokens", "12", "--json"])
    assert said.exit_code == 0, said.output
    found = json.loads(said.stdout)
    calls = {row["call"]: row for row in found["calls"]}
    assert list(calls) == [
        "node scores, RELP", "edge scores, RELP", "exact effects of 804 cells",
        "faithfulness of a circuit",
    ]  # fmt: skip
    assert found["most"] == max(row["bytes"] for row in calls.values())
    model = zoo.load("ioi-gpt2")
    own = {p.untyped_storage().data_ptr(): p.nbytes for p in model.parameters()}
    assert found["weights"] == sum(own.values())
    assert calls["edge scores, RELP"]["runs"] == 3 * 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench"], "the command must be one of discover, compare, patch, verify; got 'bench'"),
        (["patch", "--rules", "RELPP"], "RELPP"),
        (["patch", "--dtype", "int8"], "`dtype` must be one of float32, bfloat16, float16; got"),
        (["patch", "--model", "no/such/place"], "'no/such/place' has no configuration that can be"),
    ],
)
def test_the_command_refuses_in_a_sentence(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = CliRunner().invoke(app, ["plan", *arguments])
    assert said.exit_code == 1 and message in " ".join(said.stderr.split())


def test_weights_that_do_not_fit_are_said(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(vocab_size=100_000).save_pretrained(tmp_path)
    given = ["plan", "patch", "--model", str(tmp_path / "config.json"), "--memory", "20"]
    said = CliRunner().invoke(app, given)
    assert said.exit_code == 1
    assert "the memory must hold the weights, 29.2 GB; there are 20.0 GB; give --memory" in (
        " ".join(said.stderr.split())
    )
