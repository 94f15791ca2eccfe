"""The plan of the house, read from the files: the first digit of a notebook is its floor, and imports lead downward.

Each rule is a function of a tree's root that yields its faults as `file:line: what is wrong`, so that the rules
themselves are tried on small made-up trees below.
"""
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("fastai", "fastxtend", "timm", "torchvision")


def rooms(root):
    "`{module: number}` of the notebooks that are rooms; `570_a.b.ipynb` is room 570, module `a.b`."
    return {m[2]: int(m[1]) for f in (root / "nbs").glob("*.ipynb") if (m := re.fullmatch(r"(\d{3})_(.+)", f.stem))}


def modules(root):
    "`{module: file}` of what is shipped; a package counts as a module where its `__init__` holds something."
    package = root / "attnpool"
    files = set(package.rglob("*.py")) - {package / "__init__.py", package / "_modidx.py"}
    return {".".join(f.relative_to(package).with_suffix("").parts).removesuffix(".__init__"): f
            for f in sorted(files) if f.name != "__init__.py" or f.read_text().strip()}


def notebooks(root):
    files = sorted(f for f in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in f.parts)
    return {f: json.loads(f.read_text()) for f in files}


def code_cells(root):
    for file, page in notebooks(root).items():
        for i, cell in enumerate(page["cells"]):
            if cell["cell_type"] == "code": yield f"{file.relative_to(root)}:cell {i}", "".join(cell["source"])


def at_import(tree):
    "The nodes that run when the module is imported: all but the bodies of functions."
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)): yield from at_import(node)


def imports(tree, package=()):
    "`(node, module, name)` of each import; relative ones are resolved from `package`, and `import a.b` has no name."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names: yield node, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else ()
            for alias in node.names: yield node, ".".join([*base, *filter(None, [node.module])]), alias.name


def package_of(module, file): return ("attnpool", *module.split("."))[:None if file.name == "__init__.py" else -1]


def room_of(name, what, known):
    "The room that an import enters: `from attnpool.maps import draw` enters maps.draw."
    inside = name.removeprefix("attnpool").lstrip(".")
    return next((r for r in (f"{inside}.{what}".lstrip("."), inside) if r in known), None)


def parsed(root):
    for module, file in modules(root).items(): yield module, file, file.relative_to(root), ast.parse(file.read_text())


# The rules

def on_no_floor(root):
    for file, page in notebooks(root).items():
        where = file.relative_to(root / "nbs")
        if where.parts[0] == "tutorials" or str(where) == "index.ipynb": continue
        named = re.fullmatch(r"[0-7]\d\d_(.+)", file.stem)
        source = "\n".join("".join(c["source"]) for c in page["cells"])
        exports = re.search(r"^#\|\s*default_exp\s+(\S+)", source, re.M)
        if len(where.parts) > 1 or not named:
            yield f"nbs/{where}: on no floor; call it NNN_module.ipynb, the first digit its floor"
        elif not exports or exports[1].removesuffix(".__init__") != named[1]:
            yield f"nbs/{where}: exports {exports and exports[1]}, not {named[1]}"
    numbers = rooms(root)
    for module, file in modules(root).items():
        if module not in numbers: yield f"{file.relative_to(root)}: comes from no notebook"
    taken = {}
    for module, number in sorted(numbers.items()):
        if number in taken: yield f"nbs/{number:03}_{module}.ipynb: the number of {taken[number]}"
        taken[number] = module


def upward_imports(root):
    known = rooms(root)
    for module, file, where, tree in parsed(root):
        for node, name, what in imports(tree, package_of(module, file)):
            if name.split(".")[0] != "attnpool" or name == "attnpool" and what in (None, "__version__"): continue
            room = room_of(name, what, known)
            own, line = known.get(module, 0), f"{where}:{node.lineno}"
            if room is None: yield f"{line}: imports {name}, which is no room"
            elif known[room] >= own: yield f"{line}: {module} ({own}) imports {room} ({known[room]}), which is not below it"


def heavy_imports(root):
    known = rooms(root)
    for module, file, where, tree in parsed(root):
        if known.get(module, 0) >= 200: continue
        top = {id(node) for node in at_import(tree)}
        for node, name, _ in imports(tree):
            library = name.split(".")[0]
            if library in ("fastai", "fastxtend") or library in HEAVY and id(node) in top:
                yield f"{where}:{node.lineno}: floor {known.get(module, 0) // 100} loads {library}"


def private(name): return re.match("_(?!_)", name)


def taken_names(tree, package, known):
    "`(line, name, room)` of what is taken from other modules of ours: by `from room import name`, and as `room.name`."
    aliases = {}
    for node, name, what in imports(tree, package):
        if name.split(".")[0] != "attnpool": continue
        if what: yield node.lineno, what, room_of(name, what, known)
        whole = room_of(f"{name}.{what}" if what else name, None, known)
        for alias in node.names:
            if alias.name in (what, name) and whole: aliases[alias.asname or alias.name] = whole
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (room := aliases.get(ast.unparse(node.value))):
            yield node.lineno, node.attr, room


def private_names(root):
    "Names with `_` that are another room's; in the lessons too, whose own room is theirs to show."
    known = rooms(root)
    sources = [(module, where, package_of(module, file), tree) for module, file, where, tree in parsed(root)]
    for where, source in code_cells(root):
        if re.search(r"^#\|\s*export", source, re.M): continue
        try: tree = ast.parse(re.sub(r"^\s*[%!].*", "", source, flags=re.M))
        except SyntaxError: continue   # another language
        sources.append((re.sub(r"^\d{3}_", "", Path(where.rpartition(":")[0]).stem), where, (), tree))
    for module, where, package, tree in sources:
        for line, name, room in taken_names(tree, package, known):
            if private(name) and room != module: yield f"{where}:{line}: {name} is private to {room}"


def mocks(root):
    for module, file, where, tree in parsed(root):
        for node, name, _ in imports(tree):
            if name.split(".")[0] == "unittest": yield f"{where}:{node.lineno}: unittest is for tests"


def stars_and_strangers(root):
    for module, file, where, tree in parsed(root):
        for node, name, what in imports(tree):
            if what == "*": yield f"{where}:{node.lineno}: imports * from {name}"
            if name.startswith("fastxtend.vision.models") and module != "models.xresnet":
                yield f"{where}:{node.lineno}: fastxtend's models belong to models.xresnet"


def long_modules(root):
    for module, file in modules(root).items():
        n = len(file.read_text().splitlines())
        if n > 320: yield f"{file.relative_to(root)}:320: {n} lines, {n - 320} too many"


def long_lines(root):
    sources = [(file.relative_to(root), file.read_text()) for file in modules(root).values()] + list(code_cells(root))
    for where, source in sources:
        listed = False   # nbdev breaks the lines of `__all__` as it likes
        for i, line in enumerate(source.splitlines(), 1):
            listed = line.startswith("__all__ = [") or listed and line.startswith(" ")
            if len(line) > 120 and not listed: yield f"{where}:{i}: {len(line)} characters"


def long_cells(root):
    for where, source in code_cells(root):
        n = len([line for line in source.strip().splitlines() if not line.startswith("#|")])
        if re.search(r"^#\|\s*export", source, re.M) and n > 60: yield f"{where}: an exported cell of {n} lines"


RULES = [on_no_floor, upward_imports, heavy_imports, private_names, mocks, stars_and_strangers,
         long_modules, long_lines, long_cells]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(rule):
    faults = list(rule(ROOT))
    assert not faults, "\n" + "\n".join(faults)


def test_importing_floors_0_and_1_loads_no_framework():
    low = sorted((m for m, n in rooms(ROOT).items() if n < 200), key=rooms(ROOT).get)
    code = f"""if True:
        import sys, importlib
        for module in {low}:
            importlib.import_module('attnpool.' + module)
            print(*[f'{{module}} loads {{m}}' for m in {HEAVY} if m in sys.modules], sep='\\n', end='')"""
    assert {"heads", "maps.compute", "maps.measures", "maps.draw"} <= set(low)
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_package_init_holds_the_version_only():
    lines = [l for l in (ROOT / "attnpool/__init__.py").read_text().splitlines() if l.strip()]
    assert len(lines) == 1 and re.fullmatch(r'__version__ = "[\d.]+"', lines[0])


# The rules themselves

def house(root, modules=(), pages=()):
    "A small tree: modules by dotted name, with a notebook for each that is numbered, and further pages of code cells."
    for name, source in dict(modules).items():
        number, module = re.fullmatch(r"(?:(\d{3})_)?(.+)", name).groups()
        file = root / "attnpool" / (module.replace(".", "/") + ".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
        if number: pages = {name: [f"#| default_exp {module.removesuffix('.__init__')}"]} | dict(pages)
    for name, cells in dict(pages).items():
        file = root / "nbs" / f"{name.removesuffix('.__init__')}.ipynb"
        file.parent.mkdir(parents=True, exist_ok=True)
        cells = [dict(cell_type="code", source=c.splitlines(True), outputs=[]) for c in cells]
        file.write_text(json.dumps(dict(cells=cells)))
    return root


HOUSES = [
    (upward_imports, {"000_a": "from attnpool.b import x", "010_b": ""}, {}, "attnpool/a.py:1: a .0. imports b .10., which is not below"),
    (upward_imports, {"110_p.q": "from ..b import x", "120_b": ""}, {}, r"attnpool/p/q.py:1: p\.q .110. imports b"),
    (upward_imports, {"110_p.q": "\nfrom . import r", "120_p.r": ""}, {}, r"attnpool/p/q.py:2: p\.q .110. imports p\.r"),
    (upward_imports, {"110_p.q": "from .. import b", "120_b": ""}, {}, r"attnpool/p/q.py:1: p\.q .110. imports b"),
    (upward_imports, {"270_p.__init__": "from .q import x", "280_p.q": ""}, {}, r"attnpool/p/__init__.py:1: p .270. imports p\.q"),
    (upward_imports, {"000_a": "def f():\n    import attnpool.b", "010_b": ""}, {}, "attnpool/a.py:2: .*b .10."),
    (upward_imports, {"000_a": "from attnpool.lost import x"}, {}, "attnpool/a.py:1: imports attnpool.lost, which is no room"),
    (heavy_imports, {"100_a": "try: import timm\nexcept ImportError: pass"}, {}, "attnpool/a.py:1: floor 1 loads timm"),
    (heavy_imports, {"030_a": "class A:\n    from torchvision import ops"}, {}, "attnpool/a.py:2: floor 0 loads torchvision"),
    (heavy_imports, {"030_a": "def f():\n    from fastai.vision.all import Learner"}, {}, "attnpool/a.py:2: floor 0 loads fastai"),
    (private_names, {"000_a": "", "010_b": "from attnpool.a import x, _y"}, {}, "attnpool/b.py:1: _y is private to a"),
    (private_names, {"000_a": "", "010_p.b": "from .. import a as c\nc._y()"}, {}, "attnpool/p/b.py:2: _y is private to a"),
    (private_names, {"000_a": "", "010_b": "import attnpool.a\nattnpool.a._y"}, {}, "attnpool/b.py:2: _y is private to a"),
    (private_names, {"000_a": ""}, {"tutorials/t": ["", "from attnpool.a import _y"]}, "nbs/tutorials/t.ipynb:cell 1:1: _y is private to a"),
    (mocks, {"000_a": "def f():\n    from unittest import mock"}, {}, "attnpool/a.py:2: unittest"),
    (stars_and_strangers, {"000_a": "from attnpool.b import *"}, {}, "attnpool/a.py:1: imports \\* from"),
    (stars_and_strangers, {"000_a": "import fastxtend.vision.models.xresnet"}, {}, "attnpool/a.py:1: fastxtend's models"),
    (long_modules, {"000_a": "x = 1\n" * 321}, {}, "attnpool/a.py:320: 321 lines"),
    (long_lines, {"000_a": "\nx = " + "1" * 117}, {}, "attnpool/a.py:2: 121 characters"),
    (long_lines, {"000_a": f"__all__ = ['{'a' * 120}',\n           '{'b' * 120}']\n{'c' * 121}"}, {}, "attnpool/a.py:3: 121"),
    (long_lines, {}, {"000_a": ["x", "# " + "y" * 119]}, "nbs/000_a.ipynb:cell 1:1: 121 characters"),
    (long_cells, {}, {"000_a": ["#| export\n" + "x = 1\n" * 61]}, "nbs/000_a.ipynb:cell 0: an exported cell of 61 lines"),
    (on_no_floor, {}, {"extra": ["#| default_exp extra"]}, "nbs/extra.ipynb: on no floor"),
    (on_no_floor, {}, {"800_a": ["#| default_exp a"]}, "nbs/800_a.ipynb: on no floor"),
    (on_no_floor, {}, {"p/000_a": ["#| default_exp a"]}, "nbs/p/000_a.ipynb: on no floor"),
    (on_no_floor, {}, {"000_a": ["#| default_exp b"]}, "nbs/000_a.ipynb: exports b, not a"),
    (on_no_floor, {"hand_made": "x = 1"}, {}, "attnpool/hand_made.py: comes from no notebook"),
    (on_no_floor, {"000_a": "", "000_b": ""}, {}, "nbs/000_b.ipynb: the number of a"),
]


@pytest.mark.parametrize("rule, modules, pages, fault", HOUSES, ids=[f"{h[0].__name__}-{i}" for i, h in enumerate(HOUSES)])
def test_a_fault_is_found(tmp_path, rule, modules, pages, fault):
    faults = list(rule(house(tmp_path, modules, pages)))
    assert len(faults) == 1 and re.match(fault, faults[0]), faults


def test_a_sound_house_has_no_fault(tmp_path):
    own = "from attnpool import __version__\nfrom .low import work\ndef f():\n    import timm\n_x = 1\n"
    house(tmp_path, {"000_low": "import torch\n", "100_p.room": "from ..low import work\nfrom .. import low\nlow.__doc__\n", "110_mid": own,
                     "200_p.__init__": "from .room import a\nimport torchvision\nfrom fastai.vision.all import Learner\n"},
          {"tutorials/any": ["%matplotlib inline\nfrom attnpool.p import a"], "index": ["1"],
           "110_mid": ["#| default_exp mid", "from attnpool.mid import _x\n_x", "#| export\n" + "x = 1\n" * 60]})
    (tmp_path / "attnpool/p2").mkdir()
    (tmp_path / "attnpool/p2/__init__.py").write_text("\n")   # nbdev's, empty
    assert {rule.__name__: faults for rule in RULES if (faults := list(rule(tmp_path)))} == {}
