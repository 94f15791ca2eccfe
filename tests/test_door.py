"Heads, networks and recipes of one's own: by the place of their source, by entry points, from files."
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from attnpool.cli import main
from attnpool.heads import ABLATIONS, fold, get_head, HEADS, LearnedAggregationHead, PAPER_HEADS
from attnpool.learner import vision_learner
from attnpool.maps.compute import attention_maps
from attnpool.models.surgery import body_of, build_network, restore_pool, swap_pool, with_head
from attnpool.pooling import AttentionPool2d, AvgAttnPooling2d, check_head, check_pool
from attnpool.pooling.peers import PEERS
from attnpool.recipe import change_recipe, get_recipe, read_recipe, Recipe, RECIPES, save_recipe
from attnpool import registry
from attnpool.models.start import find_start
from attnpool.registry import BadInput, check_unasked, EntryPoints, find_part, signed
from attnpool.report.collect import by_row, collect, group_by_setting, write_runs
from attnpool.report.measures import measure_maps
from attnpool.runs.spec import make_spec, read_spec
from attnpool.runs.train import open_run, run

HEAD = '''
from torch import nn
from {helper} import weigh

class Mine(nn.Module):
    def __init__(self, ni, n_out, temperature=1.):
        super().__init__()
        self.c_out, self.temperature = n_out, temperature
        self.score, self.last = nn.Conv2d(ni, 1, 1), nn.Linear(ni, n_out)
    def attention_map(self, x): return weigh(self.score(x), self.temperature)
    def forward(self, x): return self.last((x * self.attention_map(x)).sum((2, 3)))

class Outer:
    class Inner(Mine): pass

def listed(ni, n_out): return [nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(ni, n_out)]
ready = nn.Linear(2, 2)
def broken(ni, n_out): return nn.Linear(ni, n_out).no_such
'''
HELPER = "def weigh(scores, t): return (scores / t).flatten(2).softmax(-1).view_as(scores)\n"
NET = '''
from torch import nn
def net(width=8):
    return nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(width, 2 * width, 3, 2), nn.ReLU())
def whole(pretrained=False): return nn.Sequential(*net(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
def none(): return 3
'''


@pytest.fixture
def folder(tmp_path, monkeypatch, request):
    "A working folder with modules whose names no other test has."
    monkeypatch.chdir(tmp_path)
    before, path = set(sys.modules), list(sys.path)
    (tmp_path / "own_heads.py").write_text(HEAD.format(helper="own_helper"))
    (tmp_path / "own_helper.py").write_text(HELPER)
    (tmp_path / "own_nets.py").write_text(NET)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.startswith("own_"): del sys.modules[name]


def process(*words, cwd, path=(), code=None):
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(Path(__file__).parent.parent), *map(str, path)]), FASTAI_HOME=str(cwd))
    words = ["-c", code, *words] if code else ["-c", "import sys; sys.path.remove(''); from attnpool.cli import main; main()", *words]
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True)


def install(site, name="their-pools", version="1.2", heads="median = their_pools:Median", **modules):
    "A package as pip leaves it."
    for module, source in (modules or dict(their_pools=HEAD.format(helper="their_helper").replace("Mine", "Median"), their_helper=HELPER)).items():
        (site / f"{module}.py").write_text(source)
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[attnpool.heads]\n{heads}\n")


# The whole way, in processes

def test_door_from_the_command_line_to_maps_elsewhere(folder, tmp_path_factory):
    from PIL import Image
    site, other = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("other")
    install(site, heads="median = their_pools:Median\navg = their_pools:Median\nsunk = their_pools:Lost")
    (folder / "my.toml").write_text('base = "quick"\nepochs = 1\nsize = 24\nbs = 64\n')
    made = process("bench", "digits", "--heads", "avg,own_heads:Mine,median", "--arch", "own_nets:net", "--recipe", "my.toml", "--seeds", "1",
                   "--save-recipe", "saved.toml", "--options", "temperature=2", "--device", "cpu", cwd=folder, path=[site])
    assert made.returncode == 0, made.stderr
    assert "own_heads:Mine, median: no learning rate of their own in the recipe quick; 0.002 is taken" in made.stdout
    assert "the head avg of their-pools is left out: avg is the package's own. It is to be had as their_pools:Median" in made.stderr
    runs = {f.parent.name.rsplit("-", 2)[0]: json.loads(f.read_text()) for f in (folder / "runs").glob("*/spec.json")}
    assert set(runs) == {"digits-avg", "digits-own_heads.Mine", "digits-median"}
    assert runs["digits-median"]["head"] == "median@their-pools-1.2" and runs["digits-avg"]["folder"] == str(folder)
    assert len({s["arch"] for s in runs.values()}) == 1 and runs["digits-avg"]["arch"].startswith("own_nets:net@")
    assert get_recipe("saved.toml", "avg") == get_recipe("quick", "avg", epochs=1, size=24, bs=64)
    heads = [line.partition(",")[0] for line in (folder / "runs/report.csv").read_text().splitlines()[1:]]
    assert heads == ["avg", "own_heads:Mine temperature=2", "median temperature=2"]   # of one version each
    assert str(folder) not in (folder / "runs/report.runs.csv").read_text()

    run, = (folder / "runs").glob("*Mine*-1-*")
    Image.new("RGB", (30, 20), "red").save(other / "photo.png")
    (folder / "own_helper.py").write_text(HELPER + "# another line\n")
    opened = process("maps", run, "photo.png", "--device", "cpu", cwd=other)   # another folder, and another source
    assert opened.returncode == 2 and not (other / "maps.html").exists()
    assert f"names own_heads:Mine, which was not typed here. To use it would run {folder}/own_heads.py; " in opened.stderr and "--trust" in opened.stderr
    opened = process("maps", run, "photo.png", "--device", "cpu", "--trust", cwd=other)
    assert opened.returncode == 0 and (other / "maps.html").exists(), opened.stderr
    assert "the source of own_heads:Mine has changed" in opened.stderr
    help = process("bench", "-h", cwd=other, path=[site])
    words = " ".join(help.stdout.split())
    assert "installed from other packages: median, sunk;" in words and "`" not in words and "their_pools" not in help.stdout
    code = "from attnpool.heads import get_head; import sys; get_head('median'); get_head(sys.argv[1])"
    for name, told in (("sunk", "head: 'sunk' of the package their-pools 1.2 cannot be used. their_pools: 'Lost' is unknown"),
                       ("medium", "Did you mean 'median'? Known: avg, ")):
        assert told in process(name, cwd=other, path=[site], code=code).stderr


# By the place of the source

def test_door_finds_what_is_named(folder):
    (folder / "own_pack").mkdir()
    (folder / "own_pack/mod.py").write_text("from .near import f\nclass A:\n    class B:\n        def make(ni, n_out): return 3\n")
    (folder / "own_pack/near.py").write_text("def f(): return 1\n")
    assert get_head("own_heads:Mine").__name__ == "Mine" and get_head("own_heads:Outer.Inner").__qualname__ == "Outer.Inner"
    assert find_part("own_pack.mod:A.B.make")(1, 2) == 3 and find_part("own_pack.mod:f")() == 1
    assert find_part("collections.abc:Mapping").__name__ == "Mapping" and get_head(str) is str
    first = signed("own_pack.mod:f", folder=folder)
    (folder / "own_pack/near.py").write_text("def f(): return 2\n")
    assert signed("own_pack.mod:f") == first and find_part("own_pack.mod:f")() == 1   # as it was loaded
    assert signed("own_pack.mod:f", folder=folder) != first and find_part("own_pack.mod:f")() == 2


def test_door_two_folders_with_one_name(folder):
    for name, value in dict(a=1, b=2).items():
        (folder / name).mkdir()
        (folder / name / "own_twin.py").write_text(f"def f(): return {value}\n")
    a, b = (signed("own_twin:f", folder=folder / name) for name in "ab")
    assert a != b and find_part("own_twin:f")() == 2 and find_part("own_twin:f", folder="a")() == 1
    assert find_part("own_twin:f", folder="gone/away")() == 1   # not there: what is loaded
    (folder / "json.py").write_text("def f(): pass\n")
    with pytest.raises(BadInput, match="json.py has the name of a module that is loaded already"): find_part("json:f", folder=".")
    assert json.loads("1") == 1


def test_door_line_ends_and_order_do_not_change_a_hash(folder):
    first = signed("own_heads:Mine", folder=folder)
    for name in ("own_heads", "own_helper"):
        file = folder / f"{name}.py"
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert signed("own_heads:Mine", folder=folder) == first and signed("avg") == "avg"
    (folder / "own_helper.py").write_text(HELPER + "#\n")
    assert signed("own_heads:Mine", folder=folder) != first


@pytest.mark.parametrize("name, source, told", [
    ("own_haeds:Mine", "", "head: there is no module 'own_haeds' for 'own_haeds:Mine', neither in /.* nor on Python's path. Did you mean own_heads:Mine"),
    ("own_heads:Mien", "", "head: own_heads: 'Mien' is unknown. Did you mean 'Mine'"),
    ("own_heads:Outer.Iner", "", "head: Outer: 'Iner' is unknown. Did you mean 'Inner'|head: own_heads.Outer: 'Iner' is unknown"),
    ("own_heads:ready", "", "head: own_heads:ready is a Linear that is made already"),
    ("own_heads:nn", "", "head: own_heads:nn is a module that is made already, or none at all"),
    ("own_heads.py:Mine", "", "Did you mean own_heads:Mine"),
    ("./own_heads:Mine", "", "no place of a source. Type package.module:Name.* such as own_heads:Mine"),
    ("own_heads:Mine()", "", "no place of a source"),
    (":Mine", "", "no place of a source"), ("own_heads:", "", "no place of a source"), ("__main__:Mine", "", "no place of a source"),
    ("own_bad:f", "import torch\n\nx = 1 / 0\n", r"own_bad:f: its module cannot be imported: ZeroDivisionError: division by zero \(/.*own_bad.py, line 3\)"),
    ("own_bad:f", "def f(:\n", r"own_bad:f: its module cannot be imported: SyntaxError: .* \(/.*own_bad.py, line 1\)"),
    ("own_bad:f", "import no_such_thing\n", r"ModuleNotFoundError: No module named 'no_such_thing' \(/.*own_bad.py, line 1\)"),
    ("own_bad:f", "raise SystemExit(3)\n", r"SystemExit: 3 \(/.*own_bad.py, line 1\)"),
])
def test_door_errors_say_what_and_where(folder, name, source, told):
    (folder / "own_bad.py").write_text(source)
    with pytest.raises(BadInput, match=told): get_head(name)
    with pytest.raises(BadInput, match="custom_head: |no place"): vision_learner(None, "resnet18", n_out=2, custom_head=name)
    with pytest.raises(BadInput, match="^arch: "): body_of(name)
    assert str(folder) not in sys.path or (folder / "own_heads.py").exists()


def test_door_clashes_of_packages_are_told(tmp_path, monkeypatch, capsys):
    install(tmp_path, "a-pools", heads="x = own_a:f", own_a="def f(ni, n_out): return 1\n")
    install(tmp_path, "b-pools", heads="x = own_b:f\ny = own_lost:f", own_b="")
    monkeypatch.syspath_prepend(tmp_path)
    table = EntryPoints("head", "attnpool.heads", lambda: ["y"])
    assert list(table) == ["x"] and "x" in table and "own_a" not in sys.modules
    told = capsys.readouterr().err
    assert "the head x of b-pools is left out: x is that of a-pools" in told and "y is the package's own. It is to be had as own_lost:f" in told
    assert table["x"](1, 2) == 1 and table.origin("x") == "a-pools-1.2"
    with pytest.raises(BadInput, match="head: 'z' is unknown"): table["z"]


# Names that come from a file

@pytest.fixture
def forged(folder, monkeypatch):
    "A function that makes a run by others: its files name parts, and nobody has typed them in this process."
    made = run(make_spec(head="avg", epochs=1, size=24, bs=64), folder / "runs", "cpu").folder
    def forge(**values):
        for file in ("spec.json", "result.json"):
            whole = json.loads((made / file).read_text())
            (whole if file == "spec.json" else whole["spec"]).update(values)
            if file == "result.json": whole["files"] = {name: (made / name).stat().st_size for name in whole["files"]}
            (made / file).write_text(json.dumps(whole))
        return made
    monkeypatch.setattr(registry, "_ASKED", set())
    return forge


STRANGE = """from pathlib import Path
Path({mark!r}).mkdir(exist_ok=True)
from own_helper import weigh
from os import system
def net(command): system(command)
class Mine:
    def __init__(self, ni, n_out): system("mkdir " + {mark!r})
"""


def test_door_a_run_runs_no_code_of_its_own(forged, folder):
    mark, bad = folder / "ran", folder / "runs/bad"
    bad.mkdir()
    for place in (bad, folder / "runs", folder / "elsewhere"):
        place.mkdir(exist_ok=True)
        (place / "own_evil.py").write_text(STRANGE.format(mark=str(mark)))
    own = registry._digest(registry._sources(str(bad), "own_evil", {}))
    inside = registry._digest(registry._sources(str(folder), "runs.own_evil", {}))
    shell = dict(options=dict(command=f"mkdir {mark}"))
    cases = [dict(head=f"own_evil:Mine@{own}", folder=str(bad)), dict(head="own_evil:Mine@12345678", folder="runs/bad"), dict(head="own_evil:Mine", folder="elsewhere"),
             dict(head=f"own_evil:Mine@{own}", folder="elsewhere"), dict(head=f"runs.own_evil:Mine@{inside}"),   # below the working folder, but it came with the run
             dict(arch="os:system") | shell, dict(arch="subprocess:getoutput") | shell, dict(arch=signed("os:system"), head="os:system") | shell,
             dict(arch=f"own_heads:nn.Linear@{registry._digest(registry._sources(str(folder), 'own_heads', {}))}")]   # what one's own file only imports
    registry._ASKED.clear()
    for case in cases:
        run = forged(**dict(head="avg", arch="xeca_resnext_tiny", folder="", options={}) | case)
        for act in (lambda: open_run(run), lambda: open_run(run, check=False, with_data=False), lambda: measure_maps(collect([run])[0], "cpu")):
            with pytest.raises(BadInput, match=r"trust=True \(--trust\)"): act()
        assert "own_evil" not in sys.modules and not mark.exists(), case
    told = process("maps", run, "--device", "cpu", cwd=folder), process("maps", run, "--measure", "--device", "cpu", cwd=folder), process("report", run, cwd=folder)
    assert [t.returncode for t in told] == [2, 2, 0] and not mark.exists() and all("--trust" in t.stderr for t in told[:2]), told
    with pytest.raises(Exception): open_run(forged(head="own_evil:Mine@12345678", arch="xeca_resnext_tiny", folder=str(bad), options={}), trust=True)
    assert mark.exists()   # so the code would have run


def test_door_a_report_and_a_start_load_nothing(forged, folder):
    mark = folder / "ran"
    (folder / "own_evil.py").write_text(STRANGE.format(mark=str(mark)))
    run = forged(head="own_evil:Mine@12345678", arch="xresnext50s", options=dict(temperature=2, widen=.5))
    results, _ = collect([run])
    write_runs(results, folder / "their.runs.csv")
    row, = by_row(group_by_setting(collect([folder / "their.runs.csv"])[0])[0])
    assert row == "own_evil:Mine temperature=2"   # the other is of the network
    assert process("report", "their.runs.csv", cwd=folder).returncode == 0
    forged(arch="own_evil:net@12345678", head="avg", options={})
    with pytest.raises(BadInput, match="start: the run .* has the network own_evil:net@12345678, and arch is resnet18"): find_start(run, "resnet18")
    assert process("bench", "digits", "--start", run, cwd=folder).returncode == 2
    assert not mark.exists() and "own_evil" not in sys.modules


def test_door_ones_own_is_opened_unasked_as_it_was(forged, folder):
    spec = make_spec(head="own_heads:Mine", arch="own_nets:net", epochs=1, size=24, bs=64)
    made = run(spec, folder / "runs", "cpu").folder
    assert type(open_run(made, "cpu").model[-1]).__name__ == "Mine"   # it was typed here
    code = "import sys; from attnpool.runs.train import open_run; print(type(open_run(sys.argv[1]).model[-1]).__name__)"
    assert "Mine" in process(made, cwd=folder, code=code).stdout
    (folder / "own_helper.py").write_text(HELPER + "# another line\n")
    told = process(made, cwd=folder, code=code).stderr
    assert "the source of own_heads:Mine has changed: it is own_heads:Mine@" in told and f"was {spec.head}" in told
    assert "Mine" in process(made, cwd=folder, code=code.replace("argv[1]", "argv[1], trust=True")).stdout
    assert process("maps", made, "--measure", "--trust", "--device", "cpu", "--out", "m.csv", cwd=folder).returncode == 0


def test_door_a_package_is_used_unasked_only_where_it_was_typed(tmp_path, monkeypatch):
    install(tmp_path, "c-pools", heads="x = own_c:f", own_c="raise SystemExit('it ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    table = EntryPoints("head", "attnpool.heads")
    for name in ("x", "x@c-pools-1.2", "x@other-3"):
        with pytest.raises(BadInput, match=r"head: a/run names x, .* would run code of the package c-pools-1.2; .*trust=True"): check_unasked(name, "head", table, "a/run")
    for name in ("avg", "learned-uniform"): check_unasked(name, "head", table, "a/run")
    for name in (["os", "system"], 3):
        with pytest.raises(BadInput, match="expected a name in a/run"): check_unasked(name, "head", table, "a/run")
    assert signed("x", "head", None, table) == "x@c-pools-1.2" and check_unasked("x@c-pools-1.2", "head", table, "a/run") is None
    assert "own_c" not in sys.modules


# The contract

def made(**methods):
    "A head as a class; `forward` averages where nothing else is given."
    def init(self, ni, n_out):
        nn.Module.__init__(self)
        self.last, self.norm, self.c_out = nn.Linear(ni, n_out), nn.BatchNorm1d(ni), n_out
        methods.get("more", lambda self: None)(self)
    return type("Mine", (nn.Module,), dict(__init__=init, forward=lambda self, x: self.last(self.norm(x.mean((2, 3))))) | methods)


SIDE = nn.Linear(2, 2)
def uniform(x): return torch.full((len(x), 1, *x.shape[2:]), 1 / x.shape[2:].numel())


@pytest.mark.parametrize("head, told", [
    (lambda ni: nn.Linear(ni, 2), r"called with \(64, 3\) it raises TypeError"),
    (lambda ni, n_out: nn.Linear(ni, n_out).no_such, r"AttributeError: 'Linear' object has no attribute 'no_such' \(.*test_door.py, line \d+\)"),
    (lambda ni, n_out: "head", "it raises TypeError: custom_head: .* returned str instead of a module"),
    (lambda ni, n_out: [nn.AdaptiveAvgPool2d(1), nn.Flatten()], r"it returns \(3, 64\) for a map \(3, 64, 7, 7\), not \(3, 3\)"),
    (lambda ni, n_out: nn.Conv2d(ni, n_out, 1), r"it returns \(3, 3, 7, 7\)"),
    (lambda ni, n_out: [nn.Flatten(), nn.Linear(49 * ni, n_out)], r"it fails on a map \(3, 64, 5, 3\): RuntimeError: mat1 and mat2"),
    (made(forward=lambda self, x: self.last(x.mean((2, 3))) / 0), "is not finite"),
    (made(forward=lambda self, x: [1]), "it returns list for a map"),
    (made(forward=lambda self, x: self.last(x.mean((2, 3))).softmax(0)), "depends on the others in the batch"),
    (made(forward=lambda self, x: self.last(x.mean((2, 3)).detach())), "no gradient reaches the map"),
    (made(forward=lambda self, x: self.last(x.mean((2, 3))).detach()), "it is detached"),
    (made(forward=lambda self, x: self.last(x.mean((2, 3)))), "no gradient reaches norm.weight, norm.bias: use it in forward"),
    (made(attention_map=lambda self, x: uniform(x)[:, 0]), r"the attention_map of its Mine returns \(3, 5, 3\) instead of \(3, k, 5, 3\)"),
    (made(attention_map=lambda self, x: uniform(x) * 2), "maps that sum to 2 to 2"),
    (made(attention_map=lambda self, x: x[:, :1]), "instead of weights that sum to one"),
    (made(attention_map=lambda self, x: 1 / 0), "the attention_map of its Mine fails: ZeroDivisionError"),
    (made(attention_map=lambda self, x: uniform(x), more=lambda self: delattr(self, "c_out")), "has an attention_map but no c_out"),
])
def test_door_says_which_part_of_the_contract_a_head_lacks(head, told):
    state = torch.get_rng_state()
    with pytest.raises(BadInput, match=told) as e: check_head(head, name="my:Mine")
    assert str(e.value).startswith("head: my:Mine is not used, ") and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("head", [made(), made(attention_map=lambda self, x: uniform(x)), made(more=lambda self: setattr(self, "ema", nn.Parameter(torch.zeros(1), requires_grad=False))),
                                  lambda ni, n_out: (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(ni, n_out))])
def test_door_is_open_to_what_keeps_the_contract(head):
    module = check_head(head, 24, 5)
    assert module(torch.randn(2, 24, 3, 3)).shape == (2, 5) and all(p.grad is None for p in module.parameters())
    stands = {k: v.clone() for k, v in module.state_dict().items()}
    assert module.training and check_head(module, 24, 5) is module
    assert all(torch.equal(v, stands[k]) for k, v in module.state_dict().items())   # no statistics of the check in it


@pytest.mark.parametrize("name", [*HEADS, *PEERS, *PAPER_HEADS, *ABLATIONS])
def test_door_contract_of_every_head(name): check_head(get_head(name), 64, 3, name)


@pytest.mark.parametrize("name", [n for n, head in HEADS.items() if getattr(head, "pool", None)])
def test_door_contract_of_every_pool(name): check_pool(HEADS[name](48, 3)[0], 48)


def test_door_says_which_part_of_the_contract_a_pool_lacks():
    class Squares(nn.AdaptiveAvgPool2d):
        def forward(self, x): return super().forward(x).flatten(1) if x.shape[2] > 1 else x.flatten(1)
    pool = Squares(1)
    with pytest.raises(BadInput, match="pool: Squares: c_out is None"): check_pool(pool, 8)
    pool.c_out = 8
    with pytest.raises(BadInput, match=r"it returns \(3, 72\) for a map \(3, 8, 1, 9\)"): check_pool(pool, 8)


# Whatever takes a pool

class MyPool(AvgAttnPooling2d):
    "A forward of one's own that keeps the query."
    def forward(self, x): return super().forward(x) * 2

class Asks(MyPool):
    def forward(self, x): return self.attn(x, self.query + 1).squeeze(1) if x.ndim == 4 else x


def test_door_fold_takes_a_pool_by_what_it_computes():
    pool, x = MyPool(16).eval(), torch.randn(2, 16, 4, 5)
    nn.init.normal_(pool.query)
    torch.testing.assert_close(fold(pool)(x), pool(x))
    with pytest.raises(BadInput, match="Asks with a forward of its own, which does not give the attention its query"): fold(Asks(16).eval())
    with pytest.raises(BadInput, match=r"no attention pool in it that folds \(its Mine has no query and no attn=AttentionPool2d\)"):
        fold(made(attention_map=lambda self, x: uniform(x))(8, 2).eval())


class Uniform(nn.Module):
    "Average pooling that says where it looks."
    def __init__(self, ni):
        super().__init__()
        self.c_out, self.scale = ni, nn.Parameter(torch.ones(()))
    def attention_map(self, x): return uniform(x)
    def forward(self, x): return self.scale * x.mean((2, 3))

class Halves(Uniform):
    def __init__(self, ni):
        super().__init__(ni)
        self.c_out = ni // 2
    def forward(self, x): return super().forward(x)[:, ::2]


def test_door_swap_pool_takes_a_pool_by_its_contract():
    net, x = timm.create_model("resnet18", num_classes=3).eval(), torch.randn(2, 3, 64, 64)
    before = net(x)
    def head(pool): return lambda ni, n_out: nn.Sequential(pool(ni), nn.Linear(pool(ni).c_out, n_out))
    swapped = swap_pool(net, head(Uniform))
    assert swapped.global_pool.gamma is None and torch.allclose(swapped(x), before, atol=1e-5)   # it starts as the mean
    assert torch.allclose(attention_maps(swapped, x), torch.tensor(.25))
    with pytest.raises(BadInput, match="has no attention pool that gives a vector of 512 channels: its Halves gives 256"): swap_pool(restore_pool(net), head(Halves))
    with pytest.raises(BadInput, match="returns"): swap_pool(net, made(attention_map=lambda self, x: uniform(x)[0]))
    swapped = swap_pool(net, head(MyPool))
    assert swapped.global_pool.gamma is not None and torch.allclose(swapped(x), before, atol=1e-5)


def test_door_own_parts_in_python(folder, dls):
    learn = vision_learner(dls, "resnet10t", pretrained=False, custom_head="own_heads:Mine")
    assert type(learn.model[-1]).__name__ == "Mine" and attention_maps(learn.model, torch.randn(2, 3, 64, 64)).shape == (2, 1, 2, 2)
    assert body_of("own_nets:net", width=4).ni == 8 and body_of("own_nets:whole").ni == 16
    assert build_network("own_nets:whole", 3, "own_heads:listed").model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    assert with_head("resnet10t", "own_heads:Outer.Inner", 4)(torch.randn(1, 3, 64, 64)).shape == (1, 4)
    with pytest.raises(BadInput, match="arch: none returned int instead of a network"): body_of("own_nets:none")
    with pytest.raises(BadInput, match="pretrained"): body_of("own_nets:net", pretrained=True)


# Specs

def test_door_specs_of_own_parts(folder):
    spec = make_spec(head="own_heads:Mine", arch="own_nets:net", options=dict(temperature=3., width=4))
    assert spec.head.startswith("own_heads:Mine@") and spec.folder == str(folder) and dict(spec.options) == dict(temperature=3., width=4)
    assert spec.name == f"digits-own_heads.Mine-1-{spec.id}" and read_spec(json.loads(json.dumps(spec.to_json()))) == spec
    assert make_spec(head=spec.head, arch="own_nets:net", options=dict(spec.options)).id == spec.id == replace(spec, folder="").id
    assert spec.recipe.lr == get_recipe("quick", "own_heads:Mine").lr == get_recipe("quick", "nobody's").lr
    (folder / "own_helper.py").write_text("def weigh(scores, t): return (scores * t).flatten(2).softmax(-1).view_as(scores)\n")
    assert spec.loaded() is spec   # what is loaded is what was asked for
    other = make_spec(head="own_heads:Mine", arch="own_nets:net", options=dict(spec.options))
    assert other.id != spec.id and other.arch == spec.arch and other.loaded() is other
    with pytest.raises(BadInput, match=f"the source of own_heads:Mine has changed: {spec.head} was asked for"): spec.loaded()
    with pytest.raises(BadInput, match="is not what there is now"): make_spec(head=spec.head)
    assert make_spec().id == "5ab6d09ae0" if False else make_spec().folder == ""
    for harm, told in ((dict(head="own_heads:broken"), r"own_heads:broken is not used, called with \(256, 3\) it raises AttributeError"),
                       (dict(head=nn.Linear), "head: expected a name, got .* 'my_module:Name'"),
                       (dict(head="own_heads:Mine", options=dict(temperatur=3)), "Did you mean 'temperature'"),
                       (dict(head="own_heads:Mine", options=dict(temperature="hot")), "it fails on a map|it raises")):
        with pytest.raises((BadInput, TypeError), match=told): make_spec(**harm)


# Recipes

@pytest.mark.parametrize("recipe", [*RECIPES, Recipe(8, 40, 32, lr=1e-22), Recipe(8, 40, 32, lr={"avg": .1, "imagenette/concat": 1 / 3, "m:N": 1e16, "*": 5}),
                                    replace(RECIPES["quick"], wd=.1, mix="cutmixup", warmup=0.), replace(RECIPES["quick"], lr=.25, size=None)])
def test_door_recipes_go_into_a_file_and_come_back(recipe, tmp_path):
    r = RECIPES[recipe] if isinstance(recipe, str) else recipe
    back = read_recipe(save_recipe(r, tmp_path / "r.toml"))
    assert replace(back, lr=None) == replace(r, lr=None) and back.lr == r.lr or r.lr is None
    text = (tmp_path / "r.toml").read_text()
    assert all(f"{name} " in text for name in ("epochs", "wd", "views")) and save_recipe(back, tmp_path / "s.toml").read_text().splitlines()[1:] == text.splitlines()[1:]
    for head in (*HEADS, "slim-rms", "gem"):
        for family in ("", "imagenette", "imagewoof"):
            if r.lr is None: assert get_recipe(tmp_path / "r.toml", head, family) == get_recipe(r, head, family)


def test_door_a_recipe_of_a_few_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.toml").write_text('base = "finetune"   # as the row\nepochs = 9\n[lr]\nslim = 1e-3\n"*" = 2\n')
    r = read_recipe("my.toml")
    assert r == change_recipe("finetune", epochs=9, lr={"slim": 1e-3, "*": 2.}) and r.name == "finetune" and r.min_steps is None   # as typed
    assert get_recipe("my.toml", "slim", bs=7) == replace(r, lr=1e-3, bs=7) and change_recipe(Path("my.toml"), bs=7).lr == r.lr
    Path("whole").write_text("epochs = 2\nsize = 40\nbs = 8\nlr = 1\n")
    assert read_recipe("whole") == Recipe(2, 40, 8, lr=1.) and get_recipe("whole", "avg").name == "whole"
    Path("quick").write_text("epochs = 2\nsize = 40\nbs = 8\nlr = 1\n")
    assert get_recipe("quick", "avg").epochs == 8 and get_recipe(Path("quick"), "avg").epochs == 2   # a word is a row first
    assert make_spec(recipe="whole").id == make_spec(epochs=2, size=40, bs=8, lr=1, opt="ranger", schedule="flat_cos").id


@pytest.mark.parametrize("text, told", [
    ('base = "quick"\nepoch = 3\n', "recipe: my.toml, line 2: 'epoch' is unknown. Did you mean 'epochs'"),
    ('base = "quik"\n', "recipe: my.toml, line 1: 'quik' is unknown. Did you mean 'quick'"),
    ("base = 3\n", "recipe: my.toml, line 1: 3 is unknown"),
    ('base = "quick"\n\nepochs = "8"\n', "recipe: my.toml, line 3: epochs: expected a number above 0, got '8'"),
    ('base = "quick"\nopt = "adm"\n', "recipe: my.toml, line 2: opt: 'adm' is unknown. Did you mean 'adam'"),
    ('base = "quick"\nopt = ["adam"]\n', "recipe: my.toml"),
    ('base = "quick"\n[lr]\nslim = -1\n', "recipe: my.toml, line 2: lr: expected a number above 0, got -1"),
    ('base = "quick"\n[opt]\nslim = 1\n', "recipe: my.toml"),
    ('base = "quick"\nname = "x"\n', "recipe: my.toml, line 2: 'name' is unknown"),
    ("epochs = 8\n", "recipe: my.toml: missing 1 required positional argument: 'bs'. To begin with a row"),
    ('base = "quick"\nepochs =\n', "recipe: my.toml is no TOML: .*line 2"),
    ('base = "quick"\nepochs = 1\nepochs = 2\n', "recipe: my.toml is no TOML: .*line 3"),
    ('base = "quick"\nwarmup = 0.5\nschedule = "flat_cos"\n', "recipe: my.toml, line 2: warmup: flat_cos begins at its rate"),
    ("\udcff", "recipe: my.toml is no TOML: .*utf-8"), ("", "missing 2 required"), ("{}", "is no TOML"),
])
def test_door_what_is_wrong_in_a_recipe_is_told_with_its_line(text, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadInput, match=told): get_recipe("my.toml", "avg")


def test_door_lost_recipes(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"recipe: lost.toml cannot be read \(No such file"): get_recipe("lost.toml")
    with pytest.raises(OSError, match="recipe: .* cannot be read"): read_recipe(tmp_path)
    with pytest.raises(BadInput, match="recipe: 'lost' is unknown. .* or a file.toml"): get_recipe("lost")


# The command

def called(*words):
    with pytest.raises(SystemExit) as e: main(list(map(str, words)))
    return e.value.code


def test_door_help_is_whole(capsys):
    for words in ([], ["-h"], ["--help"]):
        assert called(*words) == 0
        text = capsys.readouterr().out
        assert "..." not in text.replace("[ARGS]...", "") and "Compare heads on the same network, data and seeds." in text
    for command in ("bench", "report", "lr", "data", "maps", "speed", "complexity"):
        assert called(command, "-h") == 0 and f"Usage: attnpool {command}" in capsys.readouterr().out


def test_door_no_table_has_an_empty_name():
    from attnpool.recipe import NAMES
    assert all(name and name == name.strip() for table in (*NAMES.values(), RECIPES, HEADS, PEERS, ABLATIONS) for name in table)


def test_door_a_recipe_is_not_written_over_other_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("attnpool.runs.sweep.sweep", lambda *args: [])
    common = "bench", "digits", "--heads", "avg", "--seeds", "1", "--device", "cpu", "--save-recipe"
    assert called(*common, "r.toml", "--mix", "cutmixup", "--lr", ".1") == 0 and called(*common, "r.toml", "--epochs", "3") == 0
    assert read_recipe("r.toml").for_head("slim") == get_recipe("quick", "slim", epochs=3)
    capsys.readouterr()
    Path("notes.txt").write_text("mine")
    assert called(*common, "notes.txt") == 2 and "was not written by this command" in capsys.readouterr().err
    assert called(*common, "no/r.toml") == 2 and "there is no folder no" in capsys.readouterr().err
    assert Path("notes.txt").read_text() == "mine" and not Path("no").exists()
