"""What every benchmark is measured against: one shape, one floor, times taken in turn with it.

The floor is what two runs and their gradient cost with nothing of ours or of TransformerLens: two
forward passes of the transformers model and one backward, without gradients of parameters, on the
same batch. All work runs on one thread; times are the process's own CPU time, which a busy machine
spoils less than the clock on the wall.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel

from tasks import Task, zoo

torch.set_num_threads(1)

Work = Callable[[], Any]


def plain_model(layers: int = 12) -> GPT2LMHeadModel:
    """transformers' own model in the shape of GPT-2 small, with random weights.

    Attention is computed as a bridge does it.
    """
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, attn_implementation="eager")
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


def bridge(layers: int = 12) -> Any:
    """The same model as a bridge; the tokenizer is there because a bridge wants one."""
    folder = str(Path(zoo.__file__).parent / "ioi-gpt2")
    inner = plain_model(layers).requires_grad_()  # as users have it
    model = TransformerBridge.boot_transformers(folder, device="cpu", hf_model=inner)
    with torch.no_grad():
        model(torch.tensor([[1, 2]]))  # a bridge installs hooks of its own at the first run
    return model.eval()


def random_task(pairs: int = 8, positions: int = 16) -> Task:
    """Pairs of random tokens."""
    draw = torch.Generator().manual_seed(0)

    def tokens(*shape: int) -> torch.Tensor:
        return torch.randint(0, 50257, shape, generator=draw)

    return Task.from_tokens(
        tokens(pairs, positions), tokens(pairs, positions), tokens(pairs), tokens(pairs)
    )


def floor(model: Any, task: Task) -> Work:
    """Two forward passes of a transformers model and one backward."""

    def work() -> None:
        with torch.no_grad():
            model(task.clean)
        forward_and_backward(model, task)

    return work


def forward_and_backward(model: Any, task: Task) -> None:
    """The gradient of the metric with respect to the embeddings of the corrupt prompts."""
    x = model.get_input_embeddings()(task.corrupt).detach().requires_grad_()
    torch.autograd.grad(task.metric(model(inputs_embeds=x).logits).sum(), x)


def seconds(work: Work) -> tuple[float, float]:
    """CPU time and wall time of one call."""
    wall, cpu = perf_counter(), process_time()
    work()
    return process_time() - cpu, perf_counter() - wall


def in_turn(unit: Work, candidates: Mapping[str, Work], *, rounds: int) -> pd.DataFrame:
    """Each candidate's time as a multiple of the unit's, which runs right before it; medians."""
    rows = {}
    for name, work in candidates.items():
        unit(), work()
        runs = [(seconds(unit), seconds(work)) for _ in range(rounds)]
        rows[name] = {
            "CPU ratio": median(mine[0] / base[0] for base, mine in runs),
            "wall ratio": median(mine[1] / base[1] for base, mine in runs),
            "CPU s": median(mine[0] for _, mine in runs),
        }
    return pd.DataFrame.from_dict(rows, orient="index")
