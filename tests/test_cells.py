"""Cells: any list of them, split, resumed, merged or measured on kept runs, is one sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import boot, ragged_task, random_task
from torch import Tensor

from circuits import patch
from circuits.exact import Cell, Runs, Sweep, measure, merge
from circuits.exact.cells import EVERYWHERE
from relp.bridge.rerun import Rerun

QUIET: dict[str, Any] = {"progress": False}


def some_cells(model: Any, *, level: str, positions: bool, length: int = 4) -> list[Cell]:
    places = range(length) if positions else [EVERYWHERE]
    kv = "L2KV1" if model.cfg.n_key_value_heads == 2 else "L2H1"
    named = {
        "node": [("embed", ""), ("L0H1", ""), ("L1.mlp", ""), ("L1N3", ""), ("L2.resid", "")],
        "edge": [("embed", f"{kv}.k"), ("L0H1", "L2H3.q"), ("L1.mlp", "L2.mlp.in"),
                 ("L2H0", "logits.in")],
    }[level]  # fmt: skip
    return [Cell(name, reader, pos) for name, reader in named for pos in places]


@contextmanager
def counting(patched: pytest.MonkeyPatch, owner: Any, name: str) -> Iterator[list[Any]]:
    """The calls of a method, while it does what it did."""
    calls, inner = [], getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return inner(*args, **kwargs)

    with patched.context() as here:
        here.setattr(owner, name, staticmethod(call) if owner is Rerun and name == "of" else call)
        yield calls


# -- cells -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        (Cell("L9H6"), "L9H6"),
        (Cell("L9.mlp", pos=0), "L9.mlp@0"),
        (Cell("embed", "L9KV1.k"), "embed>L9KV1.k"),
        (Cell("L5H5", "logits.in", 14), "L5H5>logits.in@14"),
    ],
)
def test_a_cell_is_its_name(cell: Cell, name: str) -> None:
    assert str(cell) == name and Cell.parse(name) == cell
    assert hash(Cell.parse(name)) == hash(cell)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cell("L9H6.q"), "a component must be named like embed, L9H6, .*; got 'L9H6.q'"),
        (lambda: Cell("L9H6", "L9H7"), "a reader must end in one of .*; got 'L9H7'; write for"),
        (lambda: Cell("L9KV1"), "a cell's `component` must be one of the kinds .*; got 'L9KV1'; "),
        (lambda: Cell("logits"), "got 'logits'; name the query heads in place of a key/value head"),
        (lambda: Cell("L9H6", pos=-2), r"must be a position from 0 on, or -1 for all .*; got -2; "),
    ],
)
def test_wrong_cells_are_refused(make: Callable[[], Cell], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_cells_that_a_model_does_not_have_are_refused(tiny: Any) -> None:
    task = random_task(tiny, pairs=2, length=4)
    for cell in (
        Cell("L3.mlp"),
        Cell("L0H4"),
        Cell("L0.mixer"),
        Cell("L0N999"),
        Cell("L2H0", "L1.mlp.in"),
        Cell("L0.resid", "L1.mlp.in"),
        Cell("L0H0", "L1H0.in"),
    ):
        with pytest.raises(ValueError, match=f"of 'tiny-.*'; got '{cell}'; see the components"):
            measure(tiny, task, [Cell("embed"), cell], **QUIET)
    with pytest.raises(ValueError, match="below the length of the longest prompt, 4; got 'embed@4"):
        measure(tiny, task, [Cell("embed", pos=4)], **QUIET)
    assert measure(tiny, task, [], **QUIET).effects.shape == (2, 0)


# -- sweeps ----------------------------------------------------------------------------------------


def test_a_sweep_is_asked_by_cell(tiny: Any) -> None:
    task = random_task(tiny, pairs=2, length=4)
    expected = patch(tiny, task, components=["L0H1", "L1.mlp"], **QUIET)
    assert expected.nodes is not None
    cells = [Cell("L1.mlp", pos=2), Cell("L0H1", pos=3), Cell("L1.mlp", pos=2)]
    sweep = measure(tiny, task, cells, **QUIET)
    assert sweep.cells == tuple(cells[:2])
    torch.testing.assert_close(sweep[cells[0]], expected.nodes[:, 1, 2])
    torch.testing.assert_close(sweep[cells[1]], expected.nodes[:, 0, 3])
    with pytest.raises(KeyError, match="'L0H1' is none of its 2; see `cells`, or measure it too"):
        sweep[Cell("L0H1")]


def test_a_hundred_thousand_cells_are_a_small_file(tmp_path: Path) -> None:
    cells = tuple(
        Cell(f"L{i}H{h}", pos=p) for i in range(20) for h in range(50) for p in range(100)
    )
    sweep = Sweep({"model": "m"}, cells, torch.randn(1, len(cells)), *torch.zeros(3, 1))
    sweep.save(tmp_path / "sweep.safetensors")
    assert (tmp_path / "sweep.safetensors").stat().st_size < 4 * len(cells) + 11 * len(cells)
    found = Sweep.load(tmp_path / "sweep.safetensors")
    assert found.cells == cells and torch.equal(found.effects, sweep.effects)
    assert found.identity == sweep.identity


def test_a_file_may_be_of_other_cells(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known ones are taken over, new ones run, and those that were not asked for stay."""
    task, file = random_task(tiny, pairs=2, length=4), tmp_path / "sweep.safetensors"
    arguments: dict[str, Any] = {"resume": file, "batch_size": 2, **QUIET}
    cells = some_cells(tiny, level="node", positions=True)
    expected = measure(tiny, task, cells, batch_size=2, **QUIET)
    measure(tiny, task, cells[:12], **arguments)
    later = cells[:7:-1]
    with counting(monkeypatch, Rerun, "__call__") as runs:
        found = measure(tiny, task, later, **arguments)
    new = [cell for cell in later if cell not in cells[:12]]
    assert 0 < len(runs) <= len(new)
    assert found.cells == tuple(later)
    torch.testing.assert_close(found.effects, expected.of(later).effects, rtol=1e-5, atol=1e-6)
    kept = Sweep.load(file)
    assert kept.cells[: len(later)] == found.cells and set(kept.cells) == set(cells)
    torch.testing.assert_close(kept.of(cells).effects, expected.effects, rtol=1e-5, atol=1e-6)
    with counting(monkeypatch, Rerun, "__call__") as runs:
        measure(
            tiny, task, [cells[0], *some_cells(tiny, level="edge", positions=False)], **arguments
        )
    assert runs and len(Sweep.load(file).cells) == len(cells) + 4


# -- shards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("level", ["node", "edge"])
def test_any_split_gives_the_same_numbers(
    tiny: Any, tmp_path: Path, level: str, positions: bool
) -> None:
    task = ragged_task(tiny)
    cells = some_cells(tiny, level=level, positions=positions)
    whole = measure(tiny, task, cells, batch_size=6, **QUIET)
    order = torch.randperm(len(cells), generator=torch.Generator().manual_seed(0)).tolist()
    cut, files = len(cells) // 3, [tmp_path / f"{i}.safetensors" for i in range(3)]
    for file, part in zip(files, (order[:cut], order[cut:], order[: cut + 2]), strict=True):
        measure(tiny, task, [cells[i] for i in part], resume=file, batch_size=6, **QUIET)
    merged = merge(*files[:2], into=tmp_path / "whole.safetensors").of(cells)
    torch.testing.assert_close(merged.effects, whole.effects, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged.resolution, whole.resolution)
    assert torch.equal(merged.clean, whole.clean) and torch.equal(merged.corrupt, whole.corrupt)
    again = merge(*map(Sweep.load, files), str(tmp_path / "whole.safetensors"))
    assert torch.equal(again.of(cells).effects, merged.effects)


@pytest.mark.parametrize("level", ["node", "edge"])
def test_a_split_into_the_same_batches_gives_the_same_bits(tiny: Any, level: str) -> None:
    """Cells of two blocks never share a batch."""
    task = random_task(tiny, pairs=2, length=4)
    readers = {"node": [""] * 2, "edge": ["L1.mlp.in", "L2.mlp.in"]}[level]
    shards = [
        [Cell(f"L{layer}H{h}", reader, pos) for h in range(4) for pos in range(4)]
        for layer, reader in enumerate(readers)
    ]
    whole = measure(
        tiny, task, [cell for pair in zip(*shards, strict=True) for cell in pair], **QUIET
    )
    merged = merge(*(measure(tiny, task, shard, **QUIET) for shard in shards))
    assert len(merged.cells) == 32 and bool(merged.effects.any())
    assert torch.equal(merged.of(whole.cells).effects, whole.effects)


def test_patch_goes_on_from_what_was_merged(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, whole = random_task(tiny, pairs=2, length=4), tmp_path / "whole.safetensors"
    for kind in ("head", "mlp"):
        file = tmp_path / f"{kind}.safetensors"
        patch(tiny, task, components=[kind], resume=file, **QUIET)
    merge(tmp_path / "head.safetensors", tmp_path / "mlp.safetensors", into=whole)
    expected = patch(tiny, task, components=["head", "mlp"], **QUIET)
    with counting(monkeypatch, Rerun, "__call__") as runs:
        found = patch(tiny, task, components=["head", "mlp"], resume=whole, **QUIET)
    assert not runs and found.components == expected.components
    torch.testing.assert_close(found.nodes, expected.nodes, rtol=1e-5, atol=1e-6)


def test_unfinished_shards_complete_each_other_and_others_are_refused(
    tiny: Any, tmp_path: Path
) -> None:
    task = random_task(tiny, pairs=2, length=4)
    cells = [Cell("L1.mlp", pos=pos) for pos in range(4)]
    one = measure(tiny, task, cells, **QUIET)
    half = Sweep(one.identity, one.cells, one.effects.clone(), one.clean.clone(), one.corrupt,
                 one.resolution)  # fmt: skip
    half.effects[1] = half.clean[1] = torch.nan
    assert torch.equal(merge(half, one).effects, one.effects)
    assert torch.equal(merge(half, one).clean, one.clean)
    noise = measure(tiny, task, cells, direction="noise", **QUIET)
    with pytest.raises(ValueError, match="they differ in direction: 'denoise' and 'noise'; keep"):
        merge(one, noise)
    with tiny.hooks(fwd_hooks=[("blocks.1.hook_out", lambda act, hook: 1.5 * act)]):
        steered = measure(tiny, task, cells, **QUIET)
    with pytest.raises(ValueError, match=r"their clean differ by up to [\d.]+; measure"):
        merge(one, steered)
    half.effects[0] += 1
    with pytest.raises(ValueError, match="their effects differ by up to 1; measure one of them"):
        merge(one, half)
    with pytest.raises(ValueError, match="`parts` must be sweeps or their files; got none"):
        merge()
    with pytest.raises(ValueError, match=r"`into` must be a \.safetensors file; got 'all\.pt'"):
        merge(one, into=tmp_path / "all.pt")
    (tmp_path / "no.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="a part must be a file that an interrupted sweep wrote;"):
        merge(one, tmp_path / "no.safetensors")


# -- runs that are kept ----------------------------------------------------------------------------


@pytest.mark.parametrize("ablation", ["patch", "zero", "mean_per_position"])
def test_later_lists_are_measured_on_the_same_runs(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, ablation: str
) -> None:
    task = ragged_task(tiny)
    runs = Runs(tiny, task, ablation=ablation)
    lists = [
        some_cells(tiny, level="node", positions=True)[4:8],
        some_cells(tiny, level="node", positions=True)[::2],
        some_cells(tiny, level="edge", positions=False)[1:3],
        some_cells(tiny, level="edge", positions=True)[1::3],
        some_cells(tiny, level="node", positions=False),
    ]
    with counting(monkeypatch, Rerun, "of") as made:
        found = [runs.measure(cells, batch_size=5, **QUIET) for cells in lists]
    assert len(made) == 3  # lengths
    for sweep, cells in zip(found, lists, strict=True):
        expected = measure(tiny, task, cells, ablation=ablation, batch_size=5, **QUIET)
        assert sweep.cells == tuple(cells) and sweep.identity == expected.identity
        assert torch.equal(sweep.effects, expected.effects)
        assert torch.equal(sweep.resolution, expected.resolution)


def test_a_model_that_has_changed_is_run_anew(gpt2_folder: Path) -> None:
    model = boot(gpt2_folder)
    task, cells = random_task(model, pairs=2, length=4), [Cell("L0.mlp", pos=p) for p in range(4)]
    runs, seen = Runs(model, task), []
    matrix = model.blocks[1].mlp.out.original_component.weight
    strength = [1.0]

    def same() -> None:
        found, expected = runs.measure(cells, **QUIET), measure(model, task, cells, **QUIET)
        assert torch.equal(found.effects, expected.effects)
        assert torch.equal(found.clean, expected.clean) and found.identity == expected.identity
        seen.append(found.effects)

    def scaled(_: Any, __: Any, value: Tensor) -> Tensor:
        return strength[0] * value

    same()
    with torch.no_grad():
        matrix.mul_(2.0)
    same()
    matrix.data.mul_(2.0)  # which counts as no change of it
    same()
    handle = model.blocks[1].mlp.hook_out.register_forward_hook(scaled)
    strength[0] = 3.0
    same()
    strength[0] = 4.0
    same()
    handle.remove()
    with torch.no_grad():
        matrix.mul_(0.25)
    same()
    assert torch.equal(seen[0], seen[-1])
    assert len({float(effects.abs().sum()) for effects in seen}) == len(seen) - 1
    model.train()
    with pytest.raises(ValueError, match="the model must be in eval mode"):
        runs.measure(cells, **QUIET)


def test_what_is_kept_is_bounded(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task = random_task(tiny, pairs=3, length=4)
    cells = [Cell("L2.mlp", pos=3), Cell("L2H1", pos=3)]
    every = Runs(tiny, task)
    expected = every.measure(cells, batch_size=1, **QUIET)
    held = [part.held for part in every._made[0].parts.values()]
    assert len(held) == 3
    for size, made_anew in ((sum(held), 0), (sum(held) - 1, 1), (held[0], 2), (0, 3)):
        runs = Runs(tiny, task, kept_bytes=size)
        runs.measure(cells, batch_size=1, **QUIET)
        with counting(monkeypatch, Rerun, "of") as made:
            found = runs.measure(cells, batch_size=1, **QUIET)
        assert len(made) == made_anew
        assert torch.equal(found.effects, expected.effects)
    with counting(monkeypatch, Rerun, "of") as made:
        every.measure(cells, batch_size=3, **QUIET)
    assert len(made) == 1 == len(every._made[0].parts)  # the others are gone


def test_runs_that_are_kept_make_room_when_memory_runs_out(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = random_task(tiny, pairs=2, length=4)
    runs, cells = Runs(tiny, task), [Cell("L1.mlp", pos=2)]
    expected = runs.measure(cells, **QUIET)
    inner, errors = Rerun.__call__, [torch.OutOfMemoryError("CUDA out of memory.")]

    def call(self: Rerun, *args: Any, **kwargs: Any) -> Tensor:
        if errors:
            raise errors.pop()
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(Rerun, "__call__", call)
    with counting(monkeypatch, Rerun, "of") as made:
        found = runs.measure(cells, **QUIET)
    assert len(made) == 1
    torch.testing.assert_close(found.effects, expected.effects)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"direction": "up"}, "`direction` must be 'denoise' or 'noise'; got 'up'"),
        ({"ablation": "one"}, "`ablation` must be one of"),
    ],
)
def test_wrong_runs_are_refused(tiny: Any, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Runs(tiny, random_task(tiny), **arguments)
    with pytest.raises(ValueError, match="65"):
        Runs(tiny, random_task(tiny, length=65))
