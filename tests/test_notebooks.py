"What every notebook page owes its reader."
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
PAGES = {p.stem: json.loads(p.read_text()) for p in NOTEBOOKS}


def source(cell): return "".join(cell["source"])
def exported(cell): return cell["cell_type"] == "code" and re.search(r"^#\|\s*export", source(cell), re.M)


def definitions(cell):
    for node in ast.parse(re.sub(r"^[%!].*", "", source(cell), flags=re.M)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"): yield node.name


@pytest.mark.parametrize("name", PAGES)
def test_opens_with_title_and_summary(name):
    first = PAGES[name]["cells"][0]
    assert first["cell_type"] == "markdown" and re.match(r"# .+\n> .+", source(first))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_small_clean_and_without_errors(path):
    assert path.stat().st_size < 300_000
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "code": continue
        assert cell["execution_count"] is None
        assert not any(o["output_type"] == "error" for o in cell["outputs"])


def test_exported_definitions_are_followed_by_an_example():
    followed, bare = 0, []
    for name, page in PAGES.items():
        code = [c for c in page["cells"] if c["cell_type"] == "code"]
        for i, cell in enumerate(code):
            if not exported(cell): continue
            for definition in definitions(cell):
                examples = [source(c) for c in code[i + 1:i + 4] if not exported(c)]
                if any(re.search(rf"\b{definition}\b", e) for e in examples): followed += 1
                else: bare.append(f"{name}: {definition}")
    assert followed / (followed + len(bare)) >= .9, bare


def public_functions(cell):
    for node in ast.parse(source(cell)).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"): yield node.name, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for f in node.body:
                if isinstance(f, ast.FunctionDef) and (f.name == "__init__" or not f.name.startswith("_")): yield f"{node.name}.{f.name}", f


def test_parameters_of_public_functions_are_documented():
    bare = []
    for page, content in PAGES.items():
        for cell in content["cells"]:
            if not exported(cell): continue
            lines = source(cell).splitlines()
            for name, f in public_functions(cell):
                arguments = [a for a in f.args.posonlyargs + f.args.args + f.args.kwonlyargs if a.arg not in ("self", "cls")]
                short = len(arguments) == 1 and arguments[0].arg == "x"   # forward(x): the docstring gives the shapes
                bare += [f"{page}: {name}({a.arg})" for a in arguments if not short and "# " not in lines[a.lineno - 1] and "help=" not in lines[a.lineno - 1]]
    assert not bare


def test_the_star_surface_is_what_it_says():
    import attnpool.all
    names = set(attnpool.all.__all__)
    assert all(hasattr(attnpool.all, n) for n in names)
    tree = ast.parse(Path(attnpool.all.__file__).read_text())
    assert names == {a.asname or a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
