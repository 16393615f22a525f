"""A model over several devices, or with its weights elsewhere, gives the numbers of one that is
all in one place; and what `zoo.load` and the command say of a placement that cannot be."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from conftest import able_task, boot, warm
from pretend import HERE, THERE, Pretend, devices
from test_cli import refused
from test_features import some
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

from circuits import (
    acdc,
    assemble,
    completeness,
    evaluate,
    evaluate_features,
    faithfulness,
    minimality,
    patch,
    top,
    verify,
)
from relp import DEEPLIFT, GRADIENT, PARTWAY, PRESETS, RELP, attribute
from relp.bridge import Rerun, Sites
from relp.bridge.basis import device_of
from tasks import Task, ioi, zoo
from tasks.zoo.placement import Placement

pytestmark = pytest.mark.filterwarnings("ignore:.*of the variance of.*unexplained")
FEATURES = ("L0.mlp/f4", "L1.resid/f2", "L1.attn/f7", "L1.mlp/f3", "L1.mlp/rest", "final/f1")
EDGES = [
    ("embed", "L1.mlp.in"),
    ("L0H1", "L2H0.q"),
    ("L1.mlp", "logits.in"),
    ("L0H0", "L1.mlp.in"),
]
Verb = Callable[[Any, Task], Any]


def circuit(model: Any, task: Task) -> Any:
    return top(assemble(attribute(model, task, rules=RELP, level="edge")), edges=25)


def edges(**options: Any) -> Verb:
    return lambda m, t: attribute(m, t, level="edge", progress=False, **options).edges


def nodes(**options: Any) -> Verb:
    return lambda m, t: attribute(m, t, progress=False, **options).nodes


def effects(**options: Any) -> Verb:
    return lambda m, t: patch(m, t, progress=False, **options).nodes


VERBS: dict[str, Verb] = {
    "nodes": nodes(rules=RELP),
    "edges": edges(rules=RELP),
    "nodes of two runs": nodes(rules=DEEPLIFT),
    "edges of two runs": edges(rules=DEEPLIFT),
    "nodes between": nodes(rules=PARTWAY),
    "edges between": edges(rules=PARTWAY),
    "edges by gradient": edges(rules=GRADIENT),
    "neurons": nodes(components=["neuron"]),
    "edges of neurons": edges(neurons=["L1N3", "L0N2"]),
    "edges by position": edges(positions=True),
    "steps": nodes(rules=GRADIENT, steps=2),
    "steps of activations": nodes(rules=GRADIENT, steps=2, path="activations"),
    "patch": effects(),
    "patch neurons": effects(components=["L1N3", "L2N4"]),
    "patch means": effects(ablation="mean"),
    "patch edges": lambda m, t: patch(m, t, level="edge", edges=EDGES, progress=False).edges,
    "verify": lambda m, t: verify(m, t, attribute(m, t, components=["mlp"]), budget=20).nodes,
    "faithfulness": lambda m, t: faithfulness(m, t, circuit(m, t)),
    "completeness": lambda m, t: completeness(m, t, circuit(m, t)),
    "minimality": lambda m, t: minimality(m, t, circuit(m, t)),
    "evaluate": lambda m, t: evaluate(m, t, attribute(m, t, level="edge"), sizes=(0.1, 0.5)),
    "acdc": lambda m, t: acdc(m, t, tau=1.0, progress=False).number_of_edges(),
    "preferred": lambda m, t: t.preferred(m),
    "features": lambda m, t: attribute(m, t, rules=DEEPLIFT, features=some(m)).nodes,
    "edges of features": lambda m, t: (
        attribute(m, t, rules=DEEPLIFT, level="edge", features=some(m), components=FEATURES).edges
    ),
    "patch features": lambda m, t: effects(components=FEATURES, features=some(m))(m, t),
    "circuits of features": lambda m, t: torch.tensor(
        evaluate_features(
            m, t, attribute(m, t, rules=DEEPLIFT, features=some(m)), features=some(m), sizes=(5,)
        ).faithfulness.tolist()
    ),
}
FEW = ("nodes", "edges of two runs", "edges of neurons", "patch", "patch edges", "faithfulness")
"""What runs each time; the others are long proofs."""


def each(name: str) -> Any:
    return pytest.param(name, marks=() if name in FEW else pytest.mark.long, id=name)


every_verb = pytest.mark.parametrize("verb", [each(name) for name in VERBS])


def same(found: Any, expected: Any) -> None:
    """Tensors, numbers or tables that differ by rounding at most."""
    if isinstance(expected, Tensor):
        assert found.device.type == "cpu"
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    elif isinstance(expected, bool | int | float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    elif hasattr(expected, "faithfulness"):
        same(found.faithfulness, expected.faithfulness)
    else:
        numbers = [f.select_dtypes("number").to_numpy() for f in (found, expected)]
        same(*(torch.tensor(n.copy(), dtype=torch.float64) for n in numbers))


# -- devices that are not there --------------------------------------------------------------------


def test_two_devices_that_are_not_there_do_not_mix() -> None:
    """Or nothing below would prove anything."""
    with devices():
        x, y = torch.ones(3, 4).to(HERE), torch.ones(3, 4).to(THERE)
        assert (x.device, y.device) == (torch.device(HERE), torch.device(THERE))
        for mixing in (
            lambda: x + y,
            lambda: x @ y.T,
            lambda: x + torch.ones(3, 4),
            lambda: torch.cat([x, y]),
            lambda: torch.bmm(x[None], x.T[None], out=torch.empty(1, 3, 3, device=THERE)),
            lambda: nn.functional.linear(x, nn.Parameter(y)),
            lambda: x[torch.tensor([0]).to(THERE)],
            lambda: x.clone().__setitem__(0, y[0]) or x.add_(y),
        ):
            with pytest.raises(RuntimeError, match="not on one device"):
                mixing()
        moved = (x + y.to(x.device)).cpu()
        assert not isinstance(moved, Pretend) and torch.equal(moved, torch.full((3, 4), 2.0))
        assert (x[torch.tensor([0])] * 2.0).device == x.device == x.new_zeros(1).device


def test_gradients_go_back_over_two_devices() -> None:
    with devices():
        x = torch.arange(3.0).to(HERE).requires_grad_()
        (x.to(THERE).square() * torch.arange(3.0, device=THERE)).sum().backward()
        assert x.grad is not None and x.grad.device == x.device
        assert torch.equal(x.grad.cpu(), 2 * torch.arange(3.0).square())


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def both(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any, Task]]:
    """A model with its middle block on another device, the same in one place, and a task.

    As transformers leaves it: accelerate's hooks move what goes into each block.
    """
    folder = request.getfixturevalue(f"{request.param}_folder")
    plain = boot(folder)
    with pytest.MonkeyPatch.context() as patched:
        # a parameter that is no plain tensor would be taken for a packed one
        patched.setattr("relp.bridge.sites.check_unpacked", lambda _: None)
        with devices():
            inner = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
            inner = dispatch_model(inner, apart(inner), skip_keys=inner._skip_keys_device_placement)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model = TransformerBridge.boot_transformers(
                str(folder), hf_model=inner, tokenizer=tokenizer
            )
            warm(model.eval())
        yield model, plain, able_task(plain, pairs=2, length=5)


def apart(model: Any) -> dict[str, str]:
    """The middle block there, all else here."""
    (blocks,) = (n for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
    found = {}
    for name, module in model.named_modules():
        if name.startswith(f"{blocks}.") and name.count(".") == blocks.count(".") + 1:
            found[name] = THERE if name.endswith(".1") else HERE
        elif not name.startswith(blocks) and not list(module.children()):
            found[name] = HERE
    return found


@every_verb
def test_two_devices_give_the_numbers_of_one(both: tuple[Any, Any, Task], verb: str) -> None:
    model, plain, task = both
    weights = {str(p.device) for p in model.original_model.parameters()}
    assert weights == {HERE, THERE} and str(Sites.of(model).device) == HERE
    before = hooks(model)
    with devices():
        same(VERBS[verb](model, task), VERBS[verb](plain, task))
    assert hooks(model) == before


@pytest.mark.long
@pytest.mark.parametrize("rules", PRESETS)
def test_every_preset_knows_two_devices(both: tuple[Any, Any, Task], rules: str) -> None:
    model, plain, task = both
    for verb in (nodes(rules=PRESETS[rules]), edges(rules=PRESETS[rules])):
        with devices():
            same(verb(model, task), verb(plain, task))


def hooks(model: Any) -> list[tuple[Any, ...]]:
    return [(n, len(m._forward_hooks), len(m._forward_pre_hooks), m.forward.__name__ == "run")
            for n, m in model.named_modules()]  # fmt: skip


def test_blocks_are_left_out_on_two_devices_too(both: tuple[Any, Any, Task]) -> None:
    """What a run can skip is tried out once, and a mix of devices would look like a refusal."""
    model, plain, task = both
    for side in ("clean", "corrupt"):
        with devices():
            found, expected = (Rerun.of(Sites.of(m), task, (), side=side) for m in (model, plain))
        assert len(found.past) == len(expected.past) == 3
        assert found.pointwise and found.sparse and expected.pointwise and expected.sparse
        assert {str(keys.device) for keys, _ in found.past} == {HERE, THERE}
    assert str(device_of(model.blocks[1])) == str(device_of(model.blocks[1].ln1)) == THERE


# -- weights on the disk, or fetched from the CPU --------------------------------------------------


def on_disk(folder: str, away: Path) -> Any:
    return TransformerBridge.boot_transformers(
        folder, device_map={"": "disk"}, offload_folder=str(away)
    ).eval()


def some_on_disk(folder: str, away: Path) -> Any:
    """Every other part; what ties its weights to another one's goes with it."""
    inner = AutoModelForCausalLM.from_pretrained(folder)
    places = {n: "disk" if i % 2 else "cpu" for i, n in enumerate(apart(inner))}
    if inner.config.tie_word_embeddings:
        places["lm_head"] = places[next(iter(places))]
    return TransformerBridge.boot_transformers(
        folder, device_map=places, offload_folder=str(away)
    ).eval()


def by_cpu_offload(folder: str, _: Path) -> Any:
    inner = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    cpu_offload(inner, torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return TransformerBridge.boot_transformers(folder, hf_model=inner, tokenizer=tokenizer).eval()


OFFLOADS = {"disk": on_disk, "disk and CPU": some_on_disk, "cpu_offload": by_cpu_offload}


@pytest.fixture(scope="module", params=OFFLOADS)
def elsewhere(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Any]:
    booted: dict[str, Any] = {}

    def make(folder: str) -> Any:
        if folder not in booted:
            away = tmp_path_factory.mktemp("away")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                booted[folder] = warm(OFFLOADS[request.param](folder, away))
        return booted[folder]

    return make


@every_verb
def test_offloaded_weights_give_the_numbers_of_others(
    elsewhere: Callable[[str], Any], gpt2_folder: Path, verb: str
) -> None:
    folder = gpt2_folder
    model, plain = elsewhere(str(folder)), boot(folder)
    assert any(p.is_meta for p in model.original_model.parameters())
    before = hooks(model)
    task = able_task(plain, pairs=2, length=5)
    same(VERBS[verb](model, task), VERBS[verb](plain, task))
    assert hooks(model) == before
    assert any(p.is_meta for p in model.original_model.parameters())


@pytest.mark.parametrize(
    "verb", ["nodes", "edges", pytest.param("faithfulness", marks=pytest.mark.long)]
)
def test_a_shipped_model_on_the_disk_gives_the_same_numbers(verb: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = zoo.load("ioi-llama", device_map="disk")
    plain = zoo.load("ioi-llama")
    task = ioi(plain.tokenizer, pairs=1, seed=0)
    assert all(p.is_meta for p in model.original_model.parameters())
    same(VERBS[verb](model, task), VERBS[verb](plain, task))
    assert model.cfg.model_name == "ioi-llama"


# -- where to load a model -------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"dtype": "int8"},
        "`dtype` must be one of float32, bfloat16, float16, float64; got 'int8'; leave it out for "
        "float32",
    ),
    (
        {"device": "cuda:99"},
        r"`device` must name what torch finds on this machine \(cpu.*\); got 'cuda:99'; leave it "
        "out, or install a torch for that device",
    ),
    ({"device_map": {"": "meta"}}, "`device_map` must name what torch finds .* got 'meta'"),
    ({"device_map": 99}, "`device_map` must name what torch finds .* got '99'"),
    (
        {"device": "cpu", "device_map": "auto"},
        "`device` and `device_map` must not both be given; got 'cpu' and 'auto'; a device map says "
        "itself what goes where, so leave `device` out",
    ),
    (
        {"device_map": {}},
        "`device_map` must be one of auto, balanced, .* got {}; 'auto' fills one device after the "
        "other",
    ),
    (
        {"device_map": {"a": 0, "b": "cpu"}},
        "must keep all weights on GPUs, or all on CPU and disk, as the bridge refuses the two "
        "together; got {'a': 0, 'b': 'cpu'}, which mixes them; give more or larger GPUs",
    ),
    (
        {"device_map": "none.json"},
        "a file of a device map must be JSON, .* 'none.json' could not be read",
    ),
]


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": torch.float16, "device": "cpu"}, torch.float16),
        ({"device": "auto"}, torch.float32),
        ({"device_map": "auto"}, torch.float32),
        ({"device_map": {"": "cpu"}, "dtype": "float64"}, torch.float64),
    ],
)
def test_a_model_is_loaded_where_and_as_precise_as_asked(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    model = zoo.load("ioi-gpt2", **options)
    assert {p.dtype for p in model.original_model.parameters()} == {dtype}
    task = ioi(model.tokenizer, pairs=2, seed=0)
    assert attribute(model, task).provenance.dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    ("options", "message"),
    REFUSED,
)
def test_a_placement_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zoo.load("ioi-gpt2", **options)


def test_what_accelerate_mixes_by_itself_is_refused_in_our_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise ValueError("Realized hf_device_map is unsupported: device_map mixes CPU/disk offload")

    monkeypatch.setattr(TransformerBridge, "boot_transformers", full)
    with pytest.raises(
        ValueError, match="must keep all weights on GPUs, .* got 'auto' for 'ioi-gp"
    ):
        zoo.load("ioi-gpt2", device_map="auto")


def test_a_loaded_model_stays_where_it_is(gpt2_folder: Path) -> None:
    inner = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder)
    with pytest.raises(TypeError, match="a loaded model must be where .* call its `to` before"):
        zoo.load(inner, tokenizer, dtype="bfloat16")


def test_a_device_map_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"": "cpu"}), encoding="utf-8")
    assert Placement(device_map=str(path)).options() == {"device_map": {"": "cpu"}}
    assert Placement(device_map="cpu").options() == {"device_map": {"": "cpu"}}


COMMANDS = (
    "discover ioi", "compare ioi", "patch ioi", "verify ioi", "bench", "coverage ioi-gpt2",
    "tasks --model ioi-gpt2",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_loads_a_model_checks_where_to(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zoo.boot, "boot", lambda *_: pytest.fail("the model was loaded"))
    said = refused(*command.split(), "--dtype", "int8")
    assert said.startswith("`dtype` must be one of float32, bfloat16, float16")
    said = refused(*command.split(), "--device", "cpu", "--device-map", "auto")
    assert said.startswith("`device` and `device_map` must not both be given")
    assert not list(tmp_path.iterdir())


def test_tasks_need_a_model_to_place() -> None:
    assert "must go with a model that is asked now" in refused("tasks", "--dtype", "bfloat16")
