"""How the zoo models were made, and how to make them again: `python -m tasks.zoo.train ioi-gpt2`.

Tokenizer and model are trained from scratch on `tasks.zoo.corpus`; nothing is downloaded. Training
goes on where it stopped when the same command is given again. The model is written into place
at every evaluation where it is good enough on held-out combinations of template and names.

The shipped models: 64 rows a step, seed 0, on one core of a server CPU (`--threads 1`); ioi-gpt2
took 3000 steps, some 26 minutes, and ioi-llama 1200 steps, some 9 minutes. They choose the right
name from about step 800 and 600 on, and the rest is annealing. Another machine may round
differently and end at slightly different weights.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tasks.ioi import NAMES, OBJECTS, PLACES, Prompt
from tasks.zoo.corpus import document, held_out_prompts, vocabulary_text

__all__ = ["app", "train"]

BATCH = 64
PEAK_RATE = 1.5e-3
WARMUP = 100
WEIGHT_DECAY = 0.02
ECHO_STEPS = 600  # the curriculum: so long are some rows mere repetitions of names
INITIAL_SCALE = 0.06  # the usual 0.02 suits wide models; here attention would start too even
EVALUATE_EVERY = 100
ANSWER_WEIGHT = 4.0  # the last word of a row is the one that needs the mechanism
CONTEXT = 64
GOOD_ENOUGH = 0.99
HERE = Path(__file__).parent


# -- tokenizers --------------------------------------------------------------------------------


def byte_level_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in the manner of GPT-2: a leading space belongs to the word."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=end, eos_token=end, unk_token=end, pad_token=end
    )


def metaspace_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """BPE over "▁" words with bytes to fall back on, in the manner of Llama's SentencePiece."""
    space = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe = Tokenizer(models.BPE())
    # As SentencePiece does, learn no piece across punctuation; encoding then has no such merge.
    bpe.pre_tokenizer = pre_tokenizers.Sequence([space, pre_tokenizers.Punctuation()])
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2000, show_progress=False))
    learned = json.loads(bpe.to_str())["model"]
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = space
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    )
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
    )


def gpt2(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """LayerNorm, GELU, learned positions, tied embedding; 6 layers of 8 heads."""
    tokenizer = byte_level_tokenizer(vocabulary_text())
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT,
        n_embd=160,
        n_layer=6,
        n_head=8,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=INITIAL_SCALE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return GPT2LMHeadModel(config), tokenizer


def llama(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """RMSNorm, SwiGLU, rotary positions, tied embedding; 6 layers of 8 heads, 4 key/value heads."""
    tokenizer = metaspace_tokenizer(vocabulary_text())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        # Untied, MLPs of several layers stand in for one another: patching one shows little of it.
        tie_word_embeddings=True,
        initializer_range=INITIAL_SCALE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config), tokenizer


MODELS = {"ioi-gpt2": gpt2, "ioi-llama": llama}
STEPS = {"ioi-gpt2": 3000, "ioi-llama": 1200}  # of the shipped models


# -- data --------------------------------------------------------------------------------------


def encode(
    tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> tuple[Int[Tensor, "row pos"], Int[Tensor, " row"]]:
    """Token ids with the beginning-of-sequence token, padded on the right, and the row lengths."""
    rows = [[tokenizer.bos_token_id, *ids] for ids in tokenizer(texts).input_ids]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), tokenizer.pad_token_id)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens, lengths


def loss_weights(lengths: Int[Tensor, " row"], positions: int) -> Float[Tensor, "row pos"]:
    """Weight of predicting each next token: 1, more for the last word, 0 for padding."""
    at = torch.arange(1, positions)[None]
    weights = (at < lengths[:, None]).float()
    weights[at == lengths[:, None] - 2] = ANSWER_WEIGHT  # the word before the full stop
    return weights


@torch.no_grad()
def ioi_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]
) -> tuple[float, float]:
    """Share of prompts with IO above S, and share with IO first of the whole vocabulary."""
    # Right padding cannot reach the answer position of a causal model.
    tokens, lengths = encode(tokenizer, [p.text() for p in prompts])
    logits = model(tokens).logits[torch.arange(len(prompts)), lengths - 1]
    io, s = (
        torch.tensor([tokenizer(f"Then {name}").input_ids[-1] for name in names])
        for names in ([p.io for p in prompts], [p.s for p in prompts])
    )
    rows = torch.arange(len(prompts))
    above = (logits[rows, io] > logits[rows, s]).float().mean()
    first = (logits.argmax(-1) == io).float().mean()
    return float(above), float(first)


def check_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    """Every name and filler is one token after a space."""
    base = len(tokenizer("Then").input_ids)
    words = [*NAMES, *PLACES, *OBJECTS]
    split = [w for w in words if len(tokenizer(f"Then {w}").input_ids) != base + 1]
    if split:
        raise RuntimeError(
            f"names and fillers must be one token each; got several for {split}; "
            "raise the tokenizer's vocab_size"
        )


# -- checkpoints: one safetensors file, its JSON header says which run and step ------------------


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, header: dict[str, Any]
) -> None:
    """Write weights and optimizer state; a reader sees the old file or the new, never a part."""
    tensors = {f"model.{k}": v.detach().clone() for k, v in model.named_parameters()}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            tensors[f"optimizer.{index}.{key}"] = value.clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    save_file(tensors, fresh, metadata={"run": json.dumps(header)})
    fresh.replace(path)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, run: dict[str, Any]
) -> dict[str, Any]:
    """Fill model and optimizer from `path`; returns the header.

    Raises:
        ValueError: the checkpoint is of another run (name, steps or seed).
    """
    parameters = dict(model.named_parameters())
    states: dict[int, dict[str, Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        header: dict[str, Any] = json.loads(file.metadata()["run"])
        if header["run"] != run:
            raise ValueError(
                f"the checkpoint must be of the run {run}; got {header['run']} in {path}; "
                "give the same options again, or delete the file to start anew"
            )
        for key in file.keys():  # noqa: SIM118 - a safetensors handle is no dict
            kind, _, rest = key.partition(".")
            if kind == "model":
                with torch.no_grad():
                    parameters[rest].copy_(file.get_tensor(key))
            else:
                index, _, name = rest.partition(".")
                states.setdefault(int(index), {})[name] = file.get_tensor(key)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    return header


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model as a Hugging Face folder, weights rounded to float16."""
    half = type(model)(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# -- training ----------------------------------------------------------------------------------


def rate(step: int, steps: int) -> float:
    """Learning rate: linear warm-up, then a cosine down to a twentieth of the peak."""
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return PEAK_RATE * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def train(
    name: str,
    *,
    out: Path,
    steps: int | None = None,
    seed: int = 0,
    threads: int = 2,
    progress: bool = True,
) -> tuple[float, float]:
    """Train one model into `out`; returns its two held-out accuracies (see `ioi_accuracy`).

    Without `steps`, as many as the shipped model of that name took.
    Zeros mean that it never became good enough, and that `out` holds no model.

    Raises:
        ValueError: unknown name, or `out` holds a checkpoint of another run.
    """
    if name not in MODELS:
        raise ValueError(
            f"the model to train must be one of {sorted(MODELS)}; got {name!r}; choose one of them"
        )
    steps = STEPS[name] if steps is None else steps
    torch.set_num_threads(threads)
    model, tokenizer = MODELS[name](seed)
    check_vocabulary(tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True
    )
    unseen = held_out_prompts(512)
    checkpoint = out / "checkpoint" / "state.safetensors"
    run = {"name": name, "steps": steps, "seed": seed}
    header: dict[str, Any] = {"run": run, "step": 0, "exported": [0.0, 0.0]}
    if checkpoint.exists():
        header = load_checkpoint(checkpoint, model, optimizer, run)

    bar = tqdm(
        range(header["step"], steps), initial=header["step"], total=steps, disable=not progress
    )
    for step in bar:
        rng = random.Random(f"{name} {seed} {step}")  # a resumed run sees the same rows
        echo = 0.6 * max(0.0, 1 - step / ECHO_STEPS)
        texts = [document(rng, echo=echo) for _ in range(BATCH)]
        rows = sorted(texts, key=lambda text: text.count(" "))
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        model.train()
        optimizer.zero_grad()
        # Short rows and long rows apart: a quarter less padding, the same gradient.
        halves = [encode(tokenizer, rows[: BATCH // 2]), encode(tokenizer, rows[BATCH // 2 :])]
        weights = [loss_weights(lengths, tokens.shape[1]) for tokens, lengths in halves]
        total = sum(w.sum() for w in weights)
        loss = 0.0
        for (tokens, _), weight in zip(halves, weights, strict=True):
            losses = torch.nn.functional.cross_entropy(
                model(tokens).logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
            )
            part = (losses * weight).sum() / total
            part.backward()
            loss += float(part.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % EVALUATE_EVERY == 0 or step + 1 == steps:
            model.eval()
            accuracy = list(ioi_accuracy(model, tokenizer, unseen))
            bar.write(
                f"step {step + 1}: loss {loss:.3f}, held-out IO above S {accuracy[0]:.4f}, "
                f"IO first {accuracy[1]:.4f}"
            )
            if accuracy[0] >= GOOD_ENOUGH:
                export(model, tokenizer, out)
                header["exported"] = accuracy
            header["step"] = step + 1
            save_checkpoint(checkpoint, model, optimizer, header)
    shutil.rmtree(checkpoint.parent, ignore_errors=True)
    above, first = header["exported"]
    return above, first


app = typer.Typer(add_completion=False)


@app.command()
def main(
    name: Annotated[str, typer.Argument(help="ioi-gpt2 or ioi-llama")],
    out: Annotated[Path | None, typer.Option(help="folder; default: the package's own")] = None,
    steps: Annotated[
        int | None, typer.Option(help="optimizer steps; default: as the shipped model")
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of weights and text")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
) -> None:
    """Train one zoo model on generated text and print its held-out IOI accuracy."""
    try:
        above, first = train(name, out=out or HERE / name, steps=steps, seed=seed, threads=threads)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"{name}: held-out IO above S {above:.4f}, IO first of all tokens {first:.4f}")


if __name__ == "__main__":
    app()
