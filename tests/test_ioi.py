"""IOI prompts: positions, answers and both corruptions, for each family of tokenizers."""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tasks import ioi
from tasks.ioi import NAMES, OBJECTS, PLACES, TEMPLATES, draw
from tasks.prompts import build
from tasks.zoo.shelf import HERE

rng = random.Random(0)
TEXTS = [
    f"{p.filled(c)} {p.io}."
    for i in range(1500)
    for p in [draw(rng, NAMES, abba=i % 2 == 0)]
    for c in (None, "abc")
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
QWEN_SPLIT = r"""'s|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"""


def trained(
    before: pre_tokenizers.PreTokenizer,
    *,
    special: list[str],
    size: int = 3000,
    texts: Sequence[str] = TEXTS,
) -> dict[str, Any]:
    """Vocabulary and merges learned from texts, as keyword arguments of `models.BPE`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = before
    alphabet = pre_tokenizers.ByteLevel.alphabet() if "bytes" in special else []
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=alphabet),
    )
    learned = json.loads(bpe.to_str())["model"]
    tokens = dict.fromkeys([*(s for s in special if s != "bytes"), *learned["vocab"]])
    return {
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": [tuple(m) for m in learned["merges"]],
    }


@cache
def gpt2() -> PreTrainedTokenizerFast:
    before = pre_tokenizers.ByteLevel(add_prefix_space=False)
    end = "<|endoftext|>"
    bpe = Tokenizer(models.BPE(**trained(before, special=[end, "bytes"])))
    bpe.pre_tokenizer = before
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end)


def qwen2() -> PreTrainedTokenizerFast:
    """Byte-level with its own splitting, NFC, and no beginning-of-sequence token."""
    before = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe = Tokenizer(models.BPE(**trained(before, special=["<|endoftext|>", "bytes"])))
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = before
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


@cache
def pieces(size: int) -> dict[str, Any]:
    words = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Punctuation()]
    )
    return trained(words, special=["<unk>", "<s>", "</s>", *BYTES], size=size)


def metaspace(size: int = 3000) -> Tokenizer:
    return Tokenizer(
        models.BPE(**pieces(size), unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )


def with_bos(bpe: Tokenizer) -> PreTrainedTokenizerFast:
    """Adds the beginning-of-sequence token by itself when special tokens are asked for."""
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def llama() -> PreTrainedTokenizerFast:
    """The old form: a normalizer puts "▁" before the text and for each space."""
    bpe = metaspace()
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return with_bos(bpe)


def llama_new(bpe: Tokenizer | None = None) -> PreTrainedTokenizerFast:
    bpe = bpe or metaspace()
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    )
    return with_bos(bpe)


def gemma() -> PreTrainedTokenizerFast:
    """No "▁" before the first word."""
    bpe = metaspace()
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return with_bos(bpe)


def shipped(name: str) -> Callable[[], PreTrainedTokenizerFast]:
    def build() -> PreTrainedTokenizerFast:
        folder = str(HERE / name)
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
        return tokenizer

    return build


FAMILIES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt2": gpt2,
    "qwen2": qwen2,
    "llama": llama,
    "llama_new": llama_new,
    "gemma": gemma,
    "ioi-gpt2": shipped("ioi-gpt2"),
    "ioi-llama": shipped("ioi-llama"),
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return FAMILIES[request.param]()


def word(tokenizer: PreTrainedTokenizerFast, token: torch.Tensor) -> str:
    return str(tokenizer.decode([int(token)])).strip()


def people(tokenizer: PreTrainedTokenizerFast, row: torch.Tensor) -> list[str]:
    """The names in a prompt, read from its text rather than from token ids."""
    words = str(tokenizer.decode(row)).replace(",", "").replace(">", "> ").split()
    return [w for w in words if w in NAMES]


@pytest.mark.parametrize("corruption", ["flip", "abc"])
def test_spans_and_answers_name_the_people(
    tokenizer: PreTrainedTokenizerFast, corruption: str
) -> None:
    task = ioi(tokenizer, pairs=40, corruption=corruption)
    assert (
        task.name == ("ioi" if corruption == "flip" else "ioi_abc")
        and len(task) == 40
        and len(set(task.lengths.tolist())) == 1
    )
    rows = torch.arange(len(task))
    at = task.spans
    assert torch.equal(task.clean[rows, at["IO"]], task.answers)
    assert torch.equal(task.clean[rows, at["S1"]], task.foils)
    assert torch.equal(task.clean[rows, at["S2"]], task.foils)
    assert bool((at["end"] == task.clean.shape[1] - 1).all())
    assert bool((at["S1"] < at["S2"]).all() and (at["IO"] < at["S2"]).all())
    for i in range(len(task)):
        before, after = people(tokenizer, task.clean[i]), people(tokenizer, task.corrupt[i])
        io, s = word(tokenizer, task.answers[i]), word(tokenizer, task.foils[i])
        assert sorted(before) == sorted([io, s, s]) and before[2] == s
        if corruption == "flip":
            assert after == [*before[:2], io]
        else:
            assert len({*after, io, s}) == 5
        differ = (task.clean[i] != task.corrupt[i]).nonzero().flatten().tolist()
        wanted = [at["S2"][i]] if corruption == "flip" else [at[k][i] for k in ("IO", "S1", "S2")]
        assert differ == sorted(int(w) for w in wanted)


def test_the_answer_is_the_token_that_follows_the_prompt(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    task = ioi(tokenizer, pairs=6, mixed_lengths=True, prepend_bos=False)
    for i in range(len(task)):
        row = task.clean[i, : task.lengths[i]]
        text = tokenizer.decode(row)
        whole = tokenizer(f"{text} {word(tokenizer, task.answers[i])}", add_special_tokens=False)
        assert whole.input_ids == [*row.tolist(), int(task.answers[i])]


def test_beginning_of_sequence_comes_once_or_not_at_all(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    task, bare = ioi(tokenizer, pairs=8), ioi(tokenizer, pairs=8, prepend_bos=False)
    bos = tokenizer.bos_token_id
    if bos is None:
        assert torch.equal(task.clean, bare.clean)
        return
    for with_it, without in ((task.clean, bare.clean), (task.corrupt, bare.corrupt)):
        assert bool((with_it[:, 0] == bos).all())
        assert torch.equal(with_it[:, 1:], without) and not bool((without == bos).any())
    assert torch.equal(task.spans["S2"], bare.spans["S2"] + 1)


def test_both_name_orders_are_equally_frequent(tokenizer: PreTrainedTokenizerFast) -> None:
    for mixed in (False, True):
        task = ioi(tokenizer, pairs=41, mixed_lengths=mixed)
        abba = int((task.spans["IO"] < task.spans["S1"]).sum())
        assert abba == 21


def test_a_single_pair_will_do(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(ioi(tokenizer, pairs=1)) == 1


def test_mixed_lengths_use_more_templates(tokenizer: PreTrainedTokenizerFast) -> None:
    task = ioi(tokenizer, pairs=100, mixed_lengths=True)
    assert len(set(task.lengths.tolist())) > 2
    assert sum(len(index) for index, _ in task.buckets()) == 100


def test_equal_arguments_give_equal_tasks_and_leave_global_randomness_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = gpt2()
    # The type checker of the tests draws from `random` itself, so its state proves nothing:
    # leave the module only the class of local generators.
    only_local = SimpleNamespace(Random=random.Random)
    monkeypatch.setattr(import_module("tasks.prompts"), "random", only_local)
    torch_state = torch.get_rng_state()
    one, same, other = ioi(tokenizer, 16, 3), ioi(tokenizer, 16, 3), ioi(tokenizer, 16, 4)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert torch.equal(one.clean, same.clean) and torch.equal(one.corrupt, same.corrupt)
    assert not torch.equal(one.answers, other.answers)
    flip, abc = ioi(tokenizer, 16, 3), ioi(tokenizer, 16, 3, corruption="abc")
    assert torch.equal(flip.clean, abc.clean)


def test_templates_hold_each_slot_once_and_start_with_no_name() -> None:
    assert len(set(TEMPLATES)) == len(TEMPLATES) >= 20
    for template in TEMPLATES:
        for slot in ("{A}", "{B}", "{S}", "{place}"):
            assert template.count(slot) == 1, template
        assert template.index("{A}") < template.index("{B}") < template.index("{S}")
        assert not template.startswith("{A}") and not template.endswith(" ")
    assert len(set(NAMES)) == len(NAMES) and not {*NAMES} & {*PLACES, *OBJECTS}


@pytest.mark.parametrize("pairs", [0, -3])
def test_too_few_pairs_is_an_error(pairs: int) -> None:
    with pytest.raises(ValueError) as error:
        ioi(gpt2(), pairs=pairs)
    assert str(error.value) == (
        f"`pairs` must be a whole number of at least 1; got {pairs}; ask for 32 pairs to start with"
    )


def test_unknown_corruption_is_an_error() -> None:
    with pytest.raises(ValueError) as error:
        ioi(gpt2(), corruption="swap")
    assert str(error.value) == (
        "`corruption` must be 'flip' or 'abc'; got 'swap'; 'flip' swaps who gives, "
        "'abc' replaces all names"
    )


def test_no_tokenizer_is_an_error() -> None:
    with pytest.raises(TypeError) as error:
        ioi(None)
    assert str(error.value) == (
        "`tokenizer` must be a Hugging Face tokenizer; got NoneType; pass model.tokenizer"
    )


def test_names_in_pieces_are_left_out() -> None:
    bpe = with_bos(metaspace(size=400))  # few merges: most names fall apart
    with pytest.raises(ValueError) as error:
        ioi(bpe)
    message = str(error.value)
    assert message.startswith(
        f"the tokenizer must keep at least 5 of {len(NAMES)} common names as one token after a "
        "space; got "
    )
    assert message.endswith(
        "use a tokenizer with a larger vocabulary, or build the pairs with Task.from_prompts"
    )


def whole_words(words: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {w: i for i, w in enumerate(["<unk>", *words])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")


def test_an_unknown_token_is_not_a_name() -> None:
    with pytest.raises(ValueError, match=f"got 4 \\({', '.join(NAMES[:4])}\\)"):
        ioi(whole_words(["Then", "When", *NAMES[:4]]))


def test_a_name_behind_a_token_for_the_space_is_not_whole() -> None:
    vocabulary = {w: i for i, w in enumerate(["<unk>", " ", "Then", *NAMES])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    with pytest.raises(ValueError, match=r"got 0 \(none\)"):
        ioi(PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>"))


def test_one_length_is_the_commonest() -> None:
    lengths = ioi(gpt2(), pairs=300, mixed_lengths=True, seed=1).lengths
    assert set(ioi(gpt2(), pairs=8).lengths.tolist()) == {int(lengths.mode().values)}


@pytest.mark.parametrize("corruption", ["flip", "abc"])
def test_prompts_are_checked_token_by_token(corruption: str) -> None:
    prompt = draw(random.Random(0), NAMES, abba=True)
    pair = prompt.pair(corruption)
    with pytest.raises(ValueError, match="must differ from its foil"):
        build(gpt2(), [replace(pair, foils=pair.answers)], name="ioi")
    split = replace(pair, answers=[f" {prompt.io} {prompt.s}"])
    with pytest.raises(ValueError, match="an answer must be exactly one token after its prompt"):
        build(gpt2(), [split], name="ioi")
    longer = replace(prompt, place="old farm").filled(corruption)  # a word that should not differ
    with pytest.raises(ValueError) as error:
        build(gpt2(), [pair, replace(pair, corrupt=longer)], name="ioi")
    names = "S" if corruption == "flip" else "A, B, S"
    assert str(error.value).startswith(
        f"`clean` and `corrupt` must differ at {names} only: pair 1 has "
    )


@pytest.mark.parametrize("corruption", ["flip", "abc"])
def test_prompts_hold_no_unknown_words(corruption: str) -> None:
    texts = [t.format(A="", B="", S="", place="", object="") for t in TEMPLATES]
    used = dict.fromkeys(re.findall(r"\w+|,", " ".join([*texts, *PLACES, *OBJECTS])))
    known = [*used, *NAMES[:9]]
    task = ioi(whole_words(known), corruption=corruption, mixed_lengths=True)
    inside = torch.arange(task.clean.shape[1]) < task.lengths[:, None]
    assert not bool(((task.clean == 0) | (task.corrupt == 0))[inside].any())
    known.remove("bank")
    with pytest.raises(ValueError) as error:
        ioi(whole_words(known), pairs=200, corruption=corruption, mixed_lengths=True)
    assert re.fullmatch(
        r"pair \d+ of `clean` must be of words that the tokenizer knows; 'bank,?' in '.+' would be "
        "'<unk>'; choose other words, or another tokenizer",
        str(error.value),
    )
    prompt = draw(random.Random(0), NAMES[:9], abba=True)
    strange = replace(prompt, fresh=("Zebra", *prompt.fresh[1:]))
    with pytest.raises(ValueError, match="pair 1 of `corrupt` must be of words .*; 'Zebra' in '"):
        build(
            whole_words([*used, *NAMES[:9]]), [prompt.pair("abc"), strange.pair("abc")], name="ioi"
        )
