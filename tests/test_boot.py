"""What `zoo.load` takes besides names: loaded models and GGUF files, and what it refuses."""

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from test_cli import refused
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from relp.bridge import quantization
from tasks import zoo
from tasks.zoo import gguf

TOKENS = torch.tensor([[3, 1, 4, 1, 5]])


# -- a loaded model --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_is_wrapped_as_it_is(llama_folder: Path, dtype: torch.dtype) -> None:
    inner = LlamaForCausalLM.from_pretrained(llama_folder, dtype=dtype).train()
    expected = LlamaForCausalLM.from_pretrained(
        llama_folder, dtype=dtype, attn_implementation="eager"
    )
    model = zoo.load(inner, AutoTokenizer.from_pretrained(llama_folder))
    assert (model.cfg.model_name, model.cfg.dtype, model.training) == ("tiny-llama", dtype, False)
    assert model.original_model is inner and {p.dtype for p in inner.parameters()} == {dtype}
    assert torch.equal(model(TOKENS), expected(TOKENS).logits)
    assert quantization(model) == ""


def test_a_model_made_in_memory_is_called_by_its_class(llama_folder: Path) -> None:
    inner = LlamaForCausalLM(AutoConfig.from_pretrained(llama_folder))
    inner.config.name_or_path = ""
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    assert zoo.load(inner, tokenizer).cfg.model_name == "LlamaForCausalLM"


def test_a_loaded_model_needs_its_tokenizer() -> None:
    config = LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(TypeError) as error:
        zoo.load(LlamaForCausalLM(config))
    assert str(error.value) == (
        "`tokenizer` must be given with a loaded model; got none with a LlamaForCausalLM; give "
        "AutoTokenizer.from_pretrained(...) of the same model"
    )


@pytest.mark.parametrize("what", [None, 3, torch.nn.Linear(2, 2)])
def test_something_else_is_no_model(what: Any) -> None:
    with pytest.raises(TypeError) as error:
        zoo.load(what)
    assert str(error.value) == (
        "`model` must be a name, a path or a loaded model of transformers; got a "
        f"{type(what).__name__}; `zoo.names()` lists the names"
    )


def test_a_folder_is_loaded_by_its_path_with_any_tokenizer(llama_folder: Path) -> None:
    model = zoo.load(llama_folder)
    expected = LlamaForCausalLM.from_pretrained(llama_folder, attn_implementation="eager")
    device = next(model.parameters()).device
    torch.testing.assert_close(model(TOKENS.to(device)).cpu(), expected(TOKENS).logits)
    mine = AutoTokenizer.from_pretrained(llama_folder)
    mine.add_tokens(["<mine>"])
    assert "<mine>" in zoo.load(llama_folder, mine).tokenizer.get_vocab()


# -- GGUF files, with a stand-in for the package that reads them -----------------------------------


class Reader:
    """As `gguf.GGUFReader`, of a file with these tensors (kind, numbers) and fields."""

    tensors: dict[str, tuple[str, int]] = {}
    fields: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        self.fields = type(self).fields
        self.tensors = [
            SimpleNamespace(name=name, tensor_type=SimpleNamespace(name=kind), n_elements=size)
            for name, (kind, size) in type(self).tensors.items()
        ]  # type: ignore[assignment]


FOUR = {"a": ("F32", 90), "b": ("Q8_0", 20), "c": ("Q4_1", 15), "d": ("Q4_1", 10)}


@pytest.fixture
def file(tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that begins as a GGUF one does; what transformers would read lies elsewhere."""
    path = tmp_path / "tiny.Q4_1.gguf"
    path.write_bytes(b"GGUF and what follows")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Reader, "tensors", FOUR)
    monkeypatch.setattr(Reader, "fields", ())
    monkeypatch.setitem(sys.modules, "gguf", SimpleNamespace(GGUFReader=Reader))
    monkeypatch.setattr(gguf, "find_spec", lambda name: name == "gguf" or None)
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        kind = getattr(transformers, name)

        def read(folder: str = "", *, gguf_file: str = "", kind: Any = kind, **options: Any) -> Any:
            if not gguf_file:
                return kind.from_pretrained(folder)
            assert Path(options.pop("pretrained_model_name_or_path"), gguf_file) == path
            packs = options.pop("quantization_config", None)
            assert packs is None or packs.dequantize
            return kind.from_pretrained(llama_folder, **options)

        monkeypatch.setattr(transformers, name, SimpleNamespace(from_pretrained=read))
    return path


def test_a_gguf_file_or_its_folder_is_a_model(file: Path, llama_folder: Path) -> None:
    expected = LlamaForCausalLM.from_pretrained(llama_folder, attn_implementation="eager")
    for where in (file, str(file), file.parent, "tiny.Q4_1.gguf", "."):
        model = zoo.load(where)
        assert (model.cfg.model_name, quantization(model)) == ("tiny.Q4_1", "Q4_1 (4-bit)")
        assert torch.equal(model(TOKENS), expected(TOKENS).logits) and not model.training
    renamed = file.rename("no suffix")
    assert gguf.is_gguf(renamed) and not gguf.is_gguf(file)


@pytest.mark.parametrize(
    ("tensors", "label"),
    [
        (FOUR, "Q4_1 (4-bit)"),
        ({"a": ("IQ2_XXS", 9), "b": ("Q6_K", 8)}, "IQ2_XXS (2-bit)"),
        ({"a": ("TQ1_0", 9)}, "TQ1_0 (1-bit)"),
        ({"a": ("MXFP4", 9), "b": ("BF16", 10)}, "MXFP4 (4-bit)"),
        ({"a": ("F16", 9), "b": ("BF16", 9), "c": ("F32", 9)}, ""),
    ],
)
def test_the_label_is_how_most_packed_weights_are_stored(
    file: Path, monkeypatch: pytest.MonkeyPatch, tensors: Any, label: str
) -> None:
    monkeypatch.setattr(Reader, "tensors", tensors)
    assert quantization(zoo.load(file)) == label


@pytest.mark.parametrize("where", ["fields", "tensors"])
def test_scaled_positions_are_told_of(
    file: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    if where == "fields":
        monkeypatch.setattr(Reader, "fields", ("llama.rope.scaling.type",))
    else:
        monkeypatch.setattr(Reader, "tensors", {**FOUR, "rope_freqs.weight": ("F32", 3)})
    with pytest.warns(UserWarning) as warned:
        zoo.load(file)
    assert [str(w.message) for w in warned] == [
        f"{str(file)!r} scales the frequencies of its rotary positions, which transformers does "
        "not read from GGUF files; its numbers will differ a little from those of the original "
        "model"
    ]


def unreadable(file: Any, reason: str) -> str:
    return (
        "a GGUF file must be whole and of an architecture that transformers reads from GGUF; "
        f"{str(file)!r} could not be read ({reason}); fetch it again, or load the model that it "
        "was made of"
    )


def test_a_file_that_ends_early(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(*_: Any) -> None:
        raise IndexError("index 0 is out of bounds for axis 0 with size 0")

    monkeypatch.setattr(Reader, "__init__", ends)
    message = unreadable(file.name, "index 0 is out of bounds for axis 0 with size 0")
    assert refused("coverage", file.name) == message


def test_an_architecture_that_transformers_does_not_read(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "GGUF model with architecture clip is not supported yet."

    def unsupported(**_: Any) -> None:
        raise ValueError(f"\n{reason}\nand more")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unsupported)
    assert refused("coverage", file.name) == unreadable(file.name, reason)


def test_weights_that_are_not_there_are_no_random_ones(
    file: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = transformers.AutoModelForCausalLM.from_pretrained

    def lacking(**options: Any) -> Any:
        model, found = read(**options)
        return model, found | {"missing_keys": {"model.norm.weight", "lm_head.weight"}}

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lacking)
    reason = "it has no lm_head.weight, of 2 weights that it lacks"
    assert refused("coverage", file.name) == unreadable(file.name, reason)


def test_a_file_that_is_no_gguf_one(file: Path) -> None:
    file.write_bytes(b"<html>not found")
    for name in (file.name, "."):
        shown = name if name != "." else file.name
        assert refused("coverage", name) == (
            f"a GGUF file must begin with the letters GGUF; {shown!r} begins with b'<htm'; fetch "
            "it again, or give a folder that a model was saved in"
        )


def test_gguf_without_the_extra(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    assert refused("discover", "--model", file.name) == (
        "GGUF files must be read with the package gguf; it is not installed; in a checkout of relp "
        'type pip install -c constraints.txt ".[real]"'
    )


def test_a_folder_of_two_gguf_files(file: Path, llama_folder: Path) -> None:
    file.with_name("other.gguf").write_bytes(b"GGUF")
    assert refused("patch", "--model", ".") == (
        "a folder of GGUF files must hold exactly one; '.' holds 2, 'other.gguf' first; give the "
        "path of one of them"
    )
    for part in llama_folder.iterdir():  # beside a saved model they are not asked for
        Path(part.name).write_bytes(part.read_bytes())
    assert zoo.load(".").cfg.n_layers == 3


def test_an_unknown_name_lists_those_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    def offline(name: str) -> None:
        warnings.warn("retrying", stacklevel=1)
        raise OSError("We couldn't connect to the hub.")

    monkeypatch.setattr(TransformerBridge, "boot_transformers", offline)
    with pytest.raises(ValueError) as error:
        zoo.load("ioi-bert")
    assert str(error.value) == (
        "the model must be one of ioi-gpt2, ioi-llama, smollm2-135m, a folder or GGUF file that "
        "holds one, or a name on the Hugging Face hub; 'ioi-bert' is no folder here and could not "
        "be fetched (We couldn't connect to the hub.); check the spelling and the connection, or "
        "give the path of a folder"
    )
    with pytest.raises(ValueError, match="got an empty name; for the folder you are in give '.'"):
        zoo.load("")
