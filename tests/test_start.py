"""What happens before torch is there: options are refused, and other packages of our names."""

import ast
import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from test_house import PACKAGES, ROOT, SOURCES

from relp.neighbours import BEGINS


def python(*arguments: Any, path: Any = ROOT, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds our packages in `path`."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={"PYTHONPATH": str(path), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def last(run: subprocess.CompletedProcess[str]) -> str:
    assert run.returncode == 1, run
    return run.stderr.splitlines()[-1].removeprefix("ImportError: ")


# -- the command -----------------------------------------------------------------------------------

REFUSED = {
    "discover no": "the task must be one of ioi, ioi_abc",
    "discover --rules no": "rules must be one of",
    "discover --search no": "`--search` must be one of",
    "discover --search acdc": "`--search acdc` must get --tau",
    "discover --tau 0.1": "`--search acdc` must get --tau",
    "discover --search acdc --tau 1 --edges 9": "`--search acdc` must get --tau",
    "discover --search acdc --tau -1": "`tau` must be above 0",
    "discover --out file/folder": "`--out` must be a folder that can be written",
    "discover --model a/b/c": "the model must be one of",
    "patch no": "the task must be one of ioi, ioi_abc",
    "patch --level no": "`level` must be",
    "patch --direction no": "`direction` must be",
    "patch --ablation no": "`ablation` must be",
    "patch --out file": "`--out` must be a .safetensors file",
    "patch --out no/e.safetensors": "`--out` must lie in an existing folder",
    "patch --out old.safetensors": "`--out` must be a new file",
    "patch --model a/b/c": "the model must be one of",
    "compare no": "the task must be one of ioi, ioi_abc",
    "compare --model .": "a model's folder must hold",
    "coverage a/b/c": "the model must be one of",
    "coverage --rules no": "rules must be one of",
    "coverage down/page.gguf": "a GGUF file must begin with the letters GGUF",
    "models --remove no": "a model to remove must be one of smollm2-135m; got 'no'",
}
SCRIPT = """
import json, sys
from typer.testing import CliRunner
from circuits.cli import app
for line in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, line.split())
    print(line, result.exit_code, result.stderr, sep="|", end="\\0")
slow = {"torch", "transformers", "transformer_lens", "pandas", "numpy", "networkx", "plotly"}
print(sorted(slow & set(sys.modules)))
"""


def test_what_is_wrong_or_asked_is_answered_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "down").mkdir()
    for name in ("file", "old.safetensors", "down/page.gguf"):
        (tmp_path / name).write_text("")
    commands = ("", "discover", "patch", "compare", "coverage", "tasks", "models", "export")
    helps = [f"{command} --help" for command in commands]
    lines = str([*helps, *REFUSED]).replace("'", '"')
    *answers, slow = python("-c", SCRIPT, lines, cwd=tmp_path).stdout.split("\0")
    assert slow.strip() == "[]"
    for answer, (line, message) in zip(answers, [(h, "") for h in helps] + [*REFUSED.items()],
                                       strict=True):  # fmt: skip
        asked, code, said = answer.split("|", 2)
        assert (asked, code) == (line, "0" if line in helps else "1")
        assert said.startswith(f"error: {message}" if message else "") and said.count("\n") < 2
        assert bool(said) == bool(message)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["down", "file", "old.safetensors"]


# -- names that come when they are used ------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES[:3])
def test_lazy_names_are_those_that_type_checkers_see(package: str) -> None:
    """Each public name is written thrice: for readers of `__all__`, for mypy, and for Python."""
    module = importlib.import_module(package)
    tree = ast.parse(SOURCES[f"{package}/__init__.py"].read_text())
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    homes = {
        alias.name: node.module
        for node in typed.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {*homes} == set(module.__all__) - {"planted", "zoo"}
    for name, home in homes.items():
        assert getattr(module, name) is getattr(sys.modules[str(home)], name)
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError) as error:
        module.nothing  # noqa: B018
    assert str(error.value) == f"module {package!r} has no attribute 'nothing'"


@pytest.mark.parametrize("name", ["circuits.draw", "tasks.ioi"])
def test_a_module_does_not_take_the_place_of_the_name(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever is imported first, `circuits.draw` is the function."""
    package, _, short = name.partition(".")
    room = importlib.import_module(package)
    monkeypatch.setitem(vars(room), short, None)  # to be restored
    monkeypatch.delitem(vars(room), short)
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    assert getattr(room, short) is getattr(module, short) is vars(room)[short]


# -- names in the way ------------------------------------------------------------------------------


def found_first(name: str, other: Path, ours: Path = ROOT) -> str:
    return (
        f"`{name}` must be the package that comes with relp, {ours / name / '__init__.py'}; Python "
        f"finds {other} first; rename that one, start Python in another folder, or uninstall the "
        "distribution that it belongs to"
    )


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """Folders in which another file has the name of one of our packages."""
    for file in ("file/tasks.py", "package/circuits/__init__.py", "inside/relp.py"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("from relp import attribute\n")
    return tmp_path


@pytest.mark.parametrize(
    "start", [("-c", "import relp"), ("-c", "import circuits"), ("-m", "relp")]
)
def test_a_file_of_our_name_in_the_folder_is_named(start: tuple[str, str], others: Path) -> None:
    run = python(*start, cwd=others / "file")
    assert last(run) == found_first("tasks", others / "file/tasks.py")


def test_a_package_of_our_name_on_the_path_is_named(others: Path) -> None:
    """As a console script, which does not look in the folder where it is called."""
    script = others / "bin" / "relp"
    script.parent.mkdir()
    script.write_text("from relp.__main__ import app\napp()\n")
    run = python(script, "tasks", path=f"{others / 'package'}:{ROOT}", cwd=others)
    assert last(run) == found_first("circuits", others / "package/circuits/__init__.py")
    assert python(script, "--help", cwd=others / "package").returncode == 0


def test_a_folder_hides_an_editable_installation(tmp_path: Path) -> None:
    """Its finder comes after Python's own, for which a folder without `__init__.py` is enough."""
    (tmp_path / "tasks").mkdir()
    code = f"""
import sys
from importlib.machinery import PathFinder
class Editable:
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, [{str(ROOT)!r}]) if path is None else None
sys.meta_path.insert(sys.meta_path.index(PathFinder) + 1, Editable)
import relp
print(relp.__file__)
"""
    run = python("-c", code, path="", cwd=tmp_path)
    assert last(run) == found_first("tasks", tmp_path / "tasks")
    (tmp_path / "tasks").rmdir()
    assert python("-c", code, path="", cwd=tmp_path).stdout == f"{ROOT / 'relp/__init__.py'}\n"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Our sources as another folder has them."""
    for name in ("relp", "circuits", "tasks"):
        shutil.copytree(ROOT / name, tmp_path / "site" / name,
                        ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))  # fmt: skip
    return tmp_path / "site"


def test_another_distribution_installed_over_ours_is_named(copy: Path, tmp_path: Path) -> None:
    place = copy / "circuits/__init__.py"
    place.write_text('"""Event driven programming."""\n')
    assert last(python("-c", "import relp", path=copy, cwd=tmp_path)) == (
        "`circuits` must be the package that comes with relp; another distribution has put its own "
        f"in the same place, {place}; uninstall that one, then install relp again with pip install "
        "--force-reinstall"
    )


def test_our_own_packages_are_ours_wherever_they_lie(copy: Path, tmp_path: Path) -> None:
    """Two checkouts on the path, a link, an archive, and a program that has made stand-ins."""
    archive = tmp_path / "relp.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for source in copy.rglob("*.py"):
            file.write(source, source.relative_to(copy))
    (tmp_path / "link").symlink_to(copy)
    code = "import relp, circuits, tasks\nprint(relp.__file__)"
    for path in (archive, tmp_path / "link", f"{copy}:{ROOT}", f"{ROOT}:{copy}"):
        run = python("-c", code, path=path, cwd=tmp_path)
        assert (run.returncode, run.stderr) == (0, "")
        assert run.stdout.startswith(str(path).partition(":")[0])
    stand_in = "import sys, types\nsys.modules['tasks'] = types.ModuleType('tasks')\nimport relp"
    assert python("-c", stand_in, cwd=tmp_path).returncode == 0
    shutil.rmtree(copy / "tasks")  # without ours, nothing hides it
    (tmp_path / "tasks.py").write_text("")
    assert python("-c", "import relp", path=copy, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("name", BEGINS)
def test_our_sources_begin_as_they_are_known_by(name: str) -> None:
    assert SOURCES[f"{name}/__init__.py"].read_text().startswith(BEGINS[name])


@pytest.mark.parametrize(("first", "warned"), [("import relp", False), ("", True)])
def test_a_notebook_without_widgets_is_not_warned(first: str, warned: bool, tmp_path: Path) -> None:
    """tqdm warns whoever imports it first: that is us, and we know."""
    code = (
        "import sys, types, warnings\n"
        "sys.modules['ipywidgets'] = None\n"
        "sys.modules['ipykernel.zmqshell'] = types.ModuleType('zmqshell')\n"
        "sys.modules['IPython'] = types.SimpleNamespace(get_ipython=lambda: 'a notebook')\n"
        f"{first}\n"
        "import tqdm.auto"
    )
    run = python("-c", code, cwd=tmp_path)
    assert run.returncode == 0 and ("IProgress not found" in run.stderr) is warned
    assert warned or run.stderr == ""
