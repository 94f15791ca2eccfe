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
from attnpool.heads import ABLATIONS, fold, get_head, HEADS, LearnedAggregationHead
from attnpool.learner import vision_learner
from attnpool.maps.compute import attention_maps
from attnpool.models.surgery import body_of, build_network, restore_pool, swap_pool, with_head
from attnpool.pooling import AttentionPool2d, AvgAttnPooling2d, check_head, check_pool
from attnpool.pooling.peers import PEERS
from attnpool.recipe import change_recipe, get_recipe, read_recipe, Recipe, RECIPES, save_recipe
from attnpool.registry import BadInput, EntryPoints, find_part, signed
from attnpool.runs.spec import make_spec, read_spec

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
    assert "own_heads:Mine" in (folder / "runs/report.csv").read_text() and "@" not in (folder / "runs/report.csv").read_text()
    assert str(folder) not in (folder / "runs/report.runs.csv").read_text()

    run, = (folder / "runs").glob("*Mine*-1-*")
    Image.new("RGB", (30, 20), "red").save(other / "photo.png")
    (folder / "own_helper.py").write_text(HELPER + "# another line\n")
    opened = process("maps", run, "photo.png", "--device", "cpu", cwd=other)
    assert opened.returncode == 0 and (other / "maps.html").exists(), opened.stderr
    assert "the source of own_heads:Mine has changed" in opened.stderr
    help = process("bench", "-h", cwd=other, path=[site])
    words = " ".join(help.stdout.split())
    assert "installed from other packages: median, sunk;" in words and "`" not in words and "their_pools" not in help.stdout
    code = "from attnpool.heads import get_head; import sys; get_head('median'); get_head(sys.argv[1])"
    for name, told in (("sunk", "head: 'sunk' of the package their-pools 1.2 cannot be used. their_pools: 'Lost' is unknown"),
                       ("medium", "Did you mean 'median'? Known: avg, ")):
        assert told in process(name, cwd=other, path=[site], code=code).stderr
