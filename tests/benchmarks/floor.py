"""What every benchmark is measured against: two shapes, one floor, times taken in turn with it.

The floor is what two runs and their gradient cost with nothing of ours or of TransformerLens: two
forward passes of the transformers model and one backward, without gradients of parameters, on the
same batch. All work runs on one thread; times are the process's own CPU time, which a busy machine
spoils less than the clock on the wall.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from tasks import Task, zoo

torch.set_num_threads(1)

Work = Callable[[], Any]


SHAPES: dict[str, tuple[str, Any]] = {
    # a folder with a tokenizer, because a bridge wants one, and the configuration
    "gpt2": ("ioi-gpt2", GPT2Config(n_layer=12)),
    "smollm2": (
        "ioi-llama",
        LlamaConfig(
            hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
            intermediate_size=1536, vocab_size=49152, max_position_embeddings=2048,
            rms_norm_eps=1e-5, tie_word_embeddings=True,
        ),
    ),
}  # fmt: skip
"""GPT-2 small, and SmolLM2-135M."""


def plain_model(shape: str = "gpt2") -> PreTrainedModel:
    """transformers' own model in one of the shapes, with random weights.

    Attention is computed as a bridge does it.
    """
    torch.manual_seed(0)
    config = deepcopy(SHAPES[shape][1])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.eval().requires_grad_(False)


def bridge(shape: str = "gpt2") -> Any:
    """The same model as a bridge."""
    folder = str(Path(zoo.__file__).parent / SHAPES[shape][0])
    inner = plain_model(shape).requires_grad_()  # as users have it
    model = TransformerBridge.boot_transformers(folder, device="cpu", hf_model=inner)
    with torch.no_grad():
        model(torch.tensor([[1, 2]]))  # a bridge installs hooks of its own at the first run
    return model.eval()


def random_task(shape: str = "gpt2", *, pairs: int = 8, positions: int = 16) -> Task:
    """Pairs of random tokens."""
    draw = torch.Generator().manual_seed(0)

    def tokens(*size: int) -> torch.Tensor:
        return torch.randint(0, SHAPES[shape][1].vocab_size, size, generator=draw)

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
