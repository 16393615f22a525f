"""Options that several commands share, and how results are called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from relp import Preset
from tasks.registry import TASKS
from tasks.zoo import shelf
from tasks.zoo.placement import DTYPES, MAPS

__all__ = [
    "FEW", "Device", "DeviceMap", "Dtype", "Exact", "FilterCorrect", "Json", "Model", "Pairs",
    "PairsBySize", "Seed", "TaskName", "label",
    "model_names", "pairs_for", "result_name", "rule_names",
]  # fmt: skip

FEW = 8
"""Pairs of prompts for large models, if nobody says how many."""


def model_names() -> list[str]:
    """What completes a model."""
    return [model.name for model in shelf.models()]


def rule_names() -> list[str]:
    """What completes `--rules`."""
    return [str(preset) for preset in Preset]


TaskName = Annotated[
    str,
    typer.Argument(
        autocompletion=lambda: list(TASKS),
        help="The task; `relp tasks` lists them. Or a .csv or .jsonl file with the columns clean, "
        "corrupt, answer and foil; results are called by its name.",
    ),
]
Model = Annotated[
    str,
    typer.Option(
        autocompletion=model_names,
        help="A model that `relp models` lists, a folder or GGUF file, or a name on the Hugging "
        "Face hub.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        autocompletion=lambda: ["auto", "cpu", "cuda"],
        help="Where the model is: cpu, cuda, cuda:1, …, or auto, the best there is. If not given, "
        "the CPU for models by name and GGUF files, auto for others.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        autocompletion=lambda: list(DTYPES),
        help="Precision of the weights: float32, bfloat16, float16 or float64; float32 if not "
        "given.",
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        autocompletion=lambda: [*MAPS, "disk"],
        help="Weights over several devices: auto, balanced, …; disk, to fetch them from there; or "
        "a JSON file of names of modules and their devices.",
    ),
]
Pairs = Annotated[
    int, typer.Option(min=1, help="Pairs of prompts; of a file, no more than it has.")
]
PairsBySize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Pairs of prompts; of a file, no more than it has. If not given, fewer for large "
        "models.",
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        help="Which prompts are drawn; of a file, 0 takes the first rows, another number shuffles "
        "them before."
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print the results as JSON, and all that is said to stderr."),
]
Exact = Annotated[
    bool,
    typer.Option("--exact", help="Patch everything, however long it takes, not a sample of it."),
]
FilterCorrect = Annotated[
    bool,
    typer.Option("--filter-correct", help="Keep the pairs whose clean prompt is answered rightly."),
]


def pairs_for(bridge: Any, pairs: int) -> int:
    """Pairs of prompts, if nobody says how many."""
    from circuits.cli.cases import is_large

    return FEW if is_large(bridge) else pairs


def result_name(model: str) -> str:
    """The name of a model that results carry."""
    return Path(model).name or model


def label(bridge: Any) -> str:
    """A booted model's name, and how its weights were stored if they were quantised."""
    from relp.bridge import quantization

    return ", ".join(filter(None, (result_name(bridge.cfg.model_name), quantization(bridge))))
