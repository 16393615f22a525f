"""Engines and shards: whoever measures, and in whatever pieces, the numbers are the same."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import able_task, altered, boot, on, ragged_task, random_task
from torch import Tensor

from circuits import acdc, evaluate, patch, verify
from circuits.engines import Engine, LocalEngine, RayEngine
from circuits.engines.local import Answers, Begin, cut
from circuits.engines.masks import metrics_by
from circuits.engines.ray import ATTEMPTS, _halves, _must_equal, _Piece
from circuits.exact import Cell, Runs, Sweep, measure, merge_effects
from circuits.exact.shards import sharded
from circuits.graph import real_edges
from circuits.judge.bench import Case, Loaded, bench
from circuits.judge.methods import METHODS
from circuits.masked import circuit_metrics
from relp import GRADIENT, RELP, Scores, attribute
from relp.bridge import Sites
from tasks import Task, zoo

QUIET: dict[str, Any] = {"progress": False}
close = partial(torch.testing.assert_close, rtol=1e-5, atol=2e-6)


class Unruly(LocalEngine):
    """Two workers that are done last things first, and in halves."""

    workers = 2

    @contextmanager
    def working(
        self, begin: Begin, model: Any = None, task: Any = None
    ) -> Iterator[Answers]:  # fmt: skip
        answer = begin(model, copy.deepcopy(task))

        def answers(pieces: Any) -> Iterator[tuple[list[Any], Any]]:
            for piece in [*pieces][::-1]:
                half = len(piece) // 2
                for some in (piece[half:], piece[:half]) if half else (piece,):
                    yield some, answer(some)

        yield answers


# -- pieces ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 50])
def test_a_list_is_cut_in_its_order_into_pieces_of_like_work(parts: int) -> None:
    generator = torch.Generator().manual_seed(parts)
    work = torch.randint(0, 9, (20,), generator=generator).tolist()
    pieces = cut(range(20), work, parts)
    assert [item for piece in pieces for item in piece] == [*range(20)] and all(pieces)
    assert len(pieces) <= parts
    amounts = [sum(work[item] for item in piece) for piece in pieces]
    assert max(amounts) <= sum(work) / parts + max(work)
    assert cut([], [], parts) == [] and cut("ab", [0, 0], parts) == [["a", "b"]]


@on("tiny", "llama", "gpt2")
@pytest.mark.parametrize("level", ["node", "edge"])
def test_patch_by_an_engine(tiny: Any, level: str) -> None:
    task = ragged_task(tiny)
    chosen: dict[str, Any] = {"components": ["head", "mlp"]} if level == "node" else {
        "edges": [("L0H1", "L2H3.q"), ("L1.mlp", "logits.in"), ("embed", "L1.mlp.in")]
    }  # fmt: skip
    for more in ({}, {"ablation": "mean", "direction": "noise"}):
        options = {"level": level, **chosen, **more, **QUIET}
        whole, found = patch(tiny, task, **options), patch(tiny, task, engine=Unruly(), **options)
        close(found.table, whole.table, equal_nan=True)
        assert found.provenance == whole.provenance
        assert torch.equal(found.clean, whole.clean) and found.resolution == whole.resolution


def test_pieces_of_the_same_batches_give_the_same_bits(tiny: Any) -> None:
    task = random_task(tiny, pairs=2, length=4)
    cells = [Cell(f"L{layer}.mlp", pos=pos) for layer in range(3) for pos in range(4)]
    whole = measure(tiny, task, cells, batch_size=2, **QUIET)
    found = measure(tiny, task, cells, batch_size=2, engine=LocalEngine(), **QUIET)
    assert torch.equal(found.effects, whole.effects)


def test_workers_keep_their_runs_and_do_not_do_again_what_is_known(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, file = random_task(tiny, pairs=2, length=4), tmp_path / "sweep.safetensors"
    cells = [Cell(name, pos=p) for name in ("L0H1", "L1.mlp", "L2H0") for p in range(4)]
    whole = measure(tiny, task, cells, **QUIET)
    measure(tiny, task, cells[:6], resume=file, **QUIET)
    measured, made, inner = [], [], Runs.measure

    def counted(self: Runs, cells: Any, **options: Any) -> Sweep:
        measured.extend(cells)
        made.append(self)
        return inner(self, cells, **options)

    runs = Runs(tiny, task)
    with monkeypatch.context() as here:
        here.setattr(Runs, "measure", counted)
        found = inner(runs, cells, resume=file, engine=Unruly(), **QUIET)
    assert set(measured) == {cell for cell in cells[6:] if whole[cell].any()}
    assert len(made) > 1 and len(set(map(id, made))) == 1
    close(found.effects, whole.effects)
    assert torch.equal(Sweep.load(file).of(cells).effects, found.effects)


def test_an_interrupted_engine_keeps_what_is_done(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, file = random_task(tiny, pairs=2, length=5), tmp_path / "sweep.safetensors"
    whole = patch(tiny, task, components=["head"], **QUIET)
    options: dict[str, Any] = {"components": ["head"], "engine": Unruly(), **QUIET}
    with monkeypatch.context() as here:
        stopped(here, after=3)
        with pytest.raises(KeyboardInterrupt, match=r"[1-9]\d* of 120 effects are kept in"):
            patch(tiny, task, resume=file, **options)
    assert 0 < int(Sweep.load(file).effects.isnan().sum()) < 120
    close(patch(tiny, task, resume=file, **options).nodes, whole.nodes)


def stopped(patched: pytest.MonkeyPatch, after: int) -> None:
    """Ctrl-C, when so many pieces are done."""
    inner, left = Sweep.take, [None] * after

    def take(self: Sweep, part: Sweep) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        inner(self, part)

    patched.setattr(Sweep, "take", take)


def test_a_worker_of_another_model_is_noticed(tiny: Any) -> None:
    task, cells = random_task(tiny, pairs=2, length=4), [Cell("L0.mlp", pos=3)]
    here = measure(tiny, task, cells, **QUIET)
    there = replace(here, clean=here.clean + 1)
    with pytest.raises(ValueError, match=r"its clean metrics differ by up to 1; let the recipe"):
        here.take(there)


# -- circuits and cases ----------------------------------------------------------------------------


@pytest.mark.parametrize("tiny", ["llama"], indirect=True)
def test_circuits_by_an_engine(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    task, sites = ragged_task(tiny), Sites.of(tiny)
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(21, 1, *sites.layout.exists.shape, generator=generator) < 0.7
    masks &= sites.layout.exists
    whole = circuit_metrics(sites, task, masks)
    for engine in (None, LocalEngine(), Unruly()):
        with metrics_by(engine, circuit_metrics, sites, task, progress=True) as metrics:
            close(metrics(masks), whole)
            close(metrics(masks[:1]), whole[:1])  # fewer circuits than workers
    assert "circuits" in capsys.readouterr().err
    with metrics_by(
        Unruly(), circuit_metrics, sites, task.select([3])
    ) as metrics:  # and fewer pairs
        close(metrics(masks), whole[:, 3:4])


@pytest.mark.parametrize("tiny", ["gpt2"], indirect=True)
def test_acdc_and_evaluate_by_an_engine(tiny: Any) -> None:
    task = able_task(tiny, pairs=3, length=4)
    by_an_engine_is_the_same(tiny, task, Unruly())


def by_an_engine_is_the_same(model: Any, task: Task, engine: Engine) -> None:
    whole, found = (acdc(model, task, tau=0.05, engine=e, **QUIET) for e in (None, engine))
    assert edges_of(found) == pytest.approx(edges_of(whole), abs=1e-5)
    assert found.graph == whole.graph and len(edges_of(whole)) > 2
    scores = [attribute(model, task, rules=r, level="edge", **QUIET) for r in (RELP, GRADIENT)]
    one, other = (evaluate(model, task, scores, engine=e, **QUIET) for e in (None, engine))
    close(other.metric, one.metric)
    assert other.rules == one.rules and torch.equal(other.edges, one.edges)


def edges_of(circuit: Any) -> dict[tuple[str, str], float]:
    return {(u, d["reader"]): d["score"] for u, _, _, d in real_edges(circuit)}


@pytest.mark.usefixtures("annotations_unchecked")
def test_bench_by_an_engine(gpt2_folder: Path, tmp_path: Path) -> None:
    benches_alike(gpt2_folder, tmp_path, Unruly())


def benches_alike(folder: Path, home: Path, engine: Engine) -> None:
    model = boot(folder)
    task, others = (able_task(model, pairs=2, length=4, seed=seed) for seed in (0, 9))

    def load() -> Loaded:  # inside, so that it is sent as it is written
        return Loaded(zoo.load(str(folder)), task, others)

    cases = [Case(name, "tiny", load) for name in ("one", "other")]
    methods = {name: METHODS[name] for name in ("RELP", "GRADIENT")}
    whole = bench(cases, methods, folder=home / "whole", **QUIET)
    one = bench(cases[:1], {"RELP": METHODS["RELP"]}, folder=home / "found", **QUIET)
    found = bench(cases, methods, folder=home / "found", engine=engine, **QUIET)
    assert len(found.entries) == 4 and repr(found.entries[0]) == repr(one.entries[0])
    for mine, theirs in zip(whole.entries, found.entries, strict=True):
        assert mine.cost.keys() == theirs.cost.keys()
        assert repr(replace(mine, cost={})) == repr(replace(theirs, cost={}))  # NaN is no NaN
    names = [sorted(p.name for p in (home / n).rglob("*")) for n in ("whole", "found")]
    assert names[0] == names[1]


# -- shards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiny", ["llama"], indirect=True)
@pytest.mark.parametrize("level", ["node", "edge"])
def test_sixteen_shards_are_the_whole(tiny: Any, tmp_path: Path, level: str) -> None:
    task = random_task(tiny, pairs=2, length=4)
    options: dict[str, Any] = {"level": level, "positions": True, **QUIET}
    if level == "edge":
        options["edges"] = [("embed", f"L{i}H{h}.{s}") for i in range(3) for h in range(4)
                            for s in "q"] + [("L1.mlp", "logits.in")]  # fmt: skip
    whole, files = patch(tiny, task, **options), list[Path]()
    for i in range(1, 17):
        part = patch(tiny, task, shard=f"{i}/16", **options)
        assert part.rules == f"exact, shard {i}/16"
        files.append(part.save(tmp_path / f"part{i}.safetensors"))
    found = merge_effects(*files[::-1], into=tmp_path / "whole.safetensors")
    for merged in (found, Scores.load(tmp_path / "whole.safetensors")):
        close(merged.table, whole.table, equal_nan=True)
        assert type(merged) is type(whole) and merged.provenance == whole.provenance
        assert torch.equal(merged.clean, whole.clean) and merged.tokens == whole.tokens
        assert merged.resolution == pytest.approx(whole.resolution)


def test_shards_of_a_sample_are_the_sample(tiny: Any) -> None:
    task = random_task(tiny, pairs=2, length=4)
    scores = attribute(tiny, task, **QUIET)
    options: dict[str, Any] = {"budget": 40, **QUIET}
    whole = verify(tiny, task, scores, **options)
    parts = [verify(tiny, task, scores, shard=f"{i}/3", **options) for i in (1, 2, 3)]
    found = merge_effects(*parts)
    close(found.nodes, whole.nodes, equal_nan=True)
    assert found.rules == whole.rules and torch.equal(found.strata, whole.strata)
    assert torch.equal(found.sampling_weights, whole.sampling_weights)
    other = verify(
        tiny, task, attribute(tiny, task, rules=GRADIENT, **QUIET), shard="2/3", **options
    )
    with pytest.raises(ValueError, match="must be of the same sample; theirs were drawn by other"):
        merge_effects(parts[0], other)
    with pytest.raises(ValueError, match="all 3 shards must be there; 1 are missing: 3; measure"):
        merge_effects(*parts[:2])


def test_cells_of_a_block_stay_together_and_shards_are_of_like_work() -> None:
    cells = [
        Cell(f"L{layer}H{h}", pos=p) for p in range(5) for h in range(4) for layer in range(12)
    ]
    parts = [sharded(cells, f"{i}/16", 12) for i in range(1, 17)]
    assert sorted(map(str, (c for part in parts for c in part))) == sorted(map(str, cells))
    amounts = [sum(13 - int(str(c)[1:].split("H")[0]) for c in part) for part in parts]
    assert max(amounts) < 1.2 * min(amounts)
    layers = [sorted({c.component.split("H")[0] for c in part}) for part in parts]
    assert max(map(len, layers)) <= 3
    assert sharded(cells, None, 12) == cells


@pytest.mark.parametrize("shard", ["0/4", "5/4", "3", "a/4", "1/0", "-1/4", "1/2/3", "²/4", ""])
def test_what_is_no_shard_is_refused(tiny: Any, shard: str) -> None:
    task = random_task(tiny, pairs=2, length=4)
    with pytest.raises(ValueError, match=r"'1/16', '2/16' … '16/16'; got '.*'; count from 1"):
        patch(tiny, task, shard=shard, **QUIET)


def test_parts_that_do_not_make_a_whole_are_refused(tiny: Any, tmp_path: Path) -> None:
    task = random_task(tiny, pairs=2, length=4)
    options: dict[str, Any] = {"components": ["mlp"], **QUIET}
    one, two, three = (patch(tiny, task, shard=f"{i}/3", **options) for i in (1, 2, 3))
    whole = patch(tiny, task, **options)

    def refused(*parts: Any) -> str:
        with pytest.raises(ValueError) as error:
            merge_effects(*parts)
        return str(error.value)

    file = one.save(tmp_path / "a.safetensors")
    assert refused(one, three) == (
        "all 3 shards must be there; 1 are missing, with 4 of 12 cells: 2; measure them, or give "
        "them too"
    )
    assert refused(file, two, one, three) == (
        f"every shard must be given once; 1/3 is there twice, {str(file)!r} and 'exact, shard "
        "1/3'; leave one out"
    )
    assert "'exact' are 'exact'; leave them out" in refused(one, whole)
    assert "got none; give every shard" in refused()
    half = patch(tiny, task, shard="2/2", **options)
    assert "'exact, shard 1/3' is one of 3 and 'exact, shard 2/2' one of 2" in refused(one, half)
    noise = patch(tiny, task, shard="2/3", direction="noise", **options)
    assert "they differ in direction: " in refused(one, noise)
    assert "they differ in weights: 'x' and " in refused(altered(one, weights="x"), two, three)
    heads = patch(tiny, task, components=["head"], shard="2/3", **QUIET)
    assert "they differ in components: ('L0.mlp', " in refused(one, heads)
    steered = altered(two, clean=two.clean + 1)
    assert "their clean differ by up to 1; " in refused(one, steered, three)
    double = altered(whole, rules="exact, shard 2/3")
    assert "those that are merged share some" in refused(one, double, three)
    nothing = replace(two, nodes=two.nodes * torch.nan)
    assert "4 of 12 are in none of those that are merged" in refused(one, nothing, three)
    with pytest.raises(ValueError, match="3 shards are too many for 2 cells; ask for fewer"):
        patch(tiny, task, components=["L0H0", "L1H0"], positions=False, shard="1/3", **QUIET)
    with pytest.raises(ValueError, match=r"`into` must be a \.safetensors file; got 'all\.pt'"):
        merge_effects(one, two, three, into="all.pt")


# -- what is asked of a cluster --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: RayEngine(workers=0), ValueError, "`workers` must be at least 1; got 0; give"),
        (lambda: RayEngine(gpus=-1), ValueError, "`gpus` must be at least 0; got -1; give more"),
    ],
)
@pytest.mark.usefixtures("annotations_unchecked")
def test_wrong_engines_are_refused(
    make: Callable[[], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.usefixtures("annotations_unchecked")
def test_a_recipe_must_be_a_function() -> None:
    with pytest.raises(TypeError, match="that loads the model in a worker; got a str; write for"):
        RayEngine("ioi-gpt2")  # type: ignore[arg-type]


def test_an_engine_without_ray_or_a_recipe_says_so(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = random_task(tiny, pairs=2, length=4)
    with pytest.raises(TypeError, match="must have a recipe to load the model in its workers; "):
        patch(tiny, task, components=["L1.mlp"], engine=RayEngine(), **QUIET)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"is not installed; install it with pip install relp\[c"):
        patch(tiny, task, components=["L1.mlp"], engine=RayEngine(lambda: tiny), **QUIET)


def test_a_worker_must_be_as_this_process_is() -> None:
    here = {"libraries": "torch 1", "precision": "float32", "weights": "a", "metrics": [1.0, 2.0]}
    _must_equal({**here, "metrics": [1.0, 2.0001]}, here)
    for what in ("libraries", "precision", "weights"):
        with pytest.raises(ValueError, match=f"it has other {what}, 'b', here '{here[what]}'; let"):
            _must_equal({**here, what: "b"}, here)
    with pytest.raises(ValueError, match=r"its metrics are \[1.5, 2.0\], here .*set the hooks"):
        _must_equal({**here, "metrics": [1.5, 2.0]}, here)


def test_a_piece_that_kills_is_halved_until_the_item_is_known() -> None:
    died, pieces, deaths = RuntimeError("killed\nmore"), [_Piece([*map(Cell, NAMES)])], 0
    with pytest.raises(RuntimeError, match=r"; 3 died, one after the other, of L3.mlp \(killed\);"):
        while pieces:
            piece = pieces.pop(0)
            if Cell("L3.mlp") in piece.items:
                deaths += 1
                pieces[:0] = _halves(piece, died)
    assert deaths == 2 + ATTEMPTS  # of four cells, of two, and of the one


NAMES = ("L0.mlp", "L1.mlp", "L3.mlp", "L4.mlp")


def test_a_task_can_be_sent(tiny: Any) -> None:
    task = ragged_task(tiny)
    sent = copy.deepcopy(task)
    logits = torch.randn(len(task), int(task.lengths.max()), 1200)
    assert torch.equal(sent.metric(logits), task.metric(logits))


# -- a cluster -------------------------------------------------------------------------------------

CLUSTER: dict[str, Any] = {"workers": 2, "cpus": 0.25}


@pytest.fixture(scope="module")
def here(gpt2_folder: Path) -> Any:
    return boot(gpt2_folder)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each process that has loaded the model, called by its number."""
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def cluster(gpt2_folder: Path, processes: Path) -> Iterator[RayEngine]:
    def recipe() -> Any:
        (processes / str(os.getpid())).touch()
        return zoo.load(str(gpt2_folder))

    with RayEngine(recipe, **CLUSTER) as engine:
        yield engine


def alive(processes: Path) -> list[int]:
    found = [int(p.name) for p in sorted(processes.iterdir(), key=lambda p: p.stat().st_mtime)]
    return [number for number in found if Path(f"/proc/{number}").exists()]


@pytest.mark.long
def test_a_cluster_gives_what_one_process_does(
    here: Any, cluster: RayEngine, processes: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    task = ragged_task(here)
    for level in ("node", "edge"):
        options: dict[str, Any] = {"level": level, "batch_size": 6, **QUIET}
        if level == "edge":
            options["edges"] = [("embed", "L1H1.q"), ("L1.mlp", "logits.in"), ("L0H0", "L2.mlp.in")]
        whole, found = patch(here, task, **options), patch(here, task, engine=cluster, **options)
        close(found.table, whole.table, equal_nan=True)
        assert found.provenance == whole.provenance
    assert len(alive(processes)) == 2  # they stay, with their model
    task = random_task(here, pairs=2, length=4)
    cells = [Cell(f"L{layer}.mlp", pos=pos) for layer in range(3) for pos in range(4)]
    one, other = (measure(here, task, cells, batch_size=2, engine=e, **QUIET)
                  for e in (None, cluster))  # fmt: skip
    assert torch.equal(one.effects, other.effects)  # these are the same batches
    scores = attribute(here, task, **QUIET)
    sample, again = (verify(here, task, scores, budget=40, engine=e, **QUIET)
                     for e in (None, cluster))  # fmt: skip
    close(again.nodes, sample.nodes, equal_nan=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.long
def test_a_worker_that_is_killed_is_replaced(
    here: Any, cluster: RayEngine, processes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, killed, inner = random_task(here, pairs=3, length=7), list[int](), Sweep.take

    def take(self: Sweep, part: Sweep) -> None:
        inner(self, part)
        if not killed:
            killed.append(alive(processes)[-1])
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(Sweep, "take", take)
    whole, found = (patch(here, task, engine=e, **QUIET) for e in (None, cluster))
    close(found.nodes, whole.nodes)
    assert killed and killed[0] not in alive(processes)
    end = time.monotonic() + 60
    while len(alive(processes)) < 2:  # the other may have done the rest meanwhile
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.long
def test_a_driver_that_is_stopped_goes_on(
    here: Any, cluster: RayEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, file = random_task(here, pairs=3, length=6), tmp_path / "sweep.safetensors"
    whole = patch(here, task, **QUIET)
    with monkeypatch.context() as stop:
        stopped(stop, after=2)
        with pytest.raises(KeyboardInterrupt, match="effects are kept in"):
            patch(here, task, engine=cluster, resume=file, **QUIET)
    left = int(Sweep.load(file).effects.isnan().sum())
    assert 0 < left < whole.nodes.numel()
    close(patch(here, task, engine=cluster, resume=file, **QUIET).nodes, whole.nodes)


@pytest.mark.long
def test_circuits_and_cases_on_a_cluster(
    here: Any, cluster: RayEngine, gpt2_folder: Path, tmp_path: Path
) -> None:
    by_an_engine_is_the_same(here, able_task(here, pairs=3, length=4), cluster)
    benches_alike(gpt2_folder, tmp_path, RayEngine(**CLUSTER))


@pytest.mark.long
@pytest.mark.parametrize(
    ("recipe", "kind", "message"),
    [
        (
            lambda folder: zoo.load("ioi-gpt2"),
            ValueError,
            "it has other weights, '.*', here '.*'; ",
        ),
        (
            lambda folder: zoo.load("/nowhere"),
            RuntimeError,
            "one cannot .*/nowhere.*; install there",
        ),
        (lambda folder: __import__("nothing_of_ours"), RuntimeError, "No module named 'nothing_of"),
        (lambda folder: os.kill(os.getpid(), signal.SIGKILL), RuntimeError, "3 died over it, one "),
    ],
)
def test_workers_that_cannot_work_are_refused(
    here: Any, cluster: RayEngine, gpt2_folder: Path, recipe: Any, kind: Any, message: str
) -> None:
    task = random_task(here, pairs=2, length=4)
    measure(here, task, [Cell("L1.mlp")], engine=cluster, **QUIET)  # it is there
    with (
        RayEngine(partial(recipe, str(gpt2_folder)), workers=1, cpus=0.25) as engine,
        pytest.raises(kind, match=message),
    ):
        measure(here, task, [Cell("L1.mlp")], engine=engine, **QUIET)
    with pytest.raises(ValueError, match="must have 1e\\+06 CPUs for 1 workers of 1e\\+06; it has"):
        measure(
            here, task, [Cell("L1.mlp")], engine=RayEngine(recipe, workers=1, cpus=1e6), **QUIET
        )


@pytest.mark.long
def test_an_item_that_kills_workers_is_named(cluster: RayEngine) -> None:
    def begin(_: Any, __: Any) -> Callable[[list[Cell]], int]:
        def answer(piece: list[Cell]) -> int:
            if Cell("L3.mlp") in piece:
                os.kill(os.getpid(), signal.SIGKILL)
            return len(piece)

        return answer

    cells, done = [*map(Cell, NAMES)], list[Cell]()
    with (
        RayEngine(**CLUSTER) as engine,
        engine.working(begin) as answers,
        pytest.raises(RuntimeError, match=r"3 died, one after the other, of L3.mlp \("),
    ):
        for piece, _ in answers([cells[:2], cells[2:]]):
            done += piece
    assert set(cells[:2]) <= set(done) and Cell("L3.mlp") not in done


@pytest.mark.long
def test_what_cannot_be_sent_is_named(here: Any, cluster: RayEngine) -> None:
    task, cells = random_task(here, pairs=2, length=4), [Cell("L1.mlp")]
    lock = threading.Lock()

    def metric(logits: Tensor) -> Tensor:
        with lock:
            return logits[:, -1, 0]

    with pytest.raises(TypeError, match=r"the task must be sent to workers, and cannot be .*lock"):
        measure(here, task.with_metric(metric), cells, engine=cluster, **QUIET)
    with pytest.raises(TypeError, match=r"`recipe` must be sent .*; let it load a model, not hold"):
        measure(here, task, cells, engine=RayEngine(lambda: (here, lock)), **QUIET)


@pytest.mark.long
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense"])
def test_a_cluster_that_is_not_there_is_said_at_once(
    here: Any, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    engine = RayEngine(partial(zoo.load, "ioi-gpt2"))
    task, begun = random_task(here, pairs=2, length=4), time.monotonic()
    with pytest.raises(ConnectionError, match=f"cluster at '{address}' must be reachable; it is "):
        measure(here, task, [Cell("L1.mlp")], engine=engine, **QUIET)
    assert time.monotonic() - begun < 10


DRIVER = """
import sys, torch
from conftest import boot, random_task
from circuits import patch
from circuits.engines import RayEngine
from tasks import zoo
folder, file = sys.argv[1:]
model = boot(folder)
with RayEngine(lambda: zoo.load(folder), workers=1, cpus=0.25) as engine:
    print("begun", flush=True)
    patch(model, random_task(model, pairs=3, length=6), engine=engine, resume=file, progress=False)
import ray
print("connected" if ray.is_initialized() else "left")
"""


@pytest.mark.long
def test_another_process_joins_the_cluster_and_may_be_killed(
    here: Any, cluster: RayEngine, gpt2_folder: Path, tmp_path: Path
) -> None:
    """A driver that is killed leaves what it has; the next one goes on; the cluster stays."""
    import ray

    task, file = random_task(here, pairs=3, length=6), tmp_path / "sweep.safetensors"
    measure(here, task, [Cell("L1.mlp")], engine=cluster, **QUIET)
    address = ray.get_runtime_context().gcs_address
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", DRIVER, str(gpt2_folder), str(file)]
    env = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": paths}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None and driver.stdout.readline() == "begun\n"
        while not file.exists():
            time.sleep(0.01)
        driver.kill()
    assert bool(Sweep.load(file).effects.isnan().any())
    again = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert again.stdout == "begun\nleft\n"
    whole = patch(here, task, **QUIET)
    found = patch(here, task, resume=file, **QUIET)
    close(found.nodes, whole.nodes)
    assert ray.is_initialized()
