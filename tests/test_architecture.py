"The floors of the house: a module imports only from lower-numbered ones, and the low floors stay light."
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NUMBERS = {m[2]: int(m[1]) for f in (ROOT / "nbs").glob("*.ipynb") if (m := re.fullmatch(r"(\d\d)_(.+)", f.stem))}
MODULES = {str(f.relative_to(ROOT / "attnpool").with_suffix("")).replace("/", "."): f
           for f in (ROOT / "attnpool").rglob("*.py") if f.name not in ("__init__.py", "_modidx.py")}


def imports(file, module):
    "Absolute names of the modules that a file imports anywhere, relative imports resolved, with whether at top level."
    tree = ast.parse(file.read_text())
    package = ("attnpool." + module).split(".")[:-1]
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            for alias in node.names: yield alias.name, top, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            name = ".".join(base + ([node.module] if node.module else []))
            for alias in node.names: yield name, top, alias.name


def test_every_module_comes_from_a_notebook():
    assert set(MODULES) == {m for m in NUMBERS}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_only_downward(module):
    for name, _, what in imports(MODULES[module], module):
        if name.split(".")[0] != "attnpool": continue
        inside = name.removeprefix("attnpool").lstrip(".")
        if inside not in NUMBERS: inside = f"{inside}.{what}".lstrip(".")   # from attnpool.bench import runs
        if inside in ("__version__", "attnpool"): continue   # the package itself holds the version only
        assert NUMBERS[inside] < NUMBERS[module], f"{module} imports {inside}, which is not below it"


@pytest.mark.parametrize("module", sorted(m for m in MODULES if NUMBERS[m] < 20))
def test_low_floors_import_no_framework(module):
    heavy = {name for name, top, _ in imports(MODULES[module], module)
             if name.split(".")[0] in ("fastai", "fastxtend", "torchvision") or (top and name.split(".")[0] == "timm")}
    assert not heavy


@pytest.mark.parametrize("module", sorted(MODULES))
def test_star_imports_nowhere_and_fastxtend_models_in_one_room(module):
    for name, _, what in imports(MODULES[module], module):
        assert what != "*"
        if name.startswith("fastxtend.vision.models"): assert module == "models.xresnet"


def test_importing_heads_loads_no_framework():
    code = "import sys, attnpool.heads; print(*[m for m in ('fastai', 'timm', 'torchvision', 'fastxtend') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_package_init_holds_the_version_only():
    lines = [l for l in (ROOT / "attnpool/__init__.py").read_text().splitlines() if l.strip()]
    assert len(lines) == 1 and re.fullmatch(r'__version__ = "[\d.]+"', lines[0])


def test_the_checker_sees_relative_imports(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("from ..heads import HEADS\nfrom . import runs\ndef f():\n    from attnpool.learner import x\n")
    assert [n for n, *_ in imports(file, "bench.data")] == ["attnpool.heads", "attnpool.bench", "attnpool.learner"]
