"""Models without weights: their shapes, from their configuration alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.zoo.downloads import DOWNLOADS, kept
from tasks.zoo.gguf import is_gguf
from tasks.zoo.shelf import HERE, names, shipped

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

__all__ = ["DTYPES", "outline"]

DTYPES = ("float32", "bfloat16", "float16")


def outline(model: str, *, dtype: str = "float32") -> TransformerBridge:
    """A model of which there is everything but the numbers: all its tensors are on `meta`.

    >>> from tasks.zoo.outline import outline
    >>> outline("ioi-gpt2").W_E.device
    device(type='meta')

    Args:
        model: a name out of `zoo.names()` (a fetched one must be there), a folder with a
            `config.json` or that file itself, a GGUF file, or a name on the Hugging Face hub.
        dtype: the precision of its weights.

    Raises:
        ValueError: there is no such configuration, none of a model that a bridge can be made of,
            or the precision is none.
    """
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}; got {dtype!r}; choose one")
    import torch
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = _config(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                inner = AutoModelForCausalLM.from_config(
                    config, dtype=getattr(torch, dtype), attn_implementation="eager"
                )
            # a bridge wants a tokenizer; nobody asks this one anything
            own = HERE / "ioi-gpt2"
            with _numbers_may_miss():
                bridge = TransformerBridge.boot_transformers(
                    str(own), hf_model=inner, device="meta", dtype=getattr(torch, dtype),
                    tokenizer=AutoTokenizer.from_pretrained(own),
                )  # fmt: skip
        except Exception as error:  # configs and adapters each raise their own kind
            raise ValueError(
                "the model must be one that TransformerBridge knows; the configuration of "
                f"{model!r} is not ({_first_line(error)}); check its architecture"
            ) from error
    bridge.cfg.model_name = Path(model).name if model not in names() else model
    return bridge.eval()


@contextmanager
def _numbers_may_miss() -> Iterator[None]:
    """TransformerLens splits joint matrices of queries, keys and values of `meta` tensors too.

    It refuses to, as their numbers could not be right; here they are not asked for.
    """
    from transformer_lens.utilities import quantization

    asked = quantization.unreadable_weight_reason

    def reason(weight: Any) -> str | None:
        return None if getattr(weight, "is_meta", False) else asked(weight)

    quantization.unreadable_weight_reason = reason
    try:
        yield
    finally:
        quantization.unreadable_weight_reason = asked


def _config(model: str) -> Any:
    """The configuration of transformers."""
    from transformers import AutoConfig

    path = Path(model).expanduser()
    if model in shipped():
        path = HERE / model
    elif model in DOWNLOADS:
        folder = kept(DOWNLOADS[model])
        if folder is None:
            raise ValueError(
                f"the configuration of {model!r} must be there; it comes with the weights, which "
                f"are not fetched yet; run relp models --fetch {model}"
            )
        path = folder
    options: dict[str, Any] = {}
    if path.is_file() and is_gguf(path):
        path, options = path.parent, {"gguf_file": path.name}
    try:
        return AutoConfig.from_pretrained(str(path) if path.exists() else model, **options)
    except Exception as error:
        raise ValueError(
            f"the model must be one of {', '.join(names())}, a folder with a config.json or that "
            f"file, a GGUF file, or a name on the Hugging Face hub; {model!r} has no configuration "
            f"that can be read ({_first_line(error)}); check the path"
        ) from error


def _first_line(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
