"""Several right answers and foils: read-outs worked out by hand, and every verb on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import able_task, on, ragged_task
from test_ioi import gpt2
from test_task import full_message
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from circuits import faithfulness, patch, top
from relp import DEEPLIFT, GRADIENT, RELP, attribute
from tasks import Task

SETS = ("logit_difference", "mean_logit_difference", "probability_difference")


def three(**options: Any) -> Task:
    """Three pairs over a vocabulary of six, with one to three answers and one or two foils."""
    return Task.from_tokens(
        [[0, 1], [0, 2], [0, 3]], [[0, 2], [0, 3], [0, 1]],
        [[1, 2, 3], [5], [4, 0]], [[4], [0, 1], [3, 2]], **options,
    )  # fmt: skip


def with_sets(task: Task, size: int, **options: Any) -> Task:
    """The task with one to three answers and one or two foils, all different."""
    answers, foils = [], []
    for i, (answer, foil) in enumerate(
        zip(task.answers.tolist(), task.foils.tolist(), strict=True)
    ):
        others = [t for t in range(size) if t not in (answer, foil)][7 * i : 7 * i + 3]
        answers.append([answer, *others[: i % 3]])
        foils.append([foil, *others[2 : 3 - i % 2]])
    rows = [
        [row[:n].tolist() for row, n in zip(side, task.lengths, strict=True)]
        for side in (task.clean, task.corrupt)
    ]
    return Task.from_tokens(*rows, answers, foils, spans=task.spans, **options)


def by_hand(task: Task, how: str) -> Callable[..., Tensor]:
    """The metric pair by pair, of lists of tokens, as a caller would write it."""

    def together(values: Tensor) -> Tensor:
        return {"mean_logit_difference": values.mean}.get(how, values.sum)()

    def metric(logits: Tensor, task: Task) -> Tensor:
        found = []
        for i, end in enumerate(task.spans["end"].tolist()):
            last = logits[i, end]
            right, wrong = (
                [t for t in side[i].tolist() if t >= 0] for side in (task.answers, task.foils)
            )
            if how == "logit_difference":
                found.append(last[right].exp().sum().log() - last[wrong].exp().sum().log())
                continue
            last = last.softmax(-1) if how == "probability_difference" else last
            found.append(together(last[right]) - together(last[wrong]))
        return torch.stack(found)

    return metric


# -- building --------------------------------------------------------------------------------------


def test_smaller_sets_are_filled_up() -> None:
    task = three()
    assert task.answers.tolist() == [[1, 2, 3], [5, -1, -1], [4, 0, -1]]
    assert task.foils.tolist() == [[4, -1], [0, 1], [3, 2]]
    part = task.select([1])  # as wide as before: a metric may rely on it
    assert part.answers.tolist() == [[5, -1, -1]] and part.foils.tolist() == [[0, 1]]
    given = Task(task.clean, task.corrupt, task.answers, task.foils)
    assert torch.equal(given.answers, task.answers)
    one = Task.from_tokens([[0, 1]] * 2, [[0, 2]] * 2, [1, [2, 3]], [0, 0])
    assert one.answers.tolist() == [[1, -1], [2, 3]] and one.foils.tolist() == [0, 0]


def test_sets_of_texts() -> None:
    tokenizer = gpt2()
    clean, corrupt = ["Then Tom smiled at"] * 2, ["Then Paul smiled at"] * 2
    task = Task.from_prompts(
        tokenizer, clean, corrupt, [[" Tom", " Mary"], [" Paul"]], [" John", [" Mary", " Tom"]]
    )
    tom, mary, paul, john = (
        tokenizer(w, add_special_tokens=False).input_ids[0]
        for w in (" Tom", " Mary", " Paul", " John")
    )
    assert task.answers.tolist() == [[tom, mary], [paul, -1]]
    assert task.foils.tolist() == [[john, -1], [mary, tom]]
    message = full_message(
        lambda: Task.from_prompts(tokenizer, clean, corrupt, [[" Tom", 3], [" A"]], [" John"] * 2),
        TypeError,
    )
    assert message == (
        "`answers` must hold texts only; pair 0 has 3, of type int, in its list; give texts"
    )


@pytest.mark.parametrize(
    ("answers", "foils", "message"),
    [
        (
            [[1, 2], [3, 4]],
            [[0], [5, 3]],
            "an answer must differ from its foil, or their difference is always 0: pair 1 has "
            "token 3 for both; choose another foil, or give a metric that reads none",
        ),
        (
            [[1, 2], []],
            [0, 0],
            "`answers` must hold at least one token per pair; pair 1 has none; give it one, or "
            "leave that pair out",
        ),
        (
            [1, 2],
            [[3, 0], [5, 4, 5]],
            "`foils` must hold each token of a pair once; pair 1 has 5 twice in [5, 4, 5]; leave "
            "one out (two words may share their first token)",
        ),
        (
            [[1, 2], [3, -4]],
            [0, 0],
            "`answers` must hold token ids, 0 or more; pair 1 has -4; use the ids that the "
            "tokenizer gives",
        ),
    ],
    ids=["disjoint", "empty", "twice", "negative"],
)
def test_sets_are_disjoint_and_hold_each_token_once(answers: Any, foils: Any, message: str) -> None:
    prompts = [[0, 1], [0, 2]], [[0, 2], [0, 3]]
    assert full_message(lambda: Task.from_tokens(*prompts, answers, foils)) == message


def test_a_model_must_have_every_token_of_a_set() -> None:
    class Cfg:
        d_vocab, n_ctx = 5, 4

    assert "`answers` must hold token ids below the model's d_vocab 5; got 5" in full_message(
        lambda: three().must_fit(Cfg, "m")
    )


# -- reading ---------------------------------------------------------------------------------------


def test_read_outs_by_hand() -> None:
    """Logits are logarithms of weights out of 20: sums of weights are sums of probabilities."""
    weights = [[1.0, 2, 3, 4, 5, 5], [4.0, 4, 4, 4, 2, 2], [1.0, 1, 2, 2, 4, 10]]
    logits = torch.tensor(weights).log()[:, None]
    found = {how: three().with_metric(how).metric(logits).tolist() for how in SETS}
    assert found["probability_difference"] == pytest.approx([(9 - 5) / 20, (2 - 8) / 20, 1 / 20])
    log = math.log
    assert found["logit_difference"] == pytest.approx([log(9 / 5), log(2 / 8), log(5 / 4)])
    assert found["mean_logit_difference"] == pytest.approx(
        [log(24) / 3 - log(5), log(2) - log(16) / 2, log(4) / 2 - log(4) / 2], abs=1e-6
    )


@pytest.mark.parametrize("how", SETS)
def test_a_set_of_one_is_that_token_bit_for_bit(how: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(50, 1, 20, generator=generator)
    answers = torch.randint(0, 10, (50,), generator=generator)
    foils = torch.randint(10, 20, (50,), generator=generator)
    rows = torch.arange(100).view(50, 2)
    single = Task.from_tokens(rows, rows.flip(1), answers, foils, metric=how)
    filled = torch.stack([answers, torch.full_like(answers, -1)], 1)
    for sets in (answers[:, None], filled):
        assert torch.equal(
            replace(single, answers=sets, foils=foils[:, None]).metric(logits),
            single.metric(logits),
        )


def test_pairs_that_are_preferred() -> None:
    """Two answers of weight 2 are preferred to a foil of weight 3, in sum but not in the mean."""

    class Weights(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            logits = torch.tensor([1.0, 2, 2, 3, 1, 1]).log()
            return logits.expand(*tokens.shape, 6)

    model = Weights().eval()
    task = Task.from_tokens([[0, 1], [0, 2]], [[0, 2], [0, 3]], [[1, 2], [0, 4]], [[3], [3]])
    for metric, wanted in (
        ("logit_difference", [True, False]),
        ("probability_difference", [True, False]),
        ("mean_logit_difference", [False, False]),
        (lambda logits: logits[:, -1, 0], [True, False]),
    ):
        assert task.with_metric(metric).preferred(model).tolist() == wanted
    assert task.filter_correct(model).answers.tolist() == [[1, 2]]
    with pytest.raises(ValueError, match="the model prefers the foil on all 2 pairs"):
        task.with_metric("mean_logit_difference").filter_correct(model)


# -- every verb ------------------------------------------------------------------------------------


@on("tiny", "gpt2", "llama")
@pytest.mark.parametrize("how", SETS)
def test_verbs_on_sets_are_those_of_a_metric_by_hand(tiny: Any, how: str) -> None:
    task = with_sets(ragged_task(tiny), int(tiny.cfg.d_vocab), metric=how)
    other = task.with_metric(by_hand(task, how))
    near = {"rtol": 1e-3, "atol": 2e-5}
    for rules in (GRADIENT, RELP):
        one, two = (attribute(tiny, t, rules=rules) for t in (task, other))
        assert one.nodes is not None and bool(one.nodes.any())
        torch.testing.assert_close(one.nodes, two.nodes, **near)
        torch.testing.assert_close(one.clean, two.clean, **near)
    one, two = (patch(tiny, t, progress=False) for t in (task, other))
    torch.testing.assert_close(one.nodes, two.nodes, equal_nan=True, **near)


@on("tiny", "gpt2", "llama")
@pytest.mark.parametrize("how", SETS)
def test_two_runs_account_for_the_whole_gap_of_sets(tiny: Any, how: str) -> None:
    """DEEPLIFT is exact through the metric, filled sets included."""
    task = with_sets(ragged_task(tiny), int(tiny.cfg.d_vocab), metric=how)
    scores = attribute(tiny, task, rules=DEEPLIFT, components=["embed"])
    total = scores.nodes.sum((1, 2))
    torch.testing.assert_close(total, scores.clean - scores.corrupt, rtol=1e-3, atol=1e-4)


@on("tiny", "gpt2", "llama")
def test_circuits_on_sets_are_those_of_a_metric_by_hand(tiny: Any) -> None:
    task = with_sets(able_task(tiny), int(tiny.cfg.d_vocab))
    edges = attribute(tiny, task, level="edge")
    circuit = top(edges, edges=20)
    other = task.with_metric(by_hand(task, "logit_difference"))
    assert faithfulness(tiny, task, circuit) == pytest.approx(
        faithfulness(tiny, other, circuit), rel=1e-3
    )


# -- answers of several tokens ---------------------------------------------------------------------

PROMPTS = ["When Mary and John went to the store, John gave", "Then Tom smiled at the"]
OTHERS = ["When Mary and John went to the store, Mary gave", "Then Paul smiled at the"]
ENDINGS = [" a drink to Mary", " store"]


def continued(tokenizer: Any, how: str = "sum", **options: Any) -> Task:
    return Task.from_prompts(tokenizer, PROMPTS, OTHERS, ENDINGS, continuation=how, **options)


def test_prompts_hold_an_answer_but_its_last_token() -> None:
    tokenizer = gpt2()
    task = continued(tokenizer, spans={"who": ["Mary", "Tom"]}, name="endings")
    for i, (prompt, other, ending) in enumerate(zip(PROMPTS, OTHERS, ENDINGS, strict=True)):
        short, whole, corrupt = (
            [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
            for text in (prompt, prompt + ending, other + ending)
        )
        length = int(task.lengths[i])
        assert task.clean[i, :length].tolist() == whole[:-1]
        assert task.corrupt[i, :length].tolist() == corrupt[:-1]
        assert int(task.spans["end"][i]) == len(short) - 1 and task.spans["last"][i] == length - 1
        kept = [t for t in task.metric.targets[i].tolist() if t >= 0]
        assert kept == whole[len(short) :] and task.answers[i] == kept[0]
    assert task.foils.shape == (2, 0) and len(task.lengths.unique()) == 2
    assert (task.metric.name, continued(tokenizer, "mean").metric.name) == (
        "log_probability", "mean_log_probability",
    )  # fmt: skip
    assert not task.metric.reads_answer_only and not task.metric.compares_answers
    assert [pair.answers for pair in task] == [(ending,) for ending in ENDINGS]
    assert [pair.clean for pair in task] == PROMPTS and [pair.corrupt for pair in task] == OTHERS
    assert task[0].spans["who"] == (" Mary", int(task.spans["who"][0])) and task.name == "endings"


@pytest.mark.parametrize("how", ["sum", "mean"])
def test_a_continuation_is_the_models_own_log_softmax(tiny: Any, how: str) -> None:
    tokenizer, task = tiny.tokenizer, continued(tiny.tokenizer, how)
    for index, bucket in task.buckets():
        with torch.no_grad():
            found = bucket.metric(tiny(bucket.clean))
        for i, value in zip(index.tolist(), found.tolist(), strict=True):
            ids = tokenizer(PROMPTS[i] + ENDINGS[i], add_special_tokens=False).input_ids
            whole = torch.tensor([[tokenizer.bos_token_id, *ids]])
            start = 1 + len(tokenizer(PROMPTS[i], add_special_tokens=False).input_ids)
            with torch.no_grad():
                logs = tiny.original_model(whole).logits[0].log_softmax(-1)
            wanted = [float(logs[k - 1, whole[0, k]]) for k in range(start, whole.shape[1])]
            total = sum(wanted) / (len(wanted) if how == "mean" else 1)
            assert value == pytest.approx(total, rel=1e-4)
    with torch.no_grad():  # shorter rows are filled up, which changes nothing before their end
        together = task.metric(tiny(task.clean))
        apart = [float(part.metric(tiny(part.clean))) for part in (task[:1], task[1:])]
    assert together.tolist() == pytest.approx(apart, rel=1e-4)


@on("tiny", "gpt2", "llama")
def test_verbs_on_continuations_are_those_of_a_metric_by_hand(tiny: Any) -> None:
    task = continued(tiny.tokenizer, "mean")

    def metric(logits: Tensor, task: Task) -> Tensor:
        found = []
        for i in range(len(task)):
            last = int(task.lengths[i])
            row = next(k for k, p in enumerate(PROMPTS) if task[i].clean.startswith(p[:12]))
            ids = whole.metric.targets[row]
            logs = logits[i, last - int((ids >= 0).sum()) : last].log_softmax(-1)
            found.append(logs[range(len(logs)), ids[ids >= 0]].mean())
        return torch.stack(found)

    whole, other = task, task.with_metric(metric)
    near = {"rtol": 1e-3, "atol": 1e-5}
    for one, two in (
        [attribute(tiny, t, rules=RELP).nodes for t in (task, other)],
        [patch(tiny, t, progress=False).nodes for t in (task, other)],
    ):
        assert bool(one.nan_to_num().any())
        torch.testing.assert_close(one, two, equal_nan=True, **near)
    scores = attribute(tiny, task, rules=DEEPLIFT, components=["embed"])
    gap = scores.clean - scores.corrupt
    torch.testing.assert_close(scores.nodes.sum((1, 2)), gap, rtol=1e-3, atol=1e-4)
    edges = attribute(tiny, task, level="edge")
    with pytest.warns(UserWarning) if gap.min() < 0 < gap.max() else nullcontext():
        assert math.isfinite(faithfulness(tiny, task, top(edges, edges=20)))


def test_continuations_that_are_refused() -> None:
    tokenizer = gpt2()
    make = continued
    assert full_message(lambda: make(tokenizer, "product")) == (
        "`continuation` must be 'sum' or 'mean'; got 'product'; 'mean' is per token, so that "
        "answers of different lengths compare"
    )
    assert full_message(lambda: make(tokenizer, metric="logit_difference")) == (
        "`continuation` must go without `metric`: it is one itself; got 'logit_difference'; leave "
        "one out"
    )
    assert full_message(lambda: make(tokenizer, spans={"last": [0, 0]})) == (
        "span 'last' must be left to `continuation`, which reads from 'end' to 'last'; got one of "
        "that name; give it another"
    )
    assert full_message(
        lambda: Task.from_prompts(
            tokenizer, PROMPTS, OTHERS, [[" a", " drink"], " a"], continuation="sum"
        )
    ) == (
        "`continuation` must get one answer per pair; got a list of several; give the one that is "
        "measured"
    )
    vocabulary = {token: i for i, token in enumerate(["a", "b", "c", "d", "bc"])}
    pairs = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [("b", "c")]))
    )
    for answer in ("", "cd"):  # nothing, and `a bc d` after `a b`
        with pytest.raises(ValueError, match="`answers` of pair 0: an answer must add tokens to"):
            Task.from_prompts(pairs, ["ab"], ["bb"], [answer], continuation="sum")
    task = make(tokenizer)
    for call in (lambda: task.with_metric("logit_difference"), lambda: task.preferred(None)):
        assert full_message(call).startswith("`foils` must be given")
    with pytest.raises(ValueError, match="must be made of the task it is used on; it holds 2"):
        task.select([0]).with_metric(task.metric.function).metric(torch.zeros(1, 14, 900))


def test_foils_of_continuations_are_their_first_tokens() -> None:
    tokenizer = gpt2()
    task = continued(tokenizer, foils=[" the drink", " office"])
    the, office = (tokenizer(w, add_special_tokens=False).input_ids[0] for w in (" the", " office"))
    assert task.foils.tolist() == [the, office]
    assert task.with_metric("logit_difference").metric.name == "logit_difference"


def test_continuations_that_begin_alike_prefer_nothing(tiny: Any) -> None:
    task = continued(tiny.tokenizer, foils=[" a drink", " office"])
    same = continued(tiny.tokenizer).answers.tolist()[0]
    assert task.foils.tolist()[0] == same
    with pytest.raises(ValueError, match=f"pair 0 has token {same} .' a'. for both; choose anoth"):
        task.preferred(tiny)


def test_sweeps_tell_continuations_apart(tiny: Any) -> None:
    """The last token of an answer stands in no prompt."""
    from circuits.exact.sweep import identity
    from relp.bridge import Sites

    tasks = [
        Task.from_prompts(tiny.tokenizer, PROMPTS[:1], OTHERS[:1], [e], continuation="sum")
        for e in (" a drink", " a book")
    ]
    assert torch.equal(tasks[0].clean, tasks[1].clean)
    one, two = (identity(Sites.of(tiny), t, "denoise", "patch")["prompts"] for t in tasks)
    assert one != two
