"""Packed weights are refused by what they are; dequantised ones are told of."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import able_task
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM

from circuits import faithfulness, patch, top
from relp import attribute
from relp.bridge import Sites, quantization
from relp.bridge.quantized import check_unpacked
from tasks import zoo


class Params4bit(nn.Parameter):
    """As that of bitsandbytes: two weights a byte, in one column."""


class Wrapped(torch.Tensor):
    """A tensor that only says what it stands for, as those of torchao."""


class Linear4bit(nn.Linear):
    def __init__(self) -> None:
        super().__init__(48, 32, bias=False)
        packed = torch.zeros(48 * 32 // 2, 1, dtype=torch.uint8)
        self.weight = Params4bit(packed, requires_grad=False)


class Stored(nn.Linear):
    """A linear layer with this in place of its weight."""

    def __init__(self, weight: Any) -> None:
        super().__init__(48, 32, bias=False)
        self.weight = nn.Parameter(weight, requires_grad=False)


class QuantLinear(nn.Module):
    """As that of GPTQ and AWQ: whole numbers in buffers, unpacked by a kernel of its own."""

    def __init__(self, names: tuple[str, str] = ("in_features", "out_features")) -> None:
        super().__init__()
        for name, width in zip(names, (48, 32), strict=True):
            setattr(self, name, width)
        self.register_buffer("qweight", torch.zeros(6, 32, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., :32] * self.get_buffer("scales")


class Packed(nn.Module):
    """Linear by its name alone."""


def packed() -> nn.Module:
    module = Packed()
    module.__class__ = type("HQQLinear", (Packed,), {})
    module.register_parameter(
        "W_q", nn.Parameter(torch.zeros(4, 4, dtype=torch.int32), requires_grad=False)
    )
    return module


FAKES = {
    "bitsandbytes, 4 bits": (Linear4bit, "a `weight` of class Params4bit"),
    "bitsandbytes, 8 bits": (
        lambda: Stored(torch.zeros(32, 48, dtype=torch.int8)),
        "a `weight` of int8",
    ),
    "FP8": (
        lambda: Stored(torch.zeros(32, 48, dtype=torch.float8_e4m3fn)),
        "a `weight` of float8_e4m3fn",
    ),
    "torchao": (
        lambda: Stored(torch.zeros(32, 48).as_subclass(Wrapped)),
        "a `weight` of class Wrapped",
    ),
    "GPTQ": (QuantLinear, "a `qweight` of int32"),
    "old GPTQ": (lambda: QuantLinear(("infeatures", "outfeatures")), "a `qweight` of int32"),
    "HQQ": (packed, "a `W_q` of int32"),
    "another shape": (
        lambda: Stored(torch.zeros(32, 6)),
        "a `weight` of shape [32, 6] in place of [32, 48]",
    ),
}


@pytest.mark.parametrize("fake", FAKES)
def test_a_packed_module_is_refused(fake: str) -> None:
    make, reason = FAKES[fake]
    module = make()
    with pytest.raises(ValueError) as error:
        check_unpacked(nn.ModuleDict({"down": module}))
    assert str(error.value) == (
        "the model's weights must be ordinary floating-point matrices; 'down', a "
        f"{type(module).__name__}, has {reason}; load the model without quantisation, or "
        "dequantise it (a GGUF file: zoo.load('model.gguf')), as rules and patches of packed "
        "weights would be of another model"
    )


def test_ordinary_modules_are_none_of_them(shipped: Any) -> None:
    """Half precision, tables of whole numbers, masks, transposed and reparametrised weights."""
    masked = nn.Linear(3, 2)
    masked.register_buffer("mask", torch.ones(2, 3, dtype=torch.bool))
    table = nn.Module()
    table.register_buffer("index", torch.zeros(3, 3, dtype=torch.int32))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    half = nn.Linear(3, 2).bfloat16()
    away = nn.Linear(3, 2, device="meta")
    check_unpacked(nn.ModuleList([masked, table, normed, half, away, nn.Embedding(3, 2)]))
    check_unpacked(shipped)


@pytest.fixture
def loaded(llama_folder: Path) -> tuple[Any, Any]:
    inner = LlamaForCausalLM.from_pretrained(llama_folder)
    return inner, AutoTokenizer.from_pretrained(llama_folder)


def test_no_verb_runs_a_packed_model(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    model.eval()
    plain = zoo.load(LlamaForCausalLM.from_pretrained(model.config.name_or_path), tokenizer)
    task = able_task(plain, pairs=2, length=5)
    circuit = top(attribute(plain, task, level="edge"), edges=20)
    model.model.layers[1].mlp.down_proj = QuantLinear()
    bridge = zoo.load(model, tokenizer)
    for run in (
        lambda: attribute(bridge, task),
        lambda: attribute(bridge, task, level="edge"),
        lambda: patch(bridge, task),
        lambda: faithfulness(bridge, task, circuit),
        lambda: Sites.of(bridge),
    ):
        with pytest.raises(ValueError, match=r"layers\.1\.mlp.*QuantLinear, has a `qweight` of"):
            run()


@pytest.mark.parametrize(
    "settings",
    [{"quant_method": "fp8"}, SimpleNamespace(quant_method=SimpleNamespace(value="fp8"))],
)
def test_a_quantiser_that_is_still_active_is_refused(settings: Any) -> None:
    model: Any = nn.Linear(3, 2)
    model.config = SimpleNamespace(quantization_config=settings)
    with pytest.raises(ValueError) as error:
        check_unpacked(model)
    assert str(error.value) == (
        "the model's weights must be ordinary floating-point matrices; its `quantization_config` "
        "of method 'fp8' is still active; load the model without quantisation, or call its "
        "dequantize()"
    )
    assert quantization(model) == "fp8"


@pytest.mark.parametrize(
    ("config", "label"),
    [
        ({}, ""),
        ({"quantization": "Q4_1 (4-bit)"}, "Q4_1 (4-bit)"),
        ({"quantization": {"bits": 4}}, ""),  # as MLX has it
        ({"quantization_config": {"quant_method": "gguf"}}, "gguf"),
        ({"quantization_config": {"quant_method": "mxfp4", "dequantize": True}}, "mxfp4"),
    ],
)
def test_dequantised_weights_say_what_they_were(
    loaded: tuple[Any, Any], config: dict[str, Any], label: str
) -> None:
    model, tokenizer = loaded
    for name, value in config.items():
        setattr(model.config, name, value)
    bridge = zoo.load(model, tokenizer)
    task = able_task(bridge, pairs=2, length=5)
    scores = attribute(bridge, task, level="edge")
    circuit = top(scores, edges=20)
    assert quantization(bridge) == scores.provenance.quantization == label
    assert circuit.graph["quantization"] == label
    name = f"tiny-llama, {label}" if label else "tiny-llama"
    assert scores.title == f"RELP · {name} · task · denoise"
    assert scores.title in scores._repr_html_()
    assert (f"quantization={label!r}" in repr(scores)) == bool(label)
