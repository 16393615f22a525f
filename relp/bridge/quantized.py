"""Weights of a few bits: refused where they are still packed, named where they once were.

A rule acts on what a module computes with. A packed module hands its numbers to a kernel of its own
or unpacks them on the way, so that edges would be read off a matrix that is none; dequantised
weights are ordinary ones, but results should say that they were of four bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["check_unpacked", "quantization"]

WIDTHS = (("in_features", "out_features"), ("infeatures", "outfeatures"))
"""How linear modules call their two widths."""


def quantization(model: Any) -> str:
    """How the weights were stored before they became ordinary ones; empty if they always were.

    >>> from relp.bridge import quantization
    >>> quantization(model)                       # "Q4_1 (4-bit)" of zoo.load("smollm2-135m")
    ''

    `config.quantization` says it, which `tasks.zoo` writes; else the `quantization_config` that
    transformers leaves in a model, such as one loaded with `gguf_file`.
    """
    config = getattr(getattr(model, "original_model", model), "config", None)
    said = getattr(config, "quantization", None)
    return said if isinstance(said, str) else _method(config)


def check_unpacked(model: nn.Module) -> None:
    """Refuses a model whose modules do not compute with ordinary matrices.

    Raises:
        ValueError: a weight is packed, of one byte, or of a class of its own, or the model's
            `quantization_config` is still active.
    """
    for name, module in model.named_modules():
        if reason := _packed(module):
            raise ValueError(
                "the model's weights must be ordinary floating-point matrices; "
                f"{_plain(name)!r}, a {type(module).__name__}, has {reason}; load the model "
                "without quantisation, or "
                "dequantise it (a GGUF file: zoo.load('model.gguf')), as rules and patches of "
                "packed weights would be of another model"
            )
    config = getattr(model, "config", None)
    settings = getattr(config, "quantization_config", None)
    # a GGUF file's blocks are packed in modules, which were looked at, or not at all
    if (method := _method(config)) not in ("", "gguf") and not _of(settings, "dequantize"):
        raise ValueError(
            "the model's weights must be ordinary floating-point matrices; its "
            f"`quantization_config` of method {method!r} is still active; load the model without "
            "quantisation, or call its dequantize()"
        )


def _method(config: Any) -> str:
    """The quantiser that a model's configuration names, or empty."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return ""
    method = _of(settings, "quant_method")
    return str(getattr(method, "value", method) or type(settings).__name__)


def _of(settings: Any, name: str) -> Any:
    """An entry of a configuration, which may be a dictionary."""
    return settings.get(name) if isinstance(settings, Mapping) else getattr(settings, name, None)


def _packed(module: nn.Module) -> str:
    """What of a module's own tensors is no ordinary weight, in words; empty if all are."""
    if not (module._parameters or module._buffers):  # most, and this is asked of all
        return ""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    for name, parameter in own.items():
        if type(parameter) is not nn.Parameter:  # bitsandbytes, torchao, quanto
            return f"a `{name}` of class {type(parameter).__name__}"
        if parameter.element_size() < 2:  # int8, packed uint8, float8
            return f"a `{name}` of {_dtype(parameter)}"
    widths = next((w for w in WIDTHS if all(hasattr(module, n) for n in w)), None)
    if widths is None and "Linear" not in type(module).__name__:
        return ""
    for name, tensor in (own | module._buffers).items():  # GPTQ, AWQ: packed in whole numbers
        if (
            tensor is not None
            and tensor.dim() > 1
            and not (_is_real(tensor) or tensor.dtype == torch.bool)
        ):
            return f"a `{name}` of {_dtype(tensor)}"
    matrix = own.get("weight")
    if matrix is not None and widths is not None:
        d_in, d_out = (getattr(module, n) for n in widths)
        if matrix.numel() != d_in * d_out:
            return f"a `weight` of shape {list(matrix.shape)} in place of [{d_out}, {d_in}]"
    return ""


def _plain(name: str) -> str:
    """Without what a bridge puts between the names of modules."""
    return name.replace("._original_component", "")


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
