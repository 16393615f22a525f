"""Times and memory on a GPU, beside the floor, from GPT-2 small to the shape of an 8B model.

python tests/benchmarks/gpu.py --out gpu.json
python tests/benchmarks/gpu.py --device cpu --small    # the same code on small shapes, to try it

Weights are random and made on the device; nothing is fetched. Each table is printed, and written,
as soon as it is there, and what fails or finds no time is said and leaves the others alone. Times
are medians on the wall, of a device that has finished; memory is the most that torch held at once,
without what was there before the call, which is the weights.
"""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from traceback import print_exc
from typing import Any

import pandas as pd
import torch
import typer
from floor import Work, floor
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.attribution_patching import (
    EdgeAttributionConfig,
    attribution_patch,
)
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from circuits import evaluate, faithfulness, patch, top
from relp import DEEPLIFT, RELP, attribute
from tasks import Task, zoo

PAIRS, POSITIONS = 8, 16
LONG = 2048
PEER_PAIRS = 2
"""TransformerLens takes pairs one by one: this many are timed."""


@dataclass(frozen=True)
class Shape:
    """A model with random weights."""

    name: str
    config: Any
    tokenizer: str
    """A model of the zoo that lends its tokenizer, which a bridge wants."""
    dtype: torch.dtype = torch.float32

    def small(self) -> Shape:
        """Two blocks of a few dimensions, otherwise as it is."""
        config = type(self.config).from_dict(self.config.to_dict())
        config.num_attention_heads, config.hidden_size = 4, 64
        config.num_hidden_layers, config.vocab_size = 2, 1000
        if isinstance(config, LlamaConfig):
            config.num_key_value_heads, config.intermediate_size, config.head_dim = 2, 128, 16
        return replace(self, config=config)

    def plain(self, device: str) -> Any:
        """transformers' own model; attention is computed as a bridge does it."""
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(
                self.config, dtype=self.dtype, attn_implementation="eager"
            )
        return model.eval().requires_grad_(False)

    def bridge(self, plain: Any, device: str | None) -> Any:
        """The same model as a bridge, which shares its weights."""
        folder = str(Path(zoo.__file__).parent / self.tokenizer)
        model = TransformerBridge.boot_transformers(
            folder, device=device, dtype=self.dtype, hf_model=plain.requires_grad_()
        )
        with torch.no_grad():
            model(torch.tensor([[1, 2]], device=next(plain.parameters()).device))
        return model.eval()

    def task(self, pairs: int = PAIRS, positions: int = POSITIONS) -> Task:
        """Pairs of random tokens."""
        draw = torch.Generator().manual_seed(0)
        tokens = [torch.randint(0, self.config.vocab_size, shape, generator=draw)
                  for shape in [(pairs, positions)] * 2 + [(pairs,)] * 2]  # fmt: skip
        return Task.from_tokens(*tokens)


def llama(
    width: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int, *, tied: bool
) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, head_dim=width // heads,
        vocab_size=vocabulary, max_position_embeddings=8192, tie_word_embeddings=tied,
    )  # fmt: skip


SHAPES = (
    Shape("GPT-2 small, float32", GPT2Config(), "ioi-gpt2"),
    Shape("SmolLM2-135M, float32", llama(576, 1536, 30, 9, 3, 49152, tied=True), "ioi-llama"),
    Shape(
        "Llama-3.2-1B, bfloat16",
        llama(2048, 8192, 16, 32, 8, 128256, tied=True),
        "ioi-llama",
        torch.bfloat16,
    ),
    Shape(
        "Llama-3.1-8B, bfloat16",
        llama(4096, 14336, 32, 32, 8, 128256, tied=False),
        "ioi-llama",
        torch.bfloat16,
    ),
)


def main(
    device: str = "cuda",
    small: bool = False,
    rounds: int = 3,
    limit: float = 780.0,
    out: Path | None = None,
) -> None:
    """Prints the tables; behind `limit` seconds nothing new begins."""
    warnings.filterwarnings("ignore", "the model must be able to do the task")
    torch.set_float32_matmul_precision("highest")  # as users have it
    bench = Bench(device, small, rounds, perf_counter() + limit, out, {})
    bench.say()
    first, *others = [shape.small() if small else shape for shape in SHAPES]
    for shape in (first, *others):
        with measuring(shape, bench) as (base, model):
            if model is None:
                continue
            bench.table(shape.name, partial(calls, bench, shape, base, model))
            if shape is first:
                bench.table(
                    f"TransformerLens: {shape.name}", partial(peers, bench, shape, base, model)
                )
            if shape is others[-1]:
                positions = 256 if small else LONG
                title = f"{shape.name}: one pair of {positions:,} tokens"
                bench.table(title, partial(long, bench, shape, model, positions))
    bench.table("two devices against one", partial(two_devices, bench, first))


@dataclass(frozen=True)
class Bench:
    """How things are measured, and what was."""

    device: str
    small: bool
    rounds: int
    until: float
    out: Path | None
    tables: dict[str, Any]

    def say(self) -> None:
        """What it is measured on."""
        of = torch.cuda.get_device_name() if self.on_gpu else self.device
        self.tables["on"] = f"{of}, torch {torch.__version__}"
        print(self.tables["on"], flush=True)

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def table(self, title: str, rows: Callable[[], Iterator[tuple[str, dict[str, Any]]]]) -> None:
        """Prints and writes a table row by row; one that fails keeps those before it."""
        found: dict[str, dict[str, Any]] = {}
        try:
            for name, row in rows():
                found[name] = row
                if perf_counter() > self.until:
                    found["the rest"] = {"why": "no time left"}
                    break
        except Exception as error:  # the others are still worth having
            print_exc()
            found["failed"] = {"why": f"{type(error).__name__}: {str(error)[:200]}"}
        self.tables[title] = found
        shown = pd.DataFrame.from_dict(found, orient="index")
        print(f"\n{title}\n{shown.to_string(float_format='{:.4g}'.format, na_rep='–')}", flush=True)
        if self.out:
            self.out.write_text(json.dumps(self.tables, indent=1) + "\n")
        self.empty()

    def empty(self) -> None:
        """Gives back what no one holds any more."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def seconds(self, work: Work) -> float:
        """Time on the wall of one call, until the device has finished."""
        self.wait()
        start = perf_counter()
        work()
        self.wait()
        return perf_counter() - start

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def measured(self, work: Work, base: float = float("nan"), per: int = 1) -> dict[str, Any]:
        """Seconds of one of `per` things, as a multiple of the floor, and the most memory."""
        self.empty()
        held = 0
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        first = self.seconds(work)
        peak = (torch.cuda.max_memory_allocated() - held) / 2**30 if self.on_gpu else float("nan")
        # what takes long needs no warm-up, and is not repeated
        rest = [self.seconds(work) for _ in range(self.rounds if first < 10 else 0)]
        once = median(rest or [first])
        return {"seconds": once / per, "first": first / per, "floors": once / per / base,
                "peak GB": peak}  # fmt: skip


@contextmanager
def measuring(shape: Shape, bench: Bench) -> Iterator[tuple[float, Any]]:
    """The floor of a shape in seconds, and its bridge; nan and None if there is none."""
    base, model = float("nan"), None
    if perf_counter() < bench.until:
        try:
            plain = shape.plain(bench.device)
            weights = sum(p.numel() * p.element_size() for p in plain.parameters()) / 2**30
            row = bench.measured(floor(plain, on(shape.task(), bench.device)))
            base = row["seconds"]  # before the bridge, whose hooks would be timed with it
            found = {"floor": row | {"floors": 1.0, "weights GB": weights}}
            bench.table(f"{shape.name}: floor", lambda: iter(found.items()))
            model = shape.bridge(plain, bench.device)
            del plain
        except Exception:  # the other shapes are still worth having
            print_exc()
    yield base, model
    del model
    bench.empty()


def on(task: Task, device: str) -> Task:
    """A task whose prompts lie on the device, as the plain model wants them."""
    return replace(task, clean=task.clean.to(device), corrupt=task.corrupt.to(device))


def calls(
    bench: Bench, shape: Shape, base: float, model: Any
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What users call."""
    task = shape.task()
    quiet = {"progress": False}
    for level in ("node", "edge"):
        for rules in (RELP, DEEPLIFT):
            work = partial(attribute, model, task, rules=rules, level=level, **quiet)
            yield f"attribute, {level}s, {rules.name}", bench.measured(work, base)
    middle = len(model.blocks) // 2
    heads = [f"L{middle}H{head}" for head in range(shape.config.num_attention_heads)]
    cells = len(heads) * POSITIONS
    work = partial(patch, model, task, components=heads, **quiet)
    yield f"patch, one cell of {cells}", bench.measured(work, base, cells)
    scores = attribute(model, task, rules=RELP, level="edge", **quiet)
    circuit = top(scores, edges=200)
    yield (
        "faithfulness, one circuit",
        bench.measured(partial(faithfulness, model, task, circuit, **quiet), base),
    )
    work = partial(evaluate, model, task, scores, random=0, **quiet)
    yield "evaluate, one circuit of ten", bench.measured(work, base, 10)


def long(
    bench: Bench, shape: Shape, model: Any, positions: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """One long prompt."""
    task = shape.task(1, positions)
    work = partial(attribute, model, task, rules=RELP, level="edge", progress=False)
    yield "attribute, edges, RELP", bench.measured(work)
    circuit = top(work(), edges=200)
    yield (
        "faithfulness, one circuit",
        bench.measured(partial(faithfulness, model, task, circuit, progress=False)),
    )


def peers(
    bench: Bench, shape: Shape, base: float, model: Any
) -> Iterator[tuple[str, dict[str, Any]]]:
    """TransformerLens' own functions for the same, of a bridge beside ours."""
    task, some = shape.task(), PEER_PAIRS
    ones = [on(task.select([i]), bench.device) for i in range(some)]

    def nodes() -> None:
        for one in ones:
            attribution_patch(
                model, one.clean, one.corrupt, lambda logits, one=one: one.metric(logits)[0],
                EdgeAttributionConfig(granularity="node"),
            )  # fmt: skip

    row = bench.measured(nodes, base, some)
    scaled = {name: row[name] * len(task) for name in ("seconds", "first", "floors")}
    yield f"attribution_patch, nodes: {some} pairs timed, scaled to {len(task)}", row | scaled
    middle, heads = len(model.blocks) // 2, shape.config.num_attention_heads
    sample = [(middle, pos, head) for pos in (0, POSITIONS // 2, POSITIONS - 1)
              for head in range(min(4, heads))]  # fmt: skip
    both = on(task, bench.device)
    found: list[Any] = []

    @torch.no_grad()
    def cells() -> None:
        _, cache = model.run_with_cache(both.clean, names_filter=lambda n: n.endswith("hook_z"))
        found[:] = [patching.generic_activation_patch(
            model, both.corrupt, cache, lambda logits: both.metric(logits).mean(),
            patching.layer_pos_head_vector_patch_setter, "z",
            index_df=pd.DataFrame(sample, columns=["layer", "pos", "head_index"]),
        )]  # fmt: skip

    row = bench.measured(cells, base, len(sample))
    names = sorted({f"L{layer}H{head}" for layer, _, head in sample})
    ours = patch(model, task, components=names, progress=False)
    rows = [ours.components.index(f"L{layer}H{head}") for layer, _, head in sample]
    same = ours.nodes.mean(0)[rows, [pos for _, pos, _ in sample]] + ours.corrupt.mean()
    apart = float((same.cpu() - found[0].float().cpu()).abs().max())
    yield f"generic_activation_patch, one cell of {len(sample)}", row | {"differs by": apart}


def two_devices(bench: Bench, shape: Shape) -> Iterator[tuple[str, dict[str, Any]]]:
    """A model whose second half lies on another device gives the numbers of one that does not."""
    if bench.on_gpu and torch.cuda.device_count() < 2:
        yield "not tried", {"why": "there is one GPU"}
        return
    from accelerate import dispatch_model

    homes: list[Any] = [0, 1] if bench.on_gpu else ["cpu", "cpu"]
    found = []
    for first, second in ((homes[0], homes[0]), homes):
        plain = shape.plain(bench.device)
        blocks = plain.get_submodule("transformer.h")
        half = len(blocks) // 2
        where = {"transformer.wte": first, "transformer.wpe": first, "transformer.ln_f": second,
                 "lm_head": second}  # fmt: skip
        where |= {f"transformer.h.{i}": second if i >= half else first for i in range(len(blocks))}
        if first != second:
            # the embedding's weights are the unembedding's too
            plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
            plain = dispatch_model(plain, device_map=where)
        model = shape.bridge(plain, None if first != second else bench.device)
        task = shape.task()
        nodes = attribute(model, task, rules=RELP, progress=False).nodes
        scores = attribute(model, task, rules=RELP, level="edge", progress=False)
        share = faithfulness(model, task, top(scores, edges=50), progress=False)
        found.append((nodes, scores.edges, torch.tensor(share)))
    for name, one, two in zip(("nodes", "edges", "faithfulness"), *found, strict=True):
        apart = float((one - two).abs().max() / one.abs().max())
        yield name, {"largest difference, relative": apart, "same": apart < 1e-3}


if __name__ == "__main__":
    typer.run(main)
