"""How the house is divided, held by reading the source: imports, public names, one place each."""

import ast
import importlib
import inspect
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("relp", "circuits", "tasks")
PACKAGES = (*ROOMS, "tasks.zoo", "tasks.planted")
SOURCES = {str(p.relative_to(ROOT)): p for r in ROOMS for p in sorted((ROOT / r).rglob("*.py"))}
MODULES = [s.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for s in SOURCES]

TOP_LEVEL = {
    *("pyproject.toml", "relp", "circuits", "tasks", "tests", "notebooks", "README.md"),
    *("LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt", "docs", "mkdocs.yml"),
}
COMMAND = tuple(source for source in SOURCES if source.startswith("circuits/cli/"))
"""What knows all three rooms."""
HOOK = re.compile(r"\bhook_(in|out|resid|attn|mlp|pattern|q|k|v|z)\w*")


def imported_rooms(tree: ast.AST) -> set[str]:
    """Our own packages that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            found.add((node.module or "").partition(".")[0])
    return found & set(ROOMS)


def code(tree: ast.AST) -> Iterator[str]:
    """Names and strings of a module, without its docstrings (comments are not in the tree)."""
    prose = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value
        for name in ("id", "attr", "arg", "name"):
            if isinstance(value := getattr(node, name, None), str):
                yield value


def test_the_sources_are_found() -> None:
    assert {"relp/bridge/sites.py", "circuits/cli/patch.py", "tasks/zoo/__init__.py"} <= set(
        SOURCES
    )


@pytest.mark.parametrize("source", SOURCES)
def test_rooms_import_in_one_direction(source: str) -> None:
    room = source.partition("/")[0]
    allowed = {
        "relp": {"relp"},
        "tasks": {"tasks"},
        "circuits": {"circuits", "relp"},
    }[room] | {
        **dict.fromkeys(COMMAND, {"tasks"}), "relp/__main__.py": {"circuits"}
    }.get(source, set())  # fmt: skip
    assert imported_rooms(ast.parse(SOURCES[source].read_text())) <= allowed


def test_the_import_reader_sees_every_form() -> None:
    text = (
        "import tasks.zoo as z\ndef f():\n    from relp.scores import Scores\nimport relpx, torch"
    )
    assert imported_rooms(ast.parse(text)) == {"tasks", "relp"}


ORDER = {
    "relp": "bars lazy neighbours choices files protocols layout dictionaries scores rules "
    "operations rulebook partway propagation bridge features nodes edges feature_edges "
    "attribution __init__ __main__",
    "circuits": "choices graph steering masked kept engines exact search judge draw explorer files "
    "__init__ cli",
    "tasks": "lists text aligned tables metrics pair task prompts ioi greater_than "
    "gendered_pronoun subject_verb induction docstring colored_objects capital_country arithmetic "
    "multiple_choice registry able zoo planted __init__",
}
"""The modules and folders of each room: what stands later may import what stands before."""


def at_import(tree: ast.Module) -> Iterator[ast.ImportFrom]:
    """What a module imports when it is itself imported: not in functions, not for type checkers."""
    for node in tree.body:
        assert not isinstance(node, ast.Import) or not {
            alias.name for alias in node.names if alias.name.partition(".")[0] in ROOMS
        }, "rooms are imported from"
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ROOMS:
            yield node


def place(module: str) -> tuple[str, str]:
    """`circuits.draw.paint` -> ("circuits", "draw")."""
    room, _, rest = module.partition(".")
    return room, rest.partition(".")[0] or "__init__"


@pytest.mark.parametrize("module", MODULES)
def test_inside_a_room_imports_go_in_one_direction(module: str) -> None:
    room, own = place(module)
    order = ORDER[room].split()
    for node in at_import(ast.parse(source_of(module).read_text())):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in [n if n in MODULES else str(node.module) for n in names]:
            other, theirs = place(name)
            if other == room and theirs != own and name != room:
                assert order.index(theirs) < order.index(own), f"{module} imports {name}"


def source_of(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@pytest.mark.parametrize("module", [m for m in MODULES if place(m)[0] == "circuits"])
def test_circuits_takes_public_names_of_relp_and_of_its_bridge_alone(module: str) -> None:
    public = {name: set(importlib.import_module(name).__all__) for name in ("relp", "relp.bridge")}
    for node in ast.walk(ast.parse(source_of(module).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "relp":
            names = {alias.name for alias in node.names}
            if module.count(".") < 2 and source_of(module).name == "__init__.py":
                names -= {"lazy"}  # what makes the names of a package come when they are used
            assert names <= public.get(str(node.module), set()), f"from {node.module}: {names}"


def test_chains_of_imports_are_short_and_have_no_cycle() -> None:
    """A chain is followed inside its room: between rooms stands a seam."""
    needs: dict[str, set[str]] = {}
    for module in MODULES:
        needs[module] = set()
        for node in at_import(ast.parse(source_of(module).read_text())):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                needs[module].add(name if name in MODULES else defined_in(node, alias.name))
        needs[module] = {n for n in needs[module] - {module} if place(n)[0] == place(module)[0]}

    def longest(module: str, above: tuple[str, ...] = ()) -> tuple[str, ...]:
        assert module not in above, f"a cycle: {(*above, module)}"
        chains = [longest(other, (*above, module)) for other in sorted(needs[module])]
        return (module, *max(chains, key=len, default=()))

    inner = [m for m in MODULES if source_of(m).name != "__init__.py"]
    found = max(map(longest, inner), key=len)
    assert len(found) <= 6, found


def defined_in(node: ast.ImportFrom, name: str) -> str:
    """The module that a name comes from, through a package that hands it on."""
    home = importlib.import_module(str(node.module))
    if not hasattr(home, "__path__"):
        return str(node.module)
    for inner in ast.walk(ast.parse(source_of(str(node.module)).read_text())):
        if isinstance(inner, ast.ImportFrom) and name in {a.name for a in inner.names}:
            return str(inner.module)
    return str(node.module)


NAMING = {
    "relp/bridge/sites.py",
    "relp/dictionaries/hook_names.py",
    "tasks/zoo/dictionaries/places.py",
}
"""Ours are used in the first; the second reads those in files of others, and the third, in a room
that can ask neither, writes them into files."""


@pytest.mark.parametrize("source", sorted(set(SOURCES) - NAMING))
def test_only_sites_spells_hook_names(source: str) -> None:
    assert [c for c in code(ast.parse(SOURCES[source].read_text())) if HOOK.search(c)] == []


def test_the_hook_reader_sees_names_and_strings_but_no_prose() -> None:
    text = '"""hook_q"""\nx.hook_resid_pre\ny = f"blocks.{i}.hook_out"\nf(hook_z=1)\n# hook_k'
    spelled = [c for c in code(ast.parse(text)) if HOOK.search(c)]
    assert sorted(spelled) == [".hook_out", "hook_resid_pre", "hook_z"]
    assert any(HOOK.search(c) for c in code(ast.parse(SOURCES["relp/bridge/sites.py"].read_text())))


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_is_pickled(source: str) -> None:
    text = SOURCES[source].read_text()
    if source == "relp/dictionaries/dictionary_learning.py":
        # that format is torch's: its reader of tensors alone
        text = re.sub(r"torch\.load\([^()]*\bweights_only=True\)", "", text)
    assert not re.search(r"torch\.load\(|\b(pickle|joblib|dill)\b", text)


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_what_a_star_import_gives(package: str) -> None:
    module = importlib.import_module(package)
    given: dict[str, object] = {}
    exec(f"from {package} import *", given)
    given.pop("__builtins__")
    assert sorted(module.__all__) == sorted(given) and len(set(module.__all__)) == len(given)
    ours = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and str(getattr(value, "__module__", "")).partition(".")[0] in ROOMS
    }
    assert ours <= set(given)


@pytest.mark.parametrize("name", MODULES)
def test_public_names_exist_and_have_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    assert inspect.getdoc(module), name
    public = set(getattr(module, "__all__", ()))
    public |= {
        n
        for n, v in vars(module).items()
        if not n.startswith("_")
        and getattr(v, "__module__", None) == name
        and (inspect.isclass(v) or inspect.isfunction(v))
    }
    for item in sorted(public):
        value = getattr(module, item)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert documented(value), f"{name}.{item}"
        if inspect.isclass(value) and value.__module__ == name:
            for member, method in vars(value).items():
                method = getattr(method, "__func__", method)
                plain = inspect.isfunction(method) or isinstance(method, property)
                if plain and not member.startswith("_"):
                    assert documented(method), f"{name}.{item}.{member}"


def documented(value: object) -> bool:
    """True if it has a docstring of its own (dataclasses make up their signature as one)."""
    text = getattr(value, "__doc__", None) or ""
    return bool(text.strip()) and not text.startswith(f"{getattr(value, '__name__', '')}(")


def test_the_top_level_stays_small() -> None:
    if not (ROOT / ".git").exists():
        return
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    top = {line.partition("/")[0] for line in listed if line}
    assert {"relp", "circuits", "tasks", "tests"} <= top
    assert {n for n in top if not n.startswith(".")} <= TOP_LEVEL
