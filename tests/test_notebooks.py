"What every notebook page owes its reader."
import ast
import builtins
import json
import os
import re
import symtable
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


def visible(cell):
    "Whether a cell shows a value or a picture; one that is not run on every machine must end on an expression."
    if any(o.get("name") != "stderr" for o in cell["outputs"]): return True
    if not re.search(r"^#\|\s*(slow|cuda|eval: *false)", source(cell), re.M): return False
    last = ast.parse(re.sub(r"^[%!].*", "", source(cell), flags=re.M)).body[-1:]
    return bool(last) and isinstance(last[0], ast.Expr) and not ast.unparse(last[0]).startswith("test_")


def examples(page):
    "`(name, whether one of the next three code cells uses it and shows something)` of each exported public definition."
    code = [c for c in page["cells"] if c["cell_type"] == "code"]
    for i, cell in enumerate(code):
        if not exported(cell): continue
        lessons = [c for c in code[i + 1:i + 4] if not exported(c) and visible(c)]
        for name in definitions(cell): yield name, any(re.search(rf"\b{name}\b", source(c)) for c in lessons)


def test_exported_definitions_are_followed_by_an_example_that_shows_something():
    found = {f"{page}: {name}": shown for page, content in PAGES.items() for name, shown in examples(content)}
    bare = [name for name, shown in found.items() if not shown]
    assert len(bare) <= .05 * len(found), f"{len(bare)} of {len(found)}:\n" + "\n".join(bare)


def test_the_example_rule_sees_what_it_should():
    def code(text, *outputs): return dict(cell_type="code", source=[text], outputs=list(outputs))
    printed, warned = dict(output_type="stream", name="stdout", text=["1"]), dict(output_type="stream", name="stderr", text=["!"])
    definition = code("#| export\ndef f(): return 1\nclass _Hidden: pass")
    for lesson, shown in [(code("f()", printed), True), (code("g()", printed), False), (code("test_fail(f)"), False),
                          (code("f()", warned), False), (code("#| cuda\nf()"), True), (code("#| cuda\nx = f()"), False),
                          (code("#| export\ndef g(): f()", printed), False)]:
        assert dict(examples(dict(cells=[definition, lesson]))) == dict(f=shown) | ({"g": False} if exported(lesson) else {}), lesson
    assert not dict(examples(dict(cells=[definition, *[code("1", printed)] * 3, code("f()", printed)])))["f"]


def public_functions(text):
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"): yield node.name, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for f in node.body:
                if isinstance(f, ast.FunctionDef) and (f.name == "__init__" or not f.name.startswith("_")): yield f"{node.name}.{f.name}", f


def undocumented(text):
    "Parameters without a docment, or with one that is but a word (`# Where`)."
    lines = text.splitlines()
    for name, f in public_functions(text):
        arguments = [a for a in f.args.posonlyargs + f.args.args + f.args.kwonlyargs if a.arg not in ("self", "cls")]
        if len(arguments) == 1 and arguments[0].arg == "x": continue   # forward(x): the docstring gives the shapes
        for a in arguments:
            written = "\n".join(lines[a.lineno - 1:a.end_lineno])   # with its annotation
            docment = re.search(r"\s# (.+)", written)
            says = docment and re.search(r"\w\W+\w|\d", docment[1])
            if "help=" not in written and not says: yield f"{name}({a.arg})"


def test_parameters_of_public_functions_are_documented():
    bare = [f"{page}: {name}" for page, content in PAGES.items() for cell in content["cells"] if exported(cell)
            for name in undocumented(source(cell))]
    assert not bare, "\n" + "\n".join(bare)


def test_the_docment_rule_sees_what_it_should():
    function = "def f(\n  a,  # `(b, c)` map\n  b=1,  # Where\n  c=2,\n  d=3,  # in [0, 1]\n  *,\n  e,  # `What`.\n): pass"
    assert list(undocumented(function)) == ["f(b)", "f(c)", "f(e)"]
    assert not list(undocumented("def f(a: Annotated[int, Option(\n  help='b')] = 1): pass"))
    assert list(undocumented("class A:\n  def __init__(self, x): pass\n  def g(self, y): pass\n  def _h(self, z): pass")) == ["A.g(y)"]


def test_every_page_has_its_place_in_the_navigation():
    listed = re.findall(r"^ *- (?:.*: )?(\S+)\.ipynb$", (ROOT / "mkdocs.yml").read_text(), re.M)
    pages = [re.sub(r"^\d{3}_", "", str(p.relative_to(ROOT / "nbs").with_suffix(""))) for p in NOTEBOOKS]
    assert sorted(listed) == sorted(pages)


def lost_references(text, folder, pages, modules):
    "Relative links to pages that are not there, and names of modules that are not there."
    for link in re.findall(r"\]\(([\w./-]+)\.html[)#]", text):
        if os.path.normpath(f"{folder}/{link}") not in pages and "results/" not in link: yield f"{link}.html"
    for name in re.findall(r"\battnpool((?:\.[a-zA-Z_]\w*)+)", text):
        if name.startswith((".github", ".__")): continue
        parts = name.strip(".").split(".")
        lost = parts[0] not in {m.split(".")[0] for m in modules}
        if lost or len(parts) > 1 and not {parts[0], ".".join(parts[:2])} & modules:
            yield f"attnpool{name}"


def test_links_and_names_of_modules_lead_somewhere():
    pages = {re.sub(r"^\d{3}_", "", str(p.relative_to(ROOT / "nbs").with_suffix(""))) for p in NOTEBOOKS}
    modules = {p for p in pages if "/" not in p and p != "index"}
    lost = [f"{path.stem}: {reference}" for path in NOTEBOOKS for cell in PAGES[path.stem]["cells"]
            for reference in lost_references(source(cell), path.parent.relative_to(ROOT / "nbs"), pages, modules)]
    assert not lost, "\n" + "\n".join(lost)


def test_the_reference_rule_sees_what_it_should():
    known = {"maps.draw", "heads", "tutorials/a"}
    sound = "[a](../heads.html#x) `attnpool.heads.HEADS` attnpool.maps.draw attnpool.github.io [c](../results/d.html)"
    assert not list(lost_references(sound, "tutorials", known, known))
    lost = lost_references("[b](bench.html) `attnpool.bench.data` attnpool.maps.look", ".", known, known)
    assert list(lost) == ["bench.html", "attnpool.bench.data", "attnpool.maps.look"]


def names_of(text):
    "What a cell reads of what stands outside, what it defines, and whether it imports something."
    tables, reads = [symtable.symtable(text, "cell", "exec")], set()
    top = tables[0].get_symbols()
    defines = {o.get_name() for o in top if o.is_assigned() or o.is_imported() or o.is_namespace()}
    while tables:
        table = tables.pop()
        tables += table.get_children()
        reads |= {o.get_name() for o in table.get_symbols() if o.is_referenced() and (o.is_global() or table.get_type() == "module")}
    return reads - defines - set(dir(builtins)), defines, any(o.is_imported() for o in top)


def missing_when_built(page):
    """Building the site, nbdev runs the exported cells of a room, the cells with an import, and no others: the names
    that such cells lack. `(number of the cell, name)`"""
    if not any(map(exported, page["cells"])): return
    known = {"__file__", "get_ipython", "display"}
    for i, cell in enumerate(page["cells"]):
        if cell["cell_type"] != "code" or re.search(r"^#\|\s*eval: *false", source(cell), re.M): continue
        reads, defines, imports = names_of(re.sub(r"^\s*[%!].*", "", source(cell), flags=re.M))
        if not (imports or exported(cell)): continue
        if not exported(cell): yield from ((i, name) for name in sorted(reads - known))
        known |= defines


def test_cells_that_run_when_the_site_is_built_have_their_names():
    faults = [f"{name}: cell {i} has no {lost}; keep imports in cells of their own"
              for name, page in PAGES.items() for i, lost in missing_when_built(page)]
    assert not faults, "\n" + "\n".join(faults)


def test_the_rule_for_the_build_sees_what_it_should():
    def page(*cells): return dict(cells=[dict(cell_type="code", source=[c]) for c in cells])
    export = "#| export\nimport torch\ndef f(x): return torch.relu(x)"
    assert list(missing_when_built(page("import os\ntorch.manual_seed(1)", export))) == [(0, "torch")]
    assert not list(missing_when_built(page(export, "x = torch.ones(2)", "f(x)", "import os\n[y for y in f(os.sep)]")))
    assert list(missing_when_built(page(export, "x = torch.ones(2)", "import os\nf(x)"))) == [(2, "x")]
    assert not list(missing_when_built(page("x = 1", "import os\nx")))   # nothing exported, nothing run


def test_the_star_surface_is_what_it_says():
    import attnpool.all
    names = set(attnpool.all.__all__)
    assert all(hasattr(attnpool.all, n) for n in names)
    tree = ast.parse(Path(attnpool.all.__file__).read_text())
    assert names == {a.asname or a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
