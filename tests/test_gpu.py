"What needs a GPU; without one, that the commands which the page names exist."
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.main import get_command

from attnpool.cli import app, main
from attnpool.cost import goals, steps
from attnpool.cost.epochs import SETTINGS
from attnpool.cost.parts import PARTS
from attnpool.cost.ways import WAYS, Setting, make_photos
from attnpool.data import DATASETS
from attnpool.forms import form, forms_used
from attnpool.heads import HEADS

ROOT = Path(__file__).parent.parent


def commands():
    page = json.loads((ROOT / "nbs" / "675_cost.epochs.ipynb").read_text())
    rows = [line for cell in page["cells"] if "".join(cell["source"]).startswith("## On a GPU") for line in cell["source"] if line.startswith("|")]
    return [c for row in rows for c in re.findall("`((?:attnpool|pytest|accelerate) [^`]+)`", row)]


@pytest.mark.parametrize("command", commands())
def test_speed_commands_of_the_page_exist(command):
    first, *words = shlex.split(command)
    if first == "pytest": assert (ROOT / words[0]).exists()
    else:
        if first == "accelerate": words = words[words.index("attnpool.cli") + 1:]
        group = get_command(app)
        asked = group.commands[words[0]].make_context(words[0], [w if w != "cuda" else "cpu" for w in words[1:]])   # an error for what it does not know
        assert asked.params.get("data") in (None, *DATASETS)


def test_speed_has_a_command_for_everything():
    assert len(commands()) == 8 and sum("cuda" in c for c in commands()) == 6


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_under_accelerate_launch(tmp_path, device):
    on = ["--cpu"] if device == "cpu" else []
    paths = os.pathsep.join([str(ROOT), *sys.path])   # of an environment that is a folder on the path alone, too
    command = ["-m", "accelerate.commands.launch", *on, "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m",
               "attnpool.cli", "bench", "digits", "--device", device, "--heads", "avg", "--seeds", "1", "--epochs", "1", "--size", "20", "--bs", "64", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, env=os.environ | dict(PYTHONPATH=paths, OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall("run 1/1  avg seed 1: accuracy", done.stdout)) == 1 and (tmp_path / "report.html").is_file()


@pytest.mark.cuda
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS)
def test_every_head_on_a_gpu(head, dtype, last):
    "Against float64 on the CPU; attention by kernels but in the heads that have none."
    torch.manual_seed(0)
    exact = HEADS[head](256, 10).double().eval()
    with torch.no_grad():   # of queries that start at zero
        for name, p in exact.named_parameters():
            if "query" in name: p.normal_(std=.1)
    ours = HEADS[head](256, 10).eval()
    ours.load_state_dict(exact.state_dict())
    ours = ours.to("cuda", dtype)
    x = torch.randn(32, 256, 14, 14, device="cuda", dtype=dtype)
    x = (x.to(memory_format=torch.channels_last) if last else x).requires_grad_()
    exact.load_state_dict({k: v.double().cpu() for k, v in ours.state_dict().items()})
    X = x.detach().cpu().double().requires_grad_()
    with form("plain"): Y = exact(X)
    with forms_used() as used: y = ours(x)
    g = torch.randn_like(Y)
    gx, GX = torch.autograd.grad(y, x, g.to(y))[0], torch.autograd.grad(Y, X, g)[0]
    tol = 1e-4 if dtype == torch.float32 else .06
    for a, b in ((y, Y), (gx, GX)): assert (a.double().cpu() - b).abs().max() <= tol * b.abs().max()
    assert used == (set() if head == "avg" else {"folded"} if head in ("avgstart", "classquery", "maxstart") else {"kernels"})


@pytest.mark.cuda
@pytest.mark.parametrize("fmt", ["contiguous", "channels_last"])
def test_kernels_against_copying_on_a_gpu(fmt):
    table = goals.copy_ratio((256, 14, 14), batch=64, fmt=fmt, rounds=2)
    assert len(table) == 6 and (table.ms > 0).all() and set(table.form[table.index.str.endswith("ours")]) == {"kernels"}


@pytest.mark.cuda
def test_whole_steps_on_a_gpu():
    "Compiled and with CUDA graphs too; minutes of a compiler."
    table, _ = steps.measure_steps("cuda", [(8, 64)], rounds=2)
    assert list(table.step) == list(steps.VARIANTS) and (table.ms > 0).all()


@pytest.mark.cuda
def test_whole_epochs_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setitem(SETTINGS, ("cuda", True), ((Setting("xeca_resnext_tiny", 64, 32, None, None),), 2))
    photos = make_photos(tmp_path / "photos", 256, 64)
    with pytest.raises(SystemExit) as e: main(["speed", "--epochs", str(photos), "--quick", "--device", "cuda", "--out", str(tmp_path / "out")])
    table = pd.read_csv(tmp_path / "out" / "epochs.csv", comment="#")
    assert e.value.code == 0 and list(table.way) == list(WAYS["cuda"]) and (table.loading_rate > 0).all()
    assert table[list(PARTS)].sum(1).to_numpy() == pytest.approx(np.ones(3))
