"""Saved and loaded models, ready for use: what can be one, and the one way to boot it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tasks.zoo.downloads import DOWNLOADS, check_fetchable, fetched, kept
from tasks.zoo.gguf import check_gguf, dequantised, is_gguf, quiet
from tasks.zoo.placement import Placement, mixed
from tasks.zoo.shelf import HERE, names, shipped

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

__all__ = ["boot", "check_model", "wrapped"]

WEIGHTS = ("*.safetensors", "*.bin")
TOKENIZERS = ("*token*", "*vocab*", "*.model", "*merges*", "*.tiktoken", "tekken.json")
"""What a model's folder holds of each, as the hub's libraries write it."""
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def check_model(name: str) -> None:
    """Refuses, before anything is imported, what no model can be loaded from.

    Raises:
        ValueError: there is no model of that name, no such folder or GGUF file, and no hub could
            have the name; or something that it needs is missing.
    """
    if name in shipped():
        return
    if name in DOWNLOADS:
        return None if kept(DOWNLOADS[name]) else check_fetchable(DOWNLOADS[name])
    if not name:  # as a path it would be the folder that one is in
        raise ValueError(f"{_wanted()}; got an empty name; for the folder you are in give '.'")
    path = Path(name).expanduser()
    if path.is_dir():
        _check_folder(name, path)
    elif is_gguf(path):
        check_gguf(path)
    elif path.exists():
        raise ValueError(
            f"{_wanted()}; {name!r} is another file; give the folder that the model lies in"
        )
    elif not HUB_NAME.fullmatch(name):
        raise ValueError(f"{_wanted()}; there is no folder {name!r}; check the path")


def boot(name: str, tokenizer: Any, placement: Placement) -> TransformerBridge:
    """The model of a name, a folder or a GGUF file; errors are those of `zoo.load`."""
    check_model(name)
    if name in names():
        folder = fetched(DOWNLOADS[name]) if name in DOWNLOADS else HERE / name
        unasked = placement.device is None and placement.device_map is None
        options = placement.options() | ({"device": "cpu"} if unasked else {})
        with quiet():
            model = _booted(name, str(folder), tokenizer, options)
        return _named(model, name)  # results should name it, not a folder of this machine
    path = Path(name).expanduser()
    if (gguf := _gguf(path)) is not None:
        return _unpacked(gguf, tokenizer, placement)
    return _booted(name, str(path) if path.is_dir() else name, tokenizer, placement.options())


def _unpacked(gguf: Path, tokenizer: Any, placement: Placement) -> TransformerBridge:
    """The model of a GGUF file, which is dequantised on the CPU and goes from there."""
    if placement.device_map is not None:
        raise ValueError(
            "`device_map` must go with a saved model; a GGUF file is dequantised whole, on the "
            f"CPU; got {placement.device_map!r} with {gguf.name!r}; give `device`, or load a "
            "folder that model.original_model.save_pretrained has written"
        )
    loaded, own = dequantised(gguf)
    options = placement.options()
    if placement.device == "auto":
        from transformer_lens.utilities import get_device

        options["device"] = get_device()
    loaded.to(**options)
    return wrapped(loaded, own if tokenizer is None else tokenizer, name=gguf.stem)


def wrapped(model: Any, tokenizer: Any, *, name: str | None = None) -> TransformerBridge:
    """A bridge around a loaded transformers model, which stays where it is and as precise."""
    name = name or Path(str(model.config.name_or_path)).name or type(model).__name__
    options = {"hf_model": model, "dtype": model.dtype}
    return _named(_booted(name, name, tokenizer, options), name)


def _booted(name: str, source: str, tokenizer: Any, options: dict[str, Any]) -> TransformerBridge:
    from transformer_lens.model_bridge import TransformerBridge

    try:
        with warnings.catch_warnings(), _saved(tokenizer) as taken:
            warnings.simplefilter("ignore")
            model = TransformerBridge.boot_transformers(source, **options, **taken)
    except Exception as error:  # the hub, configs and adapters each raise their own kind
        if "mixes CPU/disk offload" in str(error):  # accelerate's own map turned out so
            raise ValueError(mixed(f"{options.get('device_map')!r} for {name!r}")) from error
        raise _not_booted(name, error, here="hf_model" in options or source != name
                          or Path(source).exists()) from error  # fmt: skip
    if model.tokenizer is None:
        raise ValueError(
            f"the model must have a tokenizer to build a task; {name!r} has none; save one into "
            "its folder with tokenizer.save_pretrained"
        )
    return model.eval()


@contextmanager
def _saved(tokenizer: Any) -> Iterator[dict[str, Any]]:
    """A tokenizer as the bridge can take it: it reads each anew from where it was saved.

    That may be nowhere, or a GGUF file, or hold another tokenizer than the one that was given.
    """
    if tokenizer is None:
        yield {}
        return
    from transformers import AutoTokenizer

    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        yield {"tokenizer": AutoTokenizer.from_pretrained(folder)}


def _named(model: TransformerBridge, name: str) -> TransformerBridge:
    model.cfg.model_name = name
    return model


def _gguf(path: Path) -> Path | None:
    """The GGUF file that a path leads to: itself, or the only one in a folder of no saved model."""
    if path.is_dir() and not (path / "config.json").exists():
        return next(path.glob("*.gguf"), None)
    return path if is_gguf(path) else None


# -- errors ----------------------------------------------------------------------------------------


def _wanted() -> str:
    return (
        f"the model must be one of {', '.join(names())}, a folder or GGUF file that holds one, or "
        "a name on the Hugging Face hub"
    )


def _check_folder(name: str, folder: Path) -> None:
    """Says which part of a saved model is missing, unless a GGUF file holds all of them."""
    files = sorted(folder.glob("*.gguf"))
    if files and not (folder / "config.json").exists():
        if len(files) > 1:
            raise ValueError(
                f"a folder of GGUF files must hold exactly one; {name!r} holds {len(files)}, "
                f"{files[0].name!r} first; give the path of one of them"
            )
        return check_gguf(files[0])
    for what, patterns, mend in (
        ("config.json", ("config.json",), "save the model there with model.save_pretrained"),
        ("weights", WEIGHTS, "save the model there with model.save_pretrained"),
        ("tokenizer", TOKENIZERS, "save its own there with tokenizer.save_pretrained"),
    ):
        if not any(file for pattern in patterns for file in folder.glob(pattern)):
            raise ValueError(
                f"a model's folder must hold config.json, weights ({' or '.join(WEIGHTS)}) and a "
                f"tokenizer; {name!r} has no {what}; {mend}"
            )


def _not_booted(name: str, error: Exception, *, here: bool) -> ValueError:
    lines = (line.strip() for line in str(error).splitlines())
    reason = next((line for line in lines if line), type(error).__name__)
    if name in DOWNLOADS:
        do = f"fetch it anew: relp models --remove {name}, then the same again"
    elif here:
        do = "check that TransformerBridge knows its architecture and that its files are whole"
    else:
        return ValueError(
            f"{_wanted()}; {name!r} is no folder here and could not be fetched ({reason}); check "
            "the spelling and the connection, or give the path of a folder"
        )
    return ValueError(f"{_wanted()}; {name!r} could not be booted ({reason}); {do}")
