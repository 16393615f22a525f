"""A planted circuit: the model, its task, and the edges that are true."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tasks.planted.weights import SPECIAL, Wiring, transformer
from tasks.task import Task
from tasks.zoo.boot import wrapped

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

__all__ = ["Factory", "Pair", "Plan", "Planted", "circuit"]


class Pair(NamedTuple):
    """One pair of prompts, with one space between words, and the words that may follow."""

    clean: str
    corrupt: str
    answer: str
    foil: str


@dataclass(frozen=True, eq=False)
class Plan:
    """What a circuit's file says: the wiring, the prompts, and what is true of them."""

    wiring: Wiring
    pairs: Sequence[Pair]
    edges: Iterable[str]
    direction: str
    about: str
    hidden: Iterable[str] = ()
    kinds: int = 1
    """How many kinds of pairs take turns: all of them together show all of the edges."""


@dataclass(frozen=True, eq=False)
class Planted:
    """A model that was written, not trained, so that all its causal edges are known.

    >>> made = planted.plant("induction", pairs=4)
    >>> sorted(made.edges)[:2]
    ['L0H0->L1H0.k', 'L1H0->logits.in']
    """

    name: str
    model: TransformerBridge
    task: Task
    edges: frozenset[str]
    """What patching one edge alone in `direction` must see, as `writer->reader`; without noise,
    each other edge alone moves the metric by less than a hundredth of its gap."""
    direction: str
    """`denoise` or `noise`."""
    about: str
    """What it is built to break, in a line."""
    hidden: frozenset[str]
    """Edges that act only while others are cut: in `direction`, none shows alone."""
    original: PreTrainedModel = field(repr=False)
    """The model as transformers has it."""

    def save(self, folder: str | Path) -> None:
        """Writes model and tokenizer as the hub's libraries do, and the truth as `planted.json`.

        >>> planted.plant("induction", pairs=4).save("planted-induction")

        The folder appears whole or not at all; `zoo.load` takes it.

        Raises:
            FileExistsError: there is something of that name.
            OSError: the folder around it does not exist or cannot be written.
        """
        folder = Path(folder)
        if folder.exists():
            raise FileExistsError(
                f"the folder to write must be a new one; {str(folder)!r} exists; choose another "
                "name, or delete it"
            )
        if not folder.parent.is_dir():
            raise FileNotFoundError(
                f"the folder to write must lie in one that exists; {str(folder.parent)!r} is none; "
                "create it first"
            )
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            made = scratch / "made"  # a temporary folder is its owner's alone
            self.original.save_pretrained(made)
            self.model.tokenizer.save_pretrained(made)
            (made / "planted.json").write_text(json.dumps(self.truth(), indent=1) + "\n", "utf-8")
            os.replace(made, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def truth(self) -> dict[str, Any]:
        """All that is not weights, as JSON has it.

        >>> planted.plant("induction", pairs=4).truth()["direction"]
        'denoise'
        """
        decode = self.model.tokenizer.convert_ids_to_tokens
        sides = {side: getattr(self.task, side).tolist() for side in ("clean", "corrupt")}
        return {
            "name": self.name,
            "about": self.about,
            "direction": self.direction,
            "edges": sorted(self.edges),
            "hidden": sorted(self.hidden),
            **{side: [" ".join(decode(row[1:])) for row in rows] for side, rows in sides.items()},
            "answers": decode(self.task.answers.tolist()),
            "foils": decode(self.task.foils.tolist()),
        }


Factory = Callable[..., Planted]
"""`(pairs=16, seed=0, noise=0.0, distractors=0)`."""


def circuit(plan: Callable[[random.Random, int], Plan]) -> Factory:
    """Makes the factory of a circuit of a function that draws so many pairs of it.

    >>> from tasks.planted.factory import circuit
    >>> @circuit
    ... def mine(rng, pairs): ...
    """

    def factory(
        pairs: int = 16, seed: int = 0, noise: float = 0.0, distractors: int = 0
    ) -> Planted:
        _check(pairs, noise, distractors)
        drawn = plan(random.Random(f"{plan.__name__} {seed}"), pairs)
        if pairs < drawn.kinds:
            raise ValueError(
                f"`pairs` must be at least {drawn.kinds} for {plan.__name__!r}, one of each kind, "
                f"or some true edges would carry nothing; got {pairs}; ask for 16"
            )
        with torch.random.fork_rng(devices=[]):  # libraries draw weights that are written over
            model = transformer(drawn.wiring, noise=noise, distractors=distractors, seed=seed)
            return _planted(plan.__name__, drawn, model)

    update_wrapper(factory, plan)
    del factory.__wrapped__  # type: ignore[attr-defined]  # help should show the dials
    factory.__annotations__ = {"pairs": int, "seed": int, "noise": float, "distractors": int}
    return factory


def _planted(name: str, drawn: Plan, model: PreTrainedModel) -> Planted:
    """Boots the model, and makes the task of its prompts."""
    tokenizer = _tokenizer(drawn.wiring.words)
    original = deepcopy(model)  # a bridge takes the other one apart
    return Planted(
        name=name,
        model=wrapped(model, tokenizer, name=f"planted-{name}"),
        task=Task.from_prompts(
            tokenizer,
            clean=[pair.clean for pair in drawn.pairs],
            corrupt=[pair.corrupt for pair in drawn.pairs],
            answers=[f" {pair.answer}" for pair in drawn.pairs],
            foils=[f" {pair.foil}" for pair in drawn.pairs],
            name=name,
        ),
        edges=frozenset(drawn.edges),
        direction=drawn.direction,
        about=drawn.about,
        hidden=frozenset(drawn.hidden),
        original=original,
    )


def _tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    bos, unknown = SPECIAL
    known = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=bos, pad_token=bos, unk_token=unknown
    )


def _check(pairs: int, noise: float, distractors: int) -> None:
    if not isinstance(pairs, int) or pairs < 1:
        raise ValueError(
            f"`pairs` must be a whole number of at least 1; got {pairs!r}; ask for 16 to start with"
        )
    if not 0 <= noise < float("inf"):
        raise ValueError(
            "`noise` must be a share of the weights' own size, 0 or more; got "
            f"{noise!r}; 0 leaves the construction as it is, 0.05 is a little"
        )
    if not isinstance(distractors, int) or distractors < 0:
        raise ValueError(
            "`distractors` must be a whole number of heads, 0 or more; got "
            f"{distractors!r}; ask for 8 to start with"
        )
