"""What the dictionaries are trained on, and what they are judged on: two sources of texts.

A shipped model's texts are those that it was itself trained on, `tasks.zoo.corpus`.

SmolLM2's training texts are not on this machine, and nothing is fetched. In their place stand
prose that every installation has (the topics of `pydoc`, docstrings of the standard library, the
READMEs of installed packages), prompts of all ready tasks, clean and corrupt, so that the
dictionaries know what circuits will be asked of them, and texts that the model itself writes at
temperature 1 from the beginning-of-sequence token on: nothing else is so near to what it knows.
"""

from __future__ import annotations

import ast
import math
import random
import sysconfig
import zlib
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from tasks.task import Task

__all__ = ["Corpus", "Mixture", "Rows", "Texts", "prose"]

Rows = list[list[int]]
"""Token ids of texts, each with the beginning-of-sequence token."""


@runtime_checkable
class Texts(Protocol):
    """Where texts come from."""

    def round(self, number: int, count: int) -> Rows:
        """Texts of a round of training; of each number always the same."""
        ...

    def held_out(self) -> Rows:
        """Texts that are never trained on."""
        ...

    def tasks(self) -> dict[str, Task]:
        """What the model can do, on prompts that are never trained on."""
        ...


class Corpus:
    """Documents of `tasks.zoo.corpus`, drawn anew each round."""

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed

    def round(self, number: int, count: int) -> Rows:
        """Documents without the combinations that the model was not trained on either."""
        from tasks.zoo.corpus import document

        rng = random.Random(f"dictionaries {self.seed} {number}")
        return _encoded(self.tokenizer, [document(rng) for _ in range(count)])

    def held_out(self) -> Rows:
        """Documents of another seed, and prompts of combinations that were never trained on."""
        from tasks.zoo.corpus import document, held_out_prompts

        rng = random.Random("dictionaries held-out")
        unseen = [f"{p.text()} {p.io}." for p in held_out_prompts(256, seed=1)]
        return _encoded(self.tokenizer, [document(rng) for _ in range(256)] + unseen)

    def tasks(self) -> dict[str, Task]:
        """Indirect object identification, with combinations that were never trained on."""
        from tasks.prompts import build
        from tasks.zoo.corpus import held_out_prompts

        pairs = [p.pair("flip") for p in held_out_prompts(256)]
        return {"ioi": build(self.tokenizer, pairs, name="ioi")}


LENGTH = 128
"""Tokens in a row of prose, and in one that the model writes."""
WRITTEN = 128
"""Rows that the model writes in one go."""
OWN_SHARE = 3
"""One row of so many rows of prose is added that the model wrote."""
HELD_OUT_SHARE = 16
"""One row of so many is never trained on."""
PROMPTS = 8
"""Pairs of each task in a round."""
JUDGED = ("ioi", "subject_verb_simple", "greater_than", "gendered_pronoun")


class Mixture:
    """Prose, prompts and texts of the model's own.

    Args:
        tokenizer: the model's.
        model: the folder that it was saved in.
        folder: where what the model writes is kept while the training lasts.
        rows: of prose that will be asked for, all rounds together.
        seed: of order and writing.
    """

    def __init__(self, tokenizer: Any, model: Path, folder: Path, rows: int, seed: int) -> None:
        self.tokenizer = tokenizer
        found = _cut(tokenizer, prose())
        trained = WRITTEN * (1 - 1 / HELD_OUT_SHARE)
        own = written(model, folder, math.ceil(rows / OWN_SHARE / trained), seed)
        self.prose, kept = _parted(found)
        self.own, kept_own = _parted(own)
        for some in (self.prose, kept):
            random.Random(f"prose {seed}").shuffle(some)
        self.kept = [*kept[:96], *kept_own]

    def round(self, number: int, count: int) -> Rows:
        """`count` rows of prose, a third as many of the model's own, and prompts of all tasks."""
        from tasks.registry import TASKS, builder

        rows = _slice(self.prose, number, count) + _slice(self.own, number, count // OWN_SHARE)
        for name in TASKS:
            task = builder(name)(self.tokenizer, pairs=PROMPTS, seed=1000 + number)
            for side in (task.clean, task.corrupt):
                rows += [row[:n].tolist() for row, n in zip(side, task.lengths, strict=True)]
        return rows

    def held_out(self) -> Rows:
        """Prose and texts of the model's own."""
        return self.kept

    def tasks(self) -> dict[str, Task]:
        """Four tasks that the model can do; prompts of the seed that is the default everywhere."""
        from tasks.registry import builder

        return {name: builder(name)(self.tokenizer, pairs=32, seed=0) for name in JUDGED}


def prose() -> list[str]:
    """English texts that need no network, in an order that hangs on the installation alone."""
    from pydoc_data.topics import topics

    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    found = [topics[name] for name in sorted(topics)] + [_docstrings(path) for path in library]
    packages = {dist.name: dist for dist in distributions()}
    for name in sorted(packages):
        headers_and_readme = packages[name].read_text("METADATA") or ""
        found.append(headers_and_readme.partition("\n\n")[2])
    return [text for text in found if len(text) > 500]


def written(model: Path, folder: Path, batches: int, seed: int) -> Rows:
    """What the model writes from nothing; each batch is kept in `folder` when it is done."""
    paths = [folder / f"written-{batch}.safetensors" for batch in range(batches)]
    missing = [(batch, path) for batch, path in enumerate(paths) if not path.exists()]
    if missing:
        from transformers import AutoModelForCausalLM

        from tasks.zoo.gguf import quiet

        # Not the bridge's: around its modules transformers' cache of keys and values goes wrong.
        with quiet():
            writer = AutoModelForCausalLM.from_pretrained(model).eval()
        folder.mkdir(parents=True, exist_ok=True)
        for batch, path in tqdm(missing, desc="writing"):
            tokens = _sampled(writer, WRITTEN, 1000 * seed + batch)
            fresh = path.with_suffix(".tmp")
            save_file({"tokens": tokens}, fresh)
            fresh.replace(path)
    return [row for path in paths for row in load_file(path)["tokens"].tolist()]


@torch.no_grad()
def _sampled(writer: Any, rows: int, seed: int) -> Tensor:
    start = torch.full((rows, 1), int(writer.config.bos_token_id))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokens: Tensor = writer.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=LENGTH - 1,
            max_new_tokens=LENGTH - 1,
            pad_token_id=writer.config.bos_token_id,  # unused: all rows are of one length
        )
    return tokens


def _encoded(tokenizer: Any, texts: Sequence[str]) -> Rows:
    made = tokenizer(list(texts), add_special_tokens=False).input_ids
    return [[tokenizer.bos_token_id, *ids] for ids in made]


def _cut(tokenizer: Any, texts: Sequence[str]) -> Rows:
    """Rows of the full length; what is left at the end of a text is dropped."""
    size = LENGTH - 1
    rows: Rows = []
    for _, *ids in _encoded(tokenizer, texts):
        starts = range(0, len(ids) - size + 1, size)
        rows += [[tokenizer.bos_token_id, *ids[at : at + size]] for at in starts]
    return rows


def _parted(rows: Rows) -> tuple[Rows, Rows]:
    """What is trained on, and what is not: it hangs on a row's own tokens."""
    seen: Rows = []
    kept: Rows = []
    for row in rows:
        out = zlib.crc32(str(row).encode()) % HELD_OUT_SHARE == 0
        (kept if out else seen).append(row)
    return seen, kept


def _slice(rows: Rows, number: int, count: int) -> Rows:
    """The rows of a round; behind the last comes the first."""
    return [rows[(number * count + i) % len(rows)] for i in range(count)]


def _docstrings(path: Path) -> str:
    tree = ast.parse(path.read_bytes())
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, kinds))
    return "\n\n".join(text for text in found if text)
