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
PACKAGES = (*ROOMS, "tasks.zoo")
SOURCES = {str(p.relative_to(ROOT)): p for r in ROOMS for p in sorted((ROOT / r).rglob("*.py"))}
MODULES = [s.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for s in SOURCES]

TOP_LEVEL = {
    *("pyproject.toml", "relp", "circuits", "tasks", "tests", "notebooks", "README.md"),
    *("LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt", "docs"),
}
HOOK = re.compile(r"\bhook_(in|out|resid|attn|mlp|q|k|v|z)\w*")


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
    assert {"relp/bridge/sites.py", "circuits/cli.py", "tasks/zoo/__init__.py"} <= set(SOURCES)


@pytest.mark.parametrize("source", SOURCES)
def test_rooms_import_in_one_direction(source: str) -> None:
    room = source.partition("/")[0]
    allowed = {
        "relp": {"relp"},
        "tasks": {"tasks"},
        "circuits": {"circuits", "relp"},
    }[room] | {"circuits/cli.py": {"tasks"}, "relp/__main__.py": {"circuits"}}.get(source, set())
    assert imported_rooms(ast.parse(SOURCES[source].read_text())) <= allowed


def test_the_import_reader_sees_every_form() -> None:
    text = (
        "import tasks.zoo as z\ndef f():\n    from relp.scores import Scores\nimport relpx, torch"
    )
    assert imported_rooms(ast.parse(text)) == {"tasks", "relp"}


@pytest.mark.parametrize("source", sorted(set(SOURCES) - {"relp/bridge/sites.py"}))
def test_only_sites_spells_hook_names(source: str) -> None:
    assert [c for c in code(ast.parse(SOURCES[source].read_text())) if HOOK.search(c)] == []


def test_the_hook_reader_sees_names_and_strings_but_no_prose() -> None:
    text = '"""hook_q"""\nx.hook_resid_pre\ny = f"blocks.{i}.hook_out"\nf(hook_z=1)\n# hook_k'
    spelled = [c for c in code(ast.parse(text)) if HOOK.search(c)]
    assert sorted(spelled) == [".hook_out", "hook_resid_pre", "hook_z"]
    assert any(HOOK.search(c) for c in code(ast.parse(SOURCES["relp/bridge/sites.py"].read_text())))


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_is_pickled(source: str) -> None:
    assert not re.search(r"torch\.load\(|\b(pickle|joblib|dill)\b", SOURCES[source].read_text())


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
