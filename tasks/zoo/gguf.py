"""GGUF files: what they say of their weights, and the ordinary model that they become.

transformers dequantises them with the package `gguf`, which comes with `pip install ".[real]"`.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["check_gguf", "check_reader", "dequantised", "is_gguf", "quiet"]

MAGIC = b"GGUF"
FLOATS = ("F64", "F32", "F16", "BF16")
"""The types of weights that were not quantised."""


def is_gguf(path: Path) -> bool:
    """True for a file of that name, or that begins as one does."""
    return path.is_file() and (path.suffix == ".gguf" or _begins(path) == MAGIC)


def check_gguf(path: Path) -> None:
    """Refuses, before anything is imported, a file that is no GGUF one or cannot be read here.

    Raises:
        ValueError: the file does not begin as a GGUF file does, or `gguf` is not installed.
        OSError: it cannot be read.
    """
    if (found := _begins(path)) != MAGIC:
        raise ValueError(
            f"a GGUF file must begin with the letters GGUF; {str(path)!r} begins with {found!r}; "
            "fetch it again, or give a folder that a model was saved in"
        )
    check_reader()


def check_reader() -> None:
    """Raises ValueError if the package that reads GGUF files is not installed."""
    if find_spec("gguf") is None:
        raise ValueError(
            "GGUF files must be read with the package gguf; it is not installed; in a checkout of "
            'relp type pip install -c constraints.txt ".[real]"'
        )


def dequantised(path: Path) -> tuple[Any, Any]:
    """The model of a GGUF file in float32, and its tokenizer.

    `config.quantization` says how the weights are stored in the file, as `Q4_1 (4-bit)`.

    Raises:
        ValueError: the file is not whole, or not of an architecture that transformers reads.
    """
    check_gguf(path)
    label, scaled = _contents(path)
    import torch
    import transformers

    place: dict[str, Any] = {
        "pretrained_model_name_or_path": str(path.parent.absolute()),
        "gguf_file": path.name,
    }
    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    if packs := getattr(transformers, "GgufConfig", None):  # since it can keep weights packed
        options["quantization_config"] = packs(dequantize=True)
    with quiet():
        try:
            # the file's header takes seconds to read, so what is made of it is handed on
            options["config"] = transformers.AutoConfig.from_pretrained(**place)
            tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
            model, found = transformers.AutoModelForCausalLM.from_pretrained(**place, **options)
        except Exception as error:  # transformers raises whatever its parts do
            raise _unreadable(path, error) from error
    if lacking := sorted(found["missing_keys"]) + sorted(map(str, found["mismatched_keys"])):
        raise _unreadable(path, f"it has no {lacking[0]}, of {len(lacking)} weights that it lacks")
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    rotary = getattr(model.config, "rope_parameters", None) or {}
    if scaled and rotary.get("rope_type", "default") == "default":
        warnings.warn(
            f"{str(path)!r} scales the frequencies of its rotary positions, which transformers "
            "does not read from GGUF files; its numbers will differ a little from those of the "
            "original model",
            stacklevel=4,  # who calls `zoo.load`
        )
    if label:
        model.config.quantization = label
    return model, tokenizer


def _contents(path: Path) -> tuple[str, bool]:
    """How most quantised weights are stored, empty if none is; whether positions are scaled."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except Exception as error:  # a file that ends early fails wherever it ends
        raise _unreadable(path, error) from error
    sizes: Counter[str] = Counter()
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    names = [*reader.fields, *(tensor.name for tensor in reader.tensors)]
    scaled = any(n.startswith("rope_f") or n.endswith(".rope.scaling.type") for n in names)
    packed = sorted(sizes.keys() - FLOATS)
    kind = max(packed, key=sizes.__getitem__, default="")
    bits = re.search(r"\d+", kind)
    return f"{kind} ({bits[0]}-bit)" if bits else kind, scaled


def _unreadable(path: Path, reason: object) -> ValueError:
    first = next(iter(str(reason).strip().splitlines()), type(reason).__name__)
    return ValueError(
        "a GGUF file must be whole and of an architecture that transformers reads from GGUF; "
        f"{str(path)!r} could not be read ({first}); fetch it again, or load the model that it "
        "was made of"
    )


def _begins(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(MAGIC))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of transformers."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
