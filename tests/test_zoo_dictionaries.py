"""The shipped dictionaries are what their files say, and the script would make them again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_tasks import byte_level
from typer.testing import CliRunner

from tasks import zoo
from tasks.registry import TASKS
from tasks.zoo.dictionaries import home, training
from tasks.zoo.dictionaries import texts as sources
from tasks.zoo.dictionaries.__main__ import app
from tasks.zoo.dictionaries.autoencoders import REVIVED, Autoencoders, reconstructed, values
from tasks.zoo.dictionaries.places import hook_of, padded, vectors
from tasks.zoo.dictionaries.quality import measured
from tasks.zoo.dictionaries.recipes import RECIPES
from tasks.zoo.dictionaries.texts import Corpus, Mixture, prose, written
from tasks.zoo.dictionaries.training import train
from tasks.zoo.shelf import HERE, shipped

SITES = ["L0.mlp", *(f"L{n}.{p}" for n in range(1, 6) for p in ("resid", "mlp")), "final"]
TINY = replace(
    RECIPES["ioi-gpt2"],
    sites=("L1.resid", "L1.mlp"), features=24, active=4, rounds=3, texts=24, batch=128,
)  # fmt: skip

LEAST_EXPLAINED = 0.9
LEAST_KEPT = 0.9


@pytest.fixture(scope="module", params=["ioi-gpt2", "ioi-llama"])
def model(request: pytest.FixtureRequest) -> Any:
    return zoo.load(request.param)


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "cfg.json").read_text())
    return found


# -- what is shipped -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ioi-gpt2", "ioi-llama"])
def test_every_site_has_a_dictionary_in_the_layout_of_saelens(name: str) -> None:
    found = zoo.dictionaries(name)
    assert list(found) == SITES
    for site, folder in found.items():
        assert {p.name for p in folder.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
        weights, cfg = load_file(folder / "sae_weights.safetensors"), config(folder)
        width, features = 160, 224
        assert {n: list(t.shape) for n, t in weights.items()} == {
            "W_enc": [width, features],
            "W_dec": [features, width],
            "b_enc": [features],
            "b_dec": [width],
            "threshold": [features],
        }
        assert {t.dtype for t in weights.values()} == {torch.float16}
        assert all(bool(t.isfinite().all()) for t in weights.values())
        assert (weights["threshold"] > 0).all()
        torch.testing.assert_close(
            weights["W_dec"].float().norm(dim=1), torch.ones(features), atol=1e-3, rtol=0
        )
        assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"]) == ("jumprelu", width, features)
        assert cfg["dtype"] == "float32" and cfg["apply_b_dec_to_input"] is True
        assert cfg["metadata"]["model_name"] == name
        assert cfg["metadata"]["hook_name"] == hook_of(site, 6)


def test_all_of_them_are_small() -> None:
    files = [f for f in HERE.glob("ioi-*/dictionaries/**/*") if f.is_file()]
    assert len(files) == 2 * 2 * len(SITES)
    assert sum(f.stat().st_size for f in files) <= 3_500_000


def test_they_explain_what_their_files_say(model: Any) -> None:
    name = model.cfg.model_name
    rows = Corpus(model.tokenizer, 0).held_out()[::2]
    for (site, folder), x in zip(
        zoo.dictionaries(name).items(), vectors(model, rows, SITES, first=False), strict=True
    ):
        said = config(folder)["metadata"]
        found = measured(model, site, load_file(folder / "sae_weights.safetensors"), x, {})
        # Half of the texts that it was judged on: they scatter by less than this.
        assert abs(found.explained - said["explained_variance"]) < 0.01, site
        assert found.explained > LEAST_EXPLAINED, site
        assert abs(found.active - said["l0"]) < 1 and found.active < 20, site


@pytest.mark.long
def test_the_task_survives_each_of_them(model: Any) -> None:
    whole = Corpus(model.tokenizer, 0)
    task = whole.tasks()["ioi"][:32]
    rows = whole.held_out()[:32]
    for (site, folder), x in zip(
        zoo.dictionaries(model.cfg.model_name).items(), vectors(model, rows, SITES), strict=True
    ):
        weights = load_file(folder / "sae_weights.safetensors")
        found = measured(model, site, weights, x, {"ioi": task})
        assert abs(found.kept["ioi"] - config(folder)["metadata"]["metric_kept"]["ioi"]) < 0.05
        assert found.kept["ioi"] > LEAST_KEPT, site
        if site == "final" or site.endswith("resid"):  # all that the model knows passes through
            assert abs(found.without["ioi"]) < 0.1


# -- where they read -------------------------------------------------------------------------------


def test_sites_hold_what_transformers_gives(model: Any) -> None:
    rows = [[1, 5, 9, 30], [1, 7], [1, 8, 20]]
    found = vectors(model, rows, ("L0.mlp", "L1.resid", "L3.resid", "final"))
    at = 0
    for row in sorted(rows, key=len):
        with torch.no_grad():
            out = model.original_model(torch.tensor([row]), output_hidden_states=True)
        for i, layer in ((1, 1), (2, 3)):
            mine = found[i, at : at + len(row)]
            torch.testing.assert_close(mine, out.hidden_states[layer][0], atol=1e-4, rtol=1e-4)
        at += len(row)
    assert at == found.shape[1] == 9
    # the first position holds the same in all texts
    first = vectors(model, [[1]], ("final",))[0, 0]
    torch.testing.assert_close(first, found[3, 0], atol=1e-4, rtol=1e-4)
    assert vectors(model, rows, ("final",), first=False).shape[1] == 6


def test_hook_points_are_named_as_transformerlens_does() -> None:
    assert hook_of("L1.resid", 6) == "blocks.0.hook_resid_post"
    assert hook_of("final", 6) == "blocks.5.hook_resid_post"
    assert hook_of("L11.mlp", 30) == "blocks.11.hook_mlp_out"


def test_padding_stands_on_the_right() -> None:
    tokens, lengths = padded([[1, 2, 3], [4]], 9)
    assert tokens.tolist() == [[1, 2, 3], [4, 9, 9]] and lengths.tolist() == [3, 1]


# -- the autoencoders ------------------------------------------------------------------------------


def made(sites: int = 2, width: int = 6, features: int = 10, active: int = 3) -> Any:
    torch.manual_seed(0)
    own = Autoencoders(sites, width, features, active)
    x = torch.randn(sites, 50, width) * torch.tensor([1.0, 30.0])[:sites, None, None] + 2
    own.start(x, torch.Generator().manual_seed(0))
    with torch.no_grad():
        own.b_enc.normal_()
    return own, x


def test_a_batch_keeps_as_many_values_as_are_wanted() -> None:
    own, x = made()
    _, kept = own(own.scaled(x))
    assert (kept > 0).sum((1, 2)).tolist() == [150, 150]
    before = own.before(own.scaled(x))
    for site in range(2):
        largest = before[site].flatten().sort(descending=True).values[:150]
        assert torch.equal(kept[site][kept[site] > 0].sort(descending=True).values, largest)


def test_a_file_gives_in_the_models_units_what_was_trained() -> None:
    own, x = made()
    for site, weights in enumerate(own.exported(x, torch.float32)):
        pre = torch.zeros(50, 10)
        for i in range(50):  # the formula of a JumpReLU, one feature of one vector at a time
            for f in range(10):
                pre[i, f] = (x[site, i] - weights["b_dec"]) @ weights["W_enc"][:, f]
                pre[i, f] += weights["b_enc"][f]
        slow = torch.where(pre > weights["threshold"], pre, torch.zeros(()))
        torch.testing.assert_close(values(weights, x[site]), slow, atol=1e-4, rtol=1e-4)
        # the smallest kept value is the threshold, which it must exceed: one feature less
        trained = own(own.scaled(x))[1][site] * own.spread[site]
        assert (slow > 0).sum() in (149, 150)
        both = (slow > 0) & (trained > 0)
        torch.testing.assert_close(slow[both], trained[both], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(
            reconstructed(weights, x[site]),
            slow @ weights["W_dec"] + weights["b_dec"],
            atol=1e-4,
            rtol=1e-4,
        )


def test_the_dead_are_set_on_what_is_reconstructed_worst() -> None:
    own = Autoencoders(1, 6, 10, 1)
    with torch.no_grad():  # feature 0 is the first axis, exactly; no other is ever on
        own.w_enc[0, 0, 0] = own.w_dec[0, 0, 0] = 1.0
        own.w_dec[0, 1:, 3] = 1.0
    z = torch.zeros(1, 50, 6)
    z[0, :, 0] = torch.arange(1.0, 51)  # long or short, explained
    z[0, 7] = 0.1 * torch.eye(6)[2]  # the shortest, and of the second axis
    dead = torch.zeros(1, 10, dtype=torch.bool)
    dead[0, 4] = True
    before = own.w_dec.detach().clone()
    own.revive(z, dead, torch.Generator().manual_seed(0))
    torch.testing.assert_close(own.w_dec[0, 4], torch.eye(6)[2])
    torch.testing.assert_close(own.w_enc[0, :, 4], torch.eye(6)[2] * REVIVED / 9)
    assert torch.equal(own.w_dec[0, [0, 1, 2, 3, 5, 6, 7, 8, 9]],
                       before[0, [0, 1, 2, 3, 5, 6, 7, 8, 9]])  # fmt: skip


# -- training --------------------------------------------------------------------------------------


@pytest.fixture
def small_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small dictionaries, judged on little."""
    monkeypatch.setitem(RECIPES, "ioi-gpt2", TINY)
    unseen, tasks = Corpus.held_out, Corpus.tasks
    monkeypatch.setattr(Corpus, "held_out", lambda self: unseen(self)[:8])
    monkeypatch.setattr(Corpus, "tasks", lambda self: {"ioi": tasks(self)["ioi"][:4]})


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_training_is_the_same_again_and_after_an_interruption(
    small_recipe: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = train("ioi-gpt2", out=tmp_path / "one", progress=False)
    assert train("ioi-gpt2", out=tmp_path / "two", progress=False) == one
    whole = files(tmp_path / "one")
    assert set(whole) == {f"{s}/{f}" for s in TINY.sites
                          for f in ("cfg.json", "sae_weights.safetensors")}  # fmt: skip
    assert files(tmp_path / "two") == whole

    round_, read = Corpus.round, list[int]()

    def stopping(self: Corpus, number: int, count: int) -> sources.Rows:
        read.append(number)
        if read == [0, 1, 2]:
            raise KeyboardInterrupt
        return round_(self, number, count)

    monkeypatch.setattr(Corpus, "round", stopping)
    with pytest.raises(KeyboardInterrupt):
        train("ioi-gpt2", out=tmp_path / "three", progress=False)
    assert [*files(tmp_path / "three")] == ["checkpoint/state.safetensors"]
    assert train("ioi-gpt2", out=tmp_path / "three", progress=False) == one
    assert read == [0, 1, 2, 2, 3]  # the last for the thresholds
    assert files(tmp_path / "three") == whole
    other = train("ioi-gpt2", out=tmp_path / "four", seed=1, progress=False)
    assert other != one


def test_a_checkpoint_of_another_run_is_refused(
    small_recipe: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "vectors", stop_at_the_end(training.vectors))
    with pytest.raises(KeyboardInterrupt):
        train("ioi-gpt2", out=tmp_path, rounds=1, progress=False)
    with pytest.raises(ValueError, match="the checkpoint must be of the run .*'rounds': 2.*got "
                                         ".*'rounds': 1.*delete the file"):  # fmt: skip
        train("ioi-gpt2", out=tmp_path, rounds=2, progress=False)


def stop_at_the_end(plain: Any) -> Any:
    calls = list[int]()

    def stopping(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*args, **options)

    return stopping


# -- texts -----------------------------------------------------------------------------------------


def test_rounds_differ_and_come_again() -> None:
    tokenizer = zoo.load("ioi-gpt2").tokenizer
    corpus = Corpus(tokenizer, 0)
    assert corpus.round(3, 5) == Corpus(tokenizer, 0).round(3, 5) != corpus.round(4, 5)
    assert {row[0] for row in corpus.round(0, 5)} == {tokenizer.bos_token_id}


def test_what_the_model_writes_is_kept_batch_by_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "WRITTEN", 3)
    monkeypatch.setattr(sources, "LENGTH", 8)
    rows = written(HERE / "ioi-gpt2", tmp_path, 2, 0)
    assert [len(row) for row in rows] == [8] * 6 and rows[:3] != rows[3:]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "written-0.safetensors", "written-1.safetensors",
    ]  # fmt: skip
    (tmp_path / "written-1.safetensors").unlink()
    before = (tmp_path / "written-0.safetensors").stat().st_mtime_ns
    assert written(HERE / "ioi-gpt2", tmp_path, 2, 0) == rows
    assert (tmp_path / "written-0.safetensors").stat().st_mtime_ns == before


def test_a_mixture_has_prose_own_texts_and_prompts_of_all_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WRITTEN": 64, "LENGTH": 8, "PROMPTS": 2}.items():
        monkeypatch.setattr(sources, name, value)
    text = " ".join(f"the book of {i}" for i in range(500))
    monkeypatch.setattr(sources, "prose", lambda: [text])
    tokenizer = byte_level()
    mixture = Mixture(tokenizer, HERE / "ioi-gpt2", tmp_path, 12, 0)
    assert len([*tmp_path.iterdir()]) == 1  # 4 rows of its own are enough: one batch
    rows = mixture.round(0, 6)
    assert len(rows) == 6 + 2 + len(TASKS) * 2 * 2
    assert {row[0] for row in rows} == {tokenizer.bos_token_id}
    assert {len(row) for row in rows[:8]} == {8}
    assert rows[:6] + rows[6:8] == mixture.prose[:6] + mixture.own[:2]
    assert mixture.round(1, 6)[:6] == mixture.prose[6:12]
    kept = mixture.held_out()
    assert kept and not [row for row in kept if row in mixture.prose + mixture.own]
    tasks = mixture.tasks()
    assert len(tasks) == 4 and {len(task) for task in tasks.values()} == {32}


def test_no_row_is_both_trained_on_and_judged() -> None:
    rows = [[1, n] for n in range(400)]
    seen, kept = sources._parted(rows)
    assert sorted(seen + kept) == rows and 10 <= len(kept) <= 45
    assert sources._slice(rows[:5], 1, 3) == [[1, 3], [1, 4], [1, 0]]


def test_prose_is_long_and_english() -> None:
    texts = prose()
    assert sum(map(len, texts)) > 1_000_000
    assert " the " in texts[0]


# -- where they are, and what is said --------------------------------------------------------------


def test_models_without_dictionaries_are_refused() -> None:
    said = r"must be one of ioi-gpt2, ioi-llama, smollm2-135m; got 'gpt2'; .*relp\.load_dictionary"
    with pytest.raises(ValueError, match=f"a model with dictionaries {said}"):
        zoo.dictionaries("gpt2")
    with pytest.raises(ValueError, match=r"must be one of \['ioi-gpt2', .*got 'gpt2'"):
        train("gpt2", out=Path("nowhere"))


def test_those_of_a_fetched_model_are_made_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELP_CACHE", str(tmp_path))
    folder = tmp_path / "dictionaries" / "smollm2-135m"
    assert home("smollm2-135m") == folder
    with pytest.raises(ValueError, match=r"must have been made on this machine; .* has none of "
                       r"L8\.mlp, L11\.resid; make them with: "
                       r"python -m tasks\.zoo\.dictionaries smollm2-135m$"):  # fmt: skip
        zoo.dictionaries("smollm2-135m")
    (folder / "L8.mlp").mkdir(parents=True)
    (folder / "L8.mlp" / "cfg.json").write_text("{}")
    with pytest.raises(ValueError, match=r"none of L11\.resid; make"):
        zoo.dictionaries("smollm2-135m")
    (folder / "L11.resid").mkdir()
    (folder / "L11.resid" / "cfg.json").write_text("{}")
    assert zoo.dictionaries("smollm2-135m") == {
        "L8.mlp": folder / "L8.mlp", "L11.resid": folder / "L11.resid",
    }  # fmt: skip


def test_the_command_prints_a_line_for_each_dictionary(small_recipe: None, tmp_path: Path) -> None:
    arguments = ["ioi-gpt2", "--out", str(tmp_path), "--rounds", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if line.startswith("L")]
    assert [line.split()[:2] for line in lines] == [[site, "explained"] for site in TINY.sites]
    wrong = CliRunner().invoke(app, ["gpt2"])
    assert wrong.exit_code == 2 and "ioi-llama" in wrong.output


def test_all_models_with_dictionaries_are_in_the_zoo() -> None:
    assert set(RECIPES) <= set(zoo.names()) and {*shipped()} <= set(RECIPES)
