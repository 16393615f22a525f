"""What a task is: aligned clean and corrupt prompts, their answers, and what is measured.

Prompts of different lengths are never padded for a model: `Task.buckets` yields one sub-task per
length. Where rows of `clean` are shorter than the longest, a token that the model has stands behind
their end (the tokenizer's end-of-text token, or 0), so that `model(task.clean)` runs: in a model
that reads from left to right it changes nothing before it. `task.lengths` says where rows end.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, SupportsIndex, overload

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tasks.lists import (
    PAD,
    as_tensor,
    first_tokens,
    id_rows,
    id_sets,
    must_be_disjoint,
    must_be_in,
    must_be_sets,
    stacked,
    text_sets,
    texts_of,
    whole_numbers,
)
from tasks.metrics import BUILT_IN, Continuation, Metric, clean_answers, logit_difference
from tasks.pair import Pair, pair_of, table
from tasks.tables import Table, columns_of, read_csv, read_frame, read_jsonl
from tasks.text import filling, must_be_tokenizer

__all__ = ["Task"]


@dataclass(frozen=True, eq=False)
class Task:
    """Pairs of prompts that differ in what the model should answer.

    >>> Task.from_prompts(
    ...     model.tokenizer,
    ...     clean=["Then Mary and John went to the store. John gave a drink to"],
    ...     corrupt=["Then Mary and John went to the store. Mary gave a drink to"],
    ...     answers=[" Mary"],
    ...     foils=[" John"],
    ... )
    Task('task', 1 pairs, 15 tokens, metric=logit_difference, spans=['end'])

    Build one with `Task.from_prompts`, `Task.from_csv`, `Task.from_jsonl`, `Task.from_dataframe` or
    `Task.from_tokens`, or with a ready task such as `tasks.ioi`. `task[3]` is one pair to read,
    `task[2:5]` a task of three. `task.metric(logits)` gives one number per pair; the default is the
    logit of the answer minus that of the foil at the pair's answer position, `spans["end"]`.

    A task keeps copies, on the CPU: what is done later to the tensors given changes nothing.

    Raises:
        ValueError: shapes do not agree, a row of `corrupt` has not the length of its row of
            `clean` or is the same, a token id is negative, a span points outside its prompt, a
            pair has no answer or one twice, or an answer is its own foil and the metric their
            difference.
        TypeError: token ids or positions are not whole numbers, or the metric is none.
    """

    clean: Int[Tensor, "pair pos"]
    corrupt: Int[Tensor, "pair pos"]
    answers: Int[Tensor, " pair *answer"]
    """The right token of each pair; or `[pair, answer]`, sets of them, filled up with -1."""
    foils: Int[Tensor, " pair *foil"] = None  # type: ignore[assignment]
    """The wrong token of each pair, or sets of them; left out, `[pair, 0]`: there are none."""
    spans: Mapping[str, Int[Tensor, " pair"]] = field(default_factory=dict)
    """Named positions, one per pair: for IOI `IO`, `S1`, `S2`, `end`. `end` always exists."""
    metric: Any = "logit_difference"
    """A name, a callable `(logits)` or `(logits, task)`; reading the field gives a bound Metric."""
    name: str = "task"
    lengths: Int[Tensor, " pair"] = None  # type: ignore[assignment]
    """Tokens of each pair's prompts; left out, a row ends where -1 begins."""
    tokenizer: Any = None
    """What the prompts were made with; without it pairs are read as token ids."""

    @torch.inference_mode(False)  # tensors made inside it could not be differentiated with
    def __post_init__(self) -> None:
        self._set_prompts()
        self._set_answers()
        self._must_differ()
        self._set_spans()
        function = self._function()
        if function in BUILT_IN.values():
            must_be_disjoint(self.answers, self.foils, self.tokenizer)
        object.__setattr__(self, "metric", Metric(function, self))

    def _set_prompts(self) -> None:
        """Takes both sides and their lengths, and fills up shorter rows with one token."""
        for label in ("clean", "corrupt"):
            ids = whole_numbers(getattr(self, label), f"`{label}`")
            object.__setattr__(self, label, ids)
        pairs = self.clean.shape[0] if self.clean.dim() == 2 else -1
        if pairs < 1 or self.corrupt.shape != self.clean.shape:
            raise ValueError(
                "`clean` and `corrupt` must be token ids [pair, pos] of one shape with at least "
                f"one pair; got {list(self.clean.shape)} and {list(self.corrupt.shape)}; "
                "use Task.from_prompts or Task.from_tokens to build them"
            )
        given = self.lengths is not None
        lengths = whole_numbers(self.lengths if given else (self.clean != PAD).sum(1), "`lengths`")
        width = self.clean.shape[1]
        if lengths.shape != (pairs,) or bool((given & ((lengths < 1) | (lengths > width))).any()):
            raise ValueError(
                f"`lengths` must hold a number of tokens from 1 to {width} per pair, shape "
                f"[{pairs}]; got {lengths.tolist()[:8]}; or leave it out"
            )
        object.__setattr__(self, "lengths", lengths)
        inside = torch.arange(width, device="cpu") < lengths[:, None]
        ends = (self.clean == PAD) != (self.corrupt == PAD)
        if bool((misaligned := (ends & inside if given else ends).any(1)).any()):
            i = int(misaligned.nonzero()[0])
            one, two = (int((side[i] != PAD).sum()) for side in (self.clean, self.corrupt))
            raise ValueError(
                f"`corrupt` must have the length of `clean`: pair {i} has {one} and {two} tokens; "
                "choose prompts that align token by token"
            )
        wrong = (inside & ((self.clean < 0) | (self.corrupt < 0))).any(1) | ~inside.any(1)
        if bool(wrong.any()):
            i = int(wrong.nonzero()[0])
            raise ValueError(
                f"token ids must be non-negative, and {PAD} only after a prompt's end: pair {i} is "
                f"{self.clean[i].tolist()} / {self.corrupt[i].tolist()}; "
                "use Task.from_tokens for prompts of different lengths"
            )
        for label in ("clean", "corrupt"):
            ids = getattr(self, label).masked_fill(~inside, filling(self.tokenizer))
            object.__setattr__(self, label, ids)

    def _must_differ(self) -> None:
        """Checks that something can be patched in every pair."""
        same = (self.clean == self.corrupt).all(1).nonzero().flatten()
        if len(same):
            raise ValueError(
                f"`corrupt` must differ from `clean`, or nothing can be patched: pair "
                f"{int(same[0])} has the same tokens on both sides; change in `corrupt` what the "
                "answer hangs on"
            )

    def _set_answers(self) -> None:
        """Takes answers and foils: a token or a set of tokens for each pair."""
        if self.foils is None:
            object.__setattr__(
                self, "foils", torch.empty(len(self), 0, dtype=torch.long, device="cpu")
            )
        for label in ("answers", "foils"):
            ids = whole_numbers(getattr(self, label), f"`{label}`")
            object.__setattr__(self, label, ids)
            if label == "answers" or ids.numel() or ids.dim() != 2:
                must_be_sets(label, ids, len(self))

    def _set_spans(self) -> None:
        """Takes named positions; the answer is read at the prompt's end if nothing else is said."""
        spans = {k: whole_numbers(v, f"span {k!r}") for k, v in self.spans.items()}
        spans.setdefault("end", self.lengths - 1)
        for label, at in spans.items():
            if at.shape != (len(self),) or bool(((at < 0) | (at >= self.lengths)).any()):
                raise ValueError(
                    f"span {label!r} must hold one position inside the prompt per pair, shape "
                    f"[{len(self)}]; got {at.tolist()[:8]} for lengths "
                    f"{self.lengths.tolist()[:8]}; count positions from 0, the "
                    "beginning-of-sequence token included"
                )
        object.__setattr__(self, "spans", MappingProxyType(spans))

    def _function(self) -> Callable[..., Tensor]:
        """The metric as it was given, or the built-in one of that name."""
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
        return function

    # a copy, and what another process gets, has spans of its own that are as read-only as these
    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "spans": dict(self.spans)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, spans=MappingProxyType(state["spans"]))

    # -- building ------------------------------------------------------------------------------

    @classmethod
    def from_tokens(
        cls,
        clean: Iterable[Iterable[SupportsIndex]],
        corrupt: Iterable[Iterable[SupportsIndex]],
        answers: Iterable[SupportsIndex | Iterable[SupportsIndex]],
        foils: Iterable[SupportsIndex | Iterable[SupportsIndex]] | None = None,
        *,
        spans: Mapping[str, Iterable[SupportsIndex]] | None = None,
        metric: str | Callable[..., Tensor] = "logit_difference",
        name: str = "task",
        tokenizer: Any = None,
    ) -> Task:
        """From token ids: `[pair, pos]` tensors, or lists of rows when lengths differ.

        A list may be anything that holds its entries in order: an array, a column of a table. An
        answer or foil is one token id, or a list of those that are equally right or wrong. Foils
        may be left out if the metric reads none. With the `tokenizer` pairs can be read as text.

        Raises:
            ValueError: a pair's two prompts have different lengths or are the same, or a token id
                is negative.
            TypeError: token ids are not whole numbers.
        """
        rows, others = id_rows(clean, "clean"), id_rows(corrupt, "corrupt")
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
        wrong = {} if foils is None else {"foils": id_sets(foils, "`foils`")}
        return cls(
            clean=stacked([row.tolist() for row in rows]),
            corrupt=stacked([row.tolist() for row in others]),
            answers=id_sets(answers, "`answers`"),
            **wrong,
            spans={k: whole_numbers(v, f"span {k!r}") for k, v in (spans or {}).items()},
            metric=metric,
            name=name,
            tokenizer=tokenizer,
        )

    @classmethod
    def from_prompts(
        cls,
        tokenizer: Any,
        clean: Iterable[str],
        corrupt: Iterable[str],
        answers: Iterable[str | Iterable[str]],
        foils: Iterable[str | Iterable[str]] | None = None,
        *,
        spans: Mapping[str, str | Iterable[str] | Iterable[SupportsIndex]] | None = None,
        metric: str | Callable[..., Tensor] | None = None,
        name: str = "task",
        prepend_bos: bool = True,
        chat: bool = False,
        continuation: str | None = None,
    ) -> Task:
        """From text. An answer is what follows its prompt, such as `" Mary"`, and is one token.

        Several right answers, or foils, of a pair are a list: `[" Mary", " Ann"]`. A list may be
        anything that holds its texts in order: a tuple, an array, a column of a table.

        Args:
            tokenizer: the model's.
            clean: what the model should answer rightly.
            corrupt: the same but for what the answer hangs on, token by token.
            answers: what should follow each clean prompt.
            foils: what should not; may be left out if the metric reads none. Of a continuation's
                the first token is kept, for `preferred`.
            spans: named positions: whole numbers, or texts that stand once in the clean prompt
                (one for all, or a list with one for each), for the position of their last token.
            metric: as of `Task`; `"logit_difference"` if not given.
            name: what results call the task.
            prepend_bos: puts the tokenizer's beginning-of-sequence token first, as TransformerLens
                does, if it has one and the text does not begin with it.
            chat: wraps each prompt as a user's message in the tokenizer's chat template, which
                says itself what stands first; answers are then the model's.
            continuation: `"sum"` or `"mean"`: answers may be of several tokens, and the metric is
                their log-probability (of one token on average). See `Continuation`.

        Raises:
            ValueError: prompts of a pair tokenize to different lengths or to the same tokens, an
                answer is not one token after its prompt, a span's text is not there once, the
                tokenizer does not know a word or has no chat template, or the lists are not of one
                length.
            TypeError: an entry is no text, or `tokenizer` is none.
        """
        # not at the top, as below: tasks end long chains of imports
        from tasks.aligned import Tokenized, must_be_continuation, must_be_free

        must_be_tokenizer(tokenizer)
        must_be_continuation(continuation, metric)
        clean = texts_of(clean, "clean")
        corrupt = texts_of(corrupt, "corrupt", len(clean))
        right, several = text_sets(answers, "answers", len(clean))
        wrong, unlike = ([], False) if foils is None else text_sets(foils, "foils", len(clean))
        made = Tokenized.of(tokenizer, clean, corrupt, prepend_bos=prepend_bos, chat=chat)
        whole = continuation is not None
        follow = made.after("answers", right, whole=whole)
        given: dict[str, Any] = {
            "answers": first_tokens(follow, several=several),
            "spans": made.positions(spans or {}),
            "metric": "logit_difference" if metric is None else metric,
            "name": name,
        }
        if wrong:
            given["foils"] = first_tokens(made.after("foils", wrong, whole=whole), several=unlike)
        if continuation is not None:
            made, ends = made.continued(follow)
            must_be_free(given["spans"], ends)
            tokens = stacked([answers[0] for answers in follow])
            given["metric"] = Continuation(tokens, mean=continuation == "mean")
            given["spans"] |= ends
        return cls(
            clean=stacked(made.clean), corrupt=stacked(made.corrupt), tokenizer=tokenizer, **given
        )

    # -- out of tables -------------------------------------------------------------------------

    @classmethod
    def from_csv(cls, tokenizer: Any, path: str | PathLike[str], **options: Any) -> Task:
        """From a CSV file in UTF-8 with the columns `clean, corrupt, answer, foil`.

        >>> from pathlib import Path
        >>> text = "clean,corrupt,answer,foil\\nThen Mary went,Then John went, to, for\\n"
        >>> _ = Path("prompts.csv").write_text(text)
        >>> Task.from_csv(model.tokenizer, "prompts.csv")[0].answers
        (' to',)

        Nothing is stripped: an answer's leading space counts. Several answers stand in a cell as a
        JSON list; a column `span:NAME` holds, for a named position, a text of the clean prompt. The
        files of EAP-IG (`clean, corrupted, correct_idx, incorrect_idx`, token ids) are read too.

        Args:
            tokenizer: the model's.
            path: the file; its name without the suffix is the task's, if none is given.
            **options: `columns`, which column holds what where it has another name, such as
                `{"clean": "sentence_good"}` (a name that ends in `_idx` is one of token ids); and
                those of `from_prompts`.

        Raises:
            ValueError: it is no such table (the row is named), or as `from_prompts`.
            OSError: it cannot be read.
        """
        must_be_tokenizer(tokenizer)
        options.setdefault("name", Path(path).stem)
        return cls.from_table(tokenizer, read_csv(path), **options)

    @classmethod
    def from_jsonl(cls, tokenizer: Any, path: str | PathLike[str], **options: Any) -> Task:
        """From a file with one JSON object a line; keys are columns, as of `from_csv`.

        >>> import json
        >>> from pathlib import Path
        >>> row = {"clean": "Then Mary", "corrupt": "Then John", "answer": " and", "foil": " had"}
        >>> _ = Path("prompts.jsonl").write_text(json.dumps(row))
        >>> Task.from_jsonl(model.tokenizer, "prompts.jsonl").name
        'prompts'

        Answers and foils may be lists. MIB's rows (`prompt`, `choices`, `answerKey` and
        counterfactuals of the same) are read too; `columns={"corrupt": "abc_counterfactual"}`
        chooses one.

        Raises:
            ValueError: it is no such table (the row is named), or as `from_prompts`.
            OSError: it cannot be read.
        """
        must_be_tokenizer(tokenizer)
        options.setdefault("name", Path(path).stem)
        return cls.from_table(tokenizer, read_jsonl(path), **options)

    @classmethod
    def from_dataframe(cls, tokenizer: Any, frame: Any, **options: Any) -> Task:
        """From a pandas DataFrame, with columns as of `from_csv`; cells may be lists.

        >>> import pandas as pd
        >>> row = {"good": "Then Mary", "corrupt": "Then John", "answer": " and", "foil": " had"}
        >>> frame = pd.DataFrame([row])
        >>> Task.from_dataframe(model.tokenizer, frame, columns={"clean": "good"})[0].clean
        'Then Mary'

        Raises:
            ValueError: it is no such table (the row is named), or as `from_prompts`.
            TypeError: it is no DataFrame.
        """
        return cls.from_table(tokenizer, read_frame(frame), **options)

    @classmethod
    def from_table(
        cls,
        tokenizer: Any,
        rows: Table,
        *,
        columns: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Task:
        """From a table that was read (`tasks.tables`); options are those of `from_prompts`."""
        must_be_tokenizer(tokenizer)
        metric, continuation = options.get("metric"), options.get("continuation")
        compares = continuation is None and (metric is None or isinstance(metric, str))
        read = columns_of(rows, columns, foils=compares)
        options["spans"] = {**read.spans, **(options.get("spans") or {})}
        if not read.ids:
            return cls.from_prompts(
                tokenizer, read.clean, read.corrupt, read.answers, read.foils, **options
            )
        if continuation is not None:
            raise ValueError(
                f"`continuation` must get answers as texts; those of {rows.source} are token ids; "
                "give a column of texts"
            )
        from tasks.aligned import Tokenized

        made = Tokenized.of(
            tokenizer,
            read.clean,
            read.corrupt,
            prepend_bos=options.pop("prepend_bos", True),
            chat=options.pop("chat", False),
        )
        options["spans"] = made.positions(options["spans"])
        if metric is None:
            options["metric"] = "logit_difference"
        for label, sets in (("answers", read.answers), ("foils", read.foils)):
            if sets is not None:
                options[label] = id_sets(sets, f"`{label}`")
        task = cls(
            clean=stacked(made.clean), corrupt=stacked(made.corrupt), tokenizer=tokenizer, **options
        )
        must_be_in(tokenizer, task.answers, task.foils)
        return task

    # -- checking ------------------------------------------------------------------------------

    def must_fit(self, cfg: Any, model_name: str) -> None:
        """Checks that a model of this configuration has all tokens and positions of the task.

        A token that the model does not have would be an index error from deep inside it.

        Args:
            cfg: has `d_vocab` and `n_ctx`, both in tokens, as a `TransformerBridge`'s `cfg` has.
            model_name: what the message calls the model.

        Raises:
            ValueError: a token id is `d_vocab` or more, or a prompt longer than `n_ctx`.
        """
        inside = torch.arange(self.clean.shape[1], device="cpu") < self.lengths[:, None]
        read = {"clean": self.clean[inside], "corrupt": self.corrupt[inside]}
        read |= {"answers": self.answers, "foils": self.foils}
        if self.metric.targets is not None:
            read["answers"] = self.metric.targets
        for label, ids in read.items():
            highest = int(ids.max()) if ids.numel() else 0
            if highest >= int(cfg.d_vocab):
                raise ValueError(
                    f"`{label}` must hold token ids below the model's d_vocab {cfg.d_vocab}; got "
                    f"{highest}; build the task with the tokenizer of {model_name!r}"
                )
        longest = int(self.lengths.max())
        if longest > int(cfg.n_ctx):
            raise ValueError(
                f"prompts must have no more tokens than the model's n_ctx {cfg.n_ctx}; the longest "
                f"has {longest}; drop the longer pairs with task.select"
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

    def _repr_html_(self) -> str:
        return table(self)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Pair: ...

    @overload
    def __getitem__(self, index: slice) -> Task: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Pair | Task:
        """One pair to read, or the task of some that follow each other.

        Raises:
            IndexError: there is no such pair.
            TypeError: `index` is neither a whole number nor a slice.
            ValueError: the slice is empty.
        """
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        try:
            at = operator.index(index)
        except TypeError:
            raise TypeError(
                "pairs must be asked for by one whole number or a slice; got "
                f"{type(index).__name__}; use task.select for a list of numbers or a mask"
            ) from None
        if not -len(self) <= at < len(self):
            raise IndexError(
                f"task {self.name!r} has pairs 0 to {len(self) - 1}; got {at}; count from 0, or "
                "from the end with negative numbers"
            )
        return pair_of(self, at % len(self))

    def __iter__(self) -> Iterator[Pair]:
        return (pair_of(self, i) for i in range(len(self)))

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

    def select(self, index: Iterable[Any]) -> Task:
        """The task of some of the pairs, in the order of `index` (rows may repeat), or by a mask.

        Raises:
            ValueError: no pair is left, or a mask is not of this task.
        """
        at = as_tensor(index)
        if at.dtype == torch.bool:
            if at.shape != (len(self),):
                raise ValueError(
                    f"a mask must have one entry per pair, shape [{len(self)}]; got "
                    f"{list(at.shape)}; make it from what this task's pairs gave"
                )
            at = at.nonzero().flatten()
        at = whole_numbers(at, "a selection")
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
            lengths=self.lengths[at],
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

    def preferred(self, model: Any) -> Bool[Tensor, " pair"]:
        """Which pairs `model` answers rightly: it prefers the answers to the foils when clean.

        >>> task.preferred(model)
        tensor([True, True, True, True])

        That is where the metric is above 0 if it compares answers with foils, else where
        `logit_difference` is.

        Raises:
            ValueError: the task has no foils, or one that is an answer as well (of a continuation
                the first tokens are compared); or the model is in train mode or has not the task's
                tokens or positions.
        """
        if not self.foils.numel():
            raise ValueError(
                f"`foils` must be given to say what a model prefers; task {self.name!r} has none; "
                "give what it might say instead"
            )
        must_be_disjoint(self.answers, self.foils, self.tokenizer)
        right = torch.zeros(len(self), dtype=torch.bool, device="cpu")
        for index, bucket, logits in clean_answers(model, self):
            compares = bucket.metric.compares_answers
            metric = bucket.metric if compares else Metric(logit_difference, bucket)
            right[index] = metric(logits[:, None]).cpu() > 0
        return right

    def filter_correct(self, model: Any) -> Task:
        """Only the pairs where `model` prefers the answer to the foil on the clean prompt.

        >>> len(task.filter_correct(model))
        4

        `preferred` says which these are.

        Raises:
            ValueError: the model is right on no pair, in train mode, or has not the task's tokens
                or positions.
        """
        right = self.preferred(model)
        if not bool(right.any()):
            raise ValueError(
                f"at least one pair must be answered correctly; the model prefers the foil on all "
                f"{len(self)} pairs of task {self.name!r}; use a model that can do the task"
            )
        return self.select(right)
