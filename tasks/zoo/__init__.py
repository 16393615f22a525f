"""Small trained models that come with the package: `load("ioi-gpt2")`, no download.

Both know indirect object identification (`tasks.ioi`) and little else. `tasks.zoo.train` made
them from `tasks.zoo.corpus`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

__all__ = ["load", "names"]

HERE = Path(__file__).parent


def names() -> list[str]:
    """The models that can be loaded.

    >>> zoo.names()
    ['ioi-gpt2', 'ioi-llama']
    """
    return sorted(config.parent.name for config in HERE.glob("*/config.json"))


def load(name: str) -> TransformerBridge:
    """A zoo model on the CPU, in float32 and eval mode, with its tokenizer.

    >>> model = zoo.load("ioi-gpt2")

    Raises:
        ValueError: there is no such model.
    """
    if name not in names():
        raise ValueError(f"`name` must be one of {names()}; got {name!r}; choose one of them")
    # Imported here: `import tasks` should not wait for TransformerLens.
    from transformer_lens.model_bridge import TransformerBridge
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = TransformerBridge.boot_transformers(str(HERE / name), device="cpu")
    finally:
        if bars:
            logging.enable_progress_bar()
    model.cfg.model_name = name  # results should name the model, not a folder of this machine
    return model.eval()
