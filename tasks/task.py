"""What a task is: aligned clean and corrupt prompts, their answers, and what is measured.

Prompts of different lengths are never padded for a model: `Task.buckets` yields one sub-task per
length. Where rows of `clean` are shorter than the longest, the tail holds -1, which no embedding
accepts, so that a padded row can never reach a model unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tasks.metrics import BUILT_IN, Metric, clean_answers

__all__ = ["Task"]

PAD = -1


@dataclass(frozen=True, eq=False)
class Task:
    """Pairs of prompts that differ in what the model should answer.

    Build one with `Task.from_prompts` or `Task.from_tokens`, or with a ready task such as
    `tasks.ioi`. `task.metric(logits)` gives one number per pair; the default is the logit of the
    answer minus that of the foil at the pair's answer position, `spans["end"]`.

    Raises:
        ValueError: shapes do not agree, a row of `corrupt` has not the length of its row of
            `clean`, a token id is negative, a span points outside its prompt, or an answer is its
            own foil and the metric their difference.
    """

    clean: Int[Tensor, "pair pos"]
    corrupt: Int[Tensor, "pair pos"]
    answers: Int[Tensor, " pair"]
    foils: Int[Tensor, " pair"]
    spans: Mapping[str, Int[Tensor, " pair"]] = field(default_factory=dict)
    """Named positions, one per pair: for IOI `IO`, `S1`, `S2`, `end`. `end` always exists."""
    metric: Any = "logit_difference"
    """A name, a callable `(logits)` or `(logits, task)`; reading the field gives a bound Metric."""
    name: str = "task"

    def __post_init__(self) -> None:
        pairs = self.clean.shape[0] if self.clean.dim() == 2 else -1
        if pairs < 1 or self.corrupt.shape != self.clean.shape:
            raise ValueError(
                "`clean` and `corrupt` must be token ids [pair, pos] of one shape with at least "
                f"one pair; got {list(self.clean.shape)} and {list(self.corrupt.shape)}; "
                "use Task.from_prompts or Task.from_tokens to build them"
            )
        for label, ids in (("answers", self.answers), ("foils", self.foils)):
            if ids.shape != (pairs,):
                raise ValueError(
                    f"`{label}` must hold one token id per pair, shape [{pairs}]; "
                    f"got {list(ids.shape)}; give one answer token for every prompt"
                )
            if bool((ids < 0).any()):
                i = int((ids < 0).nonzero()[0])
                raise ValueError(
                    f"`{label}` must hold token ids, 0 or more; pair {i} has {int(ids[i])}; "
                    "use the ids that the tokenizer gives"
                )
        misaligned = ((self.clean == PAD) != (self.corrupt == PAD)).any(1).nonzero().flatten()
        if len(misaligned):
            i = int(misaligned[0])
            raise ValueError(
                f"`corrupt` must have the length of `clean`: pair {i} has "
                f"{int((self.clean[i] != PAD).sum())} and {int((self.corrupt[i] != PAD).sum())} "
                "tokens; choose prompts that align token by token"
            )
        lengths = self.lengths
        inside = torch.arange(self.clean.shape[1], device=lengths.device) < lengths[:, None]
        wrong = (inside & ((self.clean < 0) | (self.corrupt < 0))).any(1).nonzero().flatten()
        if len(wrong):
            i = int(wrong[0])
            raise ValueError(
                f"token ids must be non-negative, and {PAD} only after a prompt's end: pair {i} is "
                f"{self.clean[i].tolist()} / {self.corrupt[i].tolist()}; "
                "use Task.from_tokens for prompts of different lengths"
            )
        spans = {k: torch.as_tensor(v, dtype=torch.long) for k, v in self.spans.items()}
        spans.setdefault("end", lengths - 1)
        for label, at in spans.items():
            if at.shape != (pairs,) or bool(((at < 0) | (at >= lengths)).any()):
                raise ValueError(
                    f"span {label!r} must hold one position inside the prompt per pair, shape "
                    f"[{pairs}]; got {at.tolist()[:8]} for lengths {lengths.tolist()[:8]}; "
                    "count positions from 0, the beginning-of-sequence token included"
                )
        object.__setattr__(self, "spans", MappingProxyType(spans))
        function = self.metric.function if isinstance(self.metric, Metric) else self.metric
        if isinstance(function, str):
            if function not in BUILT_IN:
                raise ValueError(
                    f"`metric` must be one of {sorted(BUILT_IN)} or a callable; got {function!r}; "
                    "pass a function logits -> [pair]"
                )
            function = BUILT_IN[function]
        if not callable(function):
            raise TypeError(
                f"`metric` must be one of {sorted(BUILT_IN)} or a callable; got "
                f"{type(function).__name__}; pass a function logits -> [pair]"
            )
        same = (self.answers == self.foils).nonzero().flatten()
        if function in BUILT_IN.values() and len(same):
            i = int(same[0])
            raise ValueError(
                f"an answer must differ from its foil, or their difference is always 0: pair {i} "
                f"has token {int(self.answers[i])} for both; choose another foil, or give a metric "
                "that reads none"
            )
        object.__setattr__(self, "metric", Metric(function, self))

    # -- building ------------------------------------------------------------------------------

    @classmethod
    def from_tokens(
        cls,
        clean: Tensor | Sequence[Tensor] | Sequence[Sequence[int]],
        corrupt: Tensor | Sequence[Tensor] | Sequence[Sequence[int]],
        answers: Tensor | Sequence[int],
        foils: Tensor | Sequence[int],
        *,
        spans: Mapping[str, Tensor | Sequence[int]] | None = None,
        metric: str | Callable[..., Tensor] = "logit_difference",
        name: str = "task",
    ) -> Task:
        """From token ids: `[pair, pos]` tensors, or lists of rows when lengths differ.

        Raises:
            ValueError: a pair's two prompts have different lengths, or a token id is negative.
        """
        rows = [torch.as_tensor(r, dtype=torch.long).flatten() for r in clean]
        others = [torch.as_tensor(r, dtype=torch.long).flatten() for r in corrupt]
        if len(rows) != len(others):
            raise ValueError(
                f"`clean` and `corrupt` must hold as many prompts; got {len(rows)} and "
                f"{len(others)}; every clean prompt needs its corrupt partner"
            )
        for i, (row, other) in enumerate(zip(rows, others, strict=True)):
            if len(row) != len(other):
                raise ValueError(
                    f"`corrupt` must have the length of `clean`: pair {i} has {len(row)} and "
                    f"{len(other)} tokens; choose prompts that align token by token"
                )
            if len(row) == 0 or int(torch.stack([row, other]).min()) < 0:
                raise ValueError(
                    f"token ids must be non-negative and a prompt non-empty: pair {i} is "
                    f"{row.tolist()} / {other.tolist()}; pass the tokenizer's ids without padding"
                )
        return cls(
            clean=_stack(rows),
            corrupt=_stack(others),
            answers=torch.as_tensor(answers, dtype=torch.long),
            foils=torch.as_tensor(foils, dtype=torch.long),
            spans={k: torch.as_tensor(v, dtype=torch.long) for k, v in (spans or {}).items()},
            metric=metric,
            name=name,
        )

    @classmethod
    def from_prompts(
        cls,
        tokenizer: Any,
        clean: Sequence[str],
        corrupt: Sequence[str],
        answers: Sequence[str],
        foils: Sequence[str],
        *,
        metric: str | Callable[..., Tensor] = "logit_difference",
        name: str = "task",
        prepend_bos: bool = True,
    ) -> Task:
        """From text. An answer is what follows its prompt, such as `" Mary"`, and is one token.

        `prepend_bos` puts the tokenizer's beginning-of-sequence token first, as TransformerLens
        does, if it has one.

        Raises:
            ValueError: prompts of a pair tokenize to different lengths, or an answer is not one
                token after its prompt.
        """
        lists = {"clean": clean, "corrupt": corrupt, "answers": answers, "foils": foils}
        for label, texts in lists.items():
            if isinstance(texts, str) or len(texts) != len(clean) or len(texts) == 0:
                count = "one or more" if label == "clean" else len(clean)
                raise ValueError(
                    f"`{label}` must be a list of {count} texts, one per "
                    f"pair; got {texts if isinstance(texts, str) else len(texts)!r}; "
                    "give clean, corrupt, answers and foils lists of one length"
                )
        rows = [encode(tokenizer, text, prepend_bos=prepend_bos) for text in clean]
        others = [encode(tokenizer, text, prepend_bos=prepend_bos) for text in corrupt]
        for i, (row, other) in enumerate(zip(rows, others, strict=True)):
            if len(row) != len(other):
                raise ValueError(
                    f"`corrupt` must tokenize to the length of `clean`: pair {i} has {len(row)} "
                    f"and {len(other)} tokens ({_tail(clean[i])} / {_tail(corrupt[i])}); "
                    "choose words of one token"
                )
        return cls.from_tokens(
            [torch.tensor(r) for r in rows],
            [torch.tensor(r) for r in others],
            [answer_id(tokenizer, p, a) for p, a in zip(clean, answers, strict=True)],
            [answer_id(tokenizer, p, f) for p, f in zip(clean, foils, strict=True)],
            metric=metric,
            name=name,
        )

    # -- reading -------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.clean.shape[0]

    def __repr__(self) -> str:
        low, high = int(self.lengths.min()), int(self.lengths.max())
        tokens = str(low) if low == high else f"{low}-{high}"
        return (
            f"Task({self.name!r}, {len(self)} pairs, {tokens} tokens, "
            f"metric={self.metric.name}, spans={list(self.spans)})"
        )

    @property
    def lengths(self) -> Int[Tensor, " pair"]:
        """Number of tokens of each pair's prompts."""
        return (self.clean != PAD).sum(1)

    def answer_logits(self, logits: Tensor) -> Tensor:
        """Logits `[pair, d_vocab]` at each pair's answer position, from `[pair, pos, d_vocab]`.

        Logits that hold a single position are taken to be those of the answer position.

        Raises:
            ValueError: the rows of `logits` are not this task's pairs.
        """
        if logits.dim() != 3 or len(logits) != len(self):
            raise ValueError(
                f"logits must be [pair, pos, d_vocab] with {len(self)} pairs; got "
                f"{list(logits.shape)}; use the task that holds exactly those rows (task.select)"
            )
        if logits.shape[1] == 1:
            return logits[:, 0]
        rows = torch.arange(len(logits), device=logits.device)
        return logits[rows, self.spans["end"].to(logits.device)]

    def select(self, index: Tensor | Sequence[int]) -> Task:
        """The task of some of the pairs, in the order of `index` (rows may repeat), or by a mask.

        Raises:
            ValueError: no pair is left.
        """
        at = torch.as_tensor(index)
        at = at.nonzero().flatten() if at.dtype == torch.bool else at.long()
        if len(at) == 0:
            raise ValueError(
                f"a selection must keep at least one pair; got none of the {len(self)} pairs of "
                f"task {self.name!r}; choose some by number, counted from 0, or by a mask"
            )
        width = int(self.lengths[at].max())
        return replace(
            self,
            clean=self.clean[at, :width],
            corrupt=self.corrupt[at, :width],
            answers=self.answers[at],
            foils=self.foils[at],
            spans={k: v[at] for k, v in self.spans.items()},
            metric=self.metric.select(at),
        )

    def buckets(self, batch_size: int | None = None) -> Iterator[tuple[Tensor, Task]]:
        """Pairs of one length at a time: `(index into this task, the sub-task)`.

        With `batch_size`, no sub-task holds more pairs than that.
        """
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1; got {batch_size}; or leave it out")
        for length in self.lengths.unique().tolist():
            index = (self.lengths == length).nonzero().flatten()
            for part in index.split(batch_size or len(index)):
                whole = len(part) == len(self)
                yield part, self if whole else self.select(part)

    def with_metric(self, metric: str | Callable[..., Tensor]) -> Task:
        """The same pairs, another read-out."""
        return replace(self, metric=metric)

    def filter_correct(self, model: Any) -> Task:
        """Only the pairs where `model` prefers the answer to the foil on the clean prompt.

        Raises:
            ValueError: the model is right on no pair, or in train mode.
        """
        right = torch.zeros(len(self), dtype=torch.bool)
        for index, logits in clean_answers(model, self):
            last, rows = logits.cpu(), torch.arange(len(index))
            right[index] = last[rows, self.answers[index]] > last[rows, self.foils[index]]
        if not bool(right.any()):
            raise ValueError(
                f"at least one pair must be answered correctly; the model prefers the foil on all "
                f"{len(self)} pairs of task {self.name!r}; use a model that can do the task"
            )
        return self.select(right.nonzero().flatten())


def encode(tokenizer: Any, text: str, *, prepend_bos: bool) -> list[int]:
    """Token ids of one text, with the beginning-of-sequence token exactly once if wanted."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    bos = getattr(tokenizer, "bos_token_id", None)
    return [bos, *ids] if prepend_bos and bos is not None and ids[:1] != [bos] else ids


def answer_id(tokenizer: Any, prompt: str, answer: str) -> int:
    """The one token that `answer` adds to `prompt`.

    It is read off the tokenization of both together, so that it is right for byte-level and for
    SentencePiece tokenizers alike.

    Raises:
        ValueError: the answer is not exactly one token there.
    """
    before = encode(tokenizer, prompt, prepend_bos=False)
    after = encode(tokenizer, prompt + answer, prepend_bos=False)
    if after[: len(before)] != before or len(after) != len(before) + 1:
        pieces = tokenizer.convert_ids_to_tokens(after[len(before) :])
        raise ValueError(
            f"an answer must be exactly one token after its prompt; {answer!r} after "
            f"{_tail(prompt)} is {pieces}; choose a word of one token, with its leading space"
        )
    return int(after[-1])


def _stack(rows: Sequence[Tensor]) -> Tensor:
    if not rows:
        return torch.empty(0, 0, dtype=torch.long)
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=PAD)


def _tail(text: str) -> str:
    return repr(text if len(text) <= 24 else "…" + text[-24:])
