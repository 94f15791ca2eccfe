"One training on several processes: real ones, started by torchrun on the CPU."
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.vision.all import BalancedAccuracy, CrossEntropyLossFlat, F1Score, Learner, MatthewsCorrCoef, accuracy, set_seed
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, load_model
from torch import nn

from attnpool.runs import train as runs
from attnpool.data.digits import digits_dls
from attnpool.runs.spec import make_spec
from attnpool.runs.store import load_run
from attnpool.runs.tested import read_predictions
from attnpool.runs.train import open_run
from attnpool.distributed import (
    Distributed, distributed, is_first, join_processes, on_first_process, processes, scale_up, shard, shard_dl, _sync_norms)
from attnpool.layers import TokenBatchNorm
from attnpool.recipe import get_recipe, recipe_learner

ROOT = Path(__file__).parent.parent


def torchrun(*command, n=2, extra=None, **kwargs):
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)) | (extra or {})
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), *map(str, command)],
                          capture_output=True, text=True, env=env, timeout=300, **kwargs)
    if done.returncode: print(done.stdout, done.stderr)   # whole, beside a test that fails: the first error is not the last
    return done


@given(st.integers(0, 60), st.integers(1, 7), st.integers(1, 5), st.booleans())
def test_shares_make_up_the_order(size, bs, n, drop_last):
    order = [7 * i % 61 for i in range(size)]
    pieces = [shard(order, bs, n, r, drop_last) for r in range(n)]
    assert len({len(p) for p in pieces}) == 1
    whole = []
    for i in range(0, len(pieces[0]), bs): whole += sum((p[i:i + bs] for p in pieces), [])   # as _gather joins them
    kept = size // (n * bs) * n * bs if drop_last else size
    assert whole[:kept] == order[:kept] and len(whole) - kept < n   # fewer than n fill up the end


def test_one_process_is_left_alone(monkeypatch):
    dls = digits_dls(24, 16, "cpu", n_train=32, n_valid=8)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 10)), loss_func=CrossEntropyLossFlat())
    cbs = list(learn.cbs)
    with distributed(learn) as same: assert same is learn and list(learn.cbs) == cbs
    assert processes() == 1 and is_first() and join_processes("cpu") == torch.device("cpu") and on_first_process(max, 1, 2) == 2
    recipe = get_recipe("quick", "avg")
    assert scale_up(recipe) is recipe


def test_larger_batches_get_the_square_root_of_the_rate():
    recipe = get_recipe("quick", "concat")
    assert scale_up(recipe, 4) == replace(recipe, bs=4 * recipe.bs, lr=2 * recipe.lr)
    spec = make_spec(head="concat")
    assert scale_up(spec, 2).recipe == scale_up(spec.recipe, 2) and scale_up(spec, 2).id != spec.id


def test_errors_say_what_to_do(monkeypatch):
    dls = digits_dls(24, 16, "cpu", n_train=20, n_valid=8)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="need 32 training pictures, got 20. Use a smaller --bs"): shard_dl(dls.train)
    with pytest.raises(ValueError, match="device: several processes work together on 'cpu' or 'cuda', got 'mps'"): join_processes("mps")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="process 1 of this machine finds 1 GPUs. Start as many processes as GPUs"): join_processes("cuda")


def test_norms_share_statistics_and_come_back():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm1d(4), TokenBatchNorm(4)))
    before, weights = [type(m) for m in model.modules()], model.state_dict()
    cb = Distributed(sync_bn=True)
    cb.learn = Learner(digits_dls(24, 16, "cpu", n_train=32, n_valid=8), model, loss_func=CrossEntropyLossFlat())
    cb.norms = _sync_norms(model)
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(nn.SyncBatchNorm) == 2 and type(model[2][1]) is TokenBatchNorm
    assert all(v.data_ptr() == weights[k].data_ptr() for k, v in model.state_dict().items())
    model.eval()
    cb.after_fit()
    assert [type(m) for m in model.modules()] == before and not any(m.training for m in model.modules())
    assert all(v.data_ptr() == weights[k].data_ptr() for k, v in model.state_dict().items())


class Double(nn.Module):
    def forward(self, x): return x.double()


def plain_learner(bs):
    "A network without BatchNorm: two processes of 8 and one of 16 must take the same steps."
    set_seed(3)
    dls = digits_dls(20, bs, "cpu", n_train=70, n_valid=21)
    dls.valid.bs = bs // 2
    model = nn.Sequential(Double(), nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 81, 10)).double()
    return Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy)


def metrics_learner():
    "All metrics, and 53 validation pictures in batches of 8: the last batch of two processes has 5."
    set_seed(1)
    metrics = [accuracy, BalancedAccuracy(), F1Score(average="macro"), MatthewsCorrCoef()]
    learn = recipe_learner(digits_dls(20, 16, "cpu", n_train=64, n_valid=53), "xeca_resnext_tiny", "concat", metrics=metrics)
    learn.dls.valid.bs = 8
    return learn


SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
from fastai.vision.all import Callback
from safetensors.torch import save_model
from attnpool.runs.train import RunLog
from attnpool.distributed import distributed, is_first, join_processes, on_first_process
sys.path.insert(0, {tests!r})
from test_distributed import metrics_learner, plain_learner

join_processes('cpu')
rank, found = dist.get_rank(), {{}}

learn = plain_learner(8)
with distributed(learn), learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
found['weights'], found['values'] = [p.tolist() for p in learn.model.parameters()], list(learn.recorder.values[-1])
found['type'], found['draw'] = type(learn.model).__name__, torch.rand(1).item()

learn = metrics_learner()
with distributed(learn), learn.no_bar(), learn.no_logging():
    learn.fit(1, 1e-3)
    found['together'] = list(learn.validate())
    found['preds'], found['labels'] = (t.tolist() for t in learn.get_preds())
if is_first(): save_model(learn.model, {out!r} + '/model.safetensors')

found['once'] = on_first_process(lambda: rank)
try: on_first_process(lambda: 1 / 0)
except ZeroDivisionError as e: found['error'] = str(e)

class Poison(Callback):
    def before_batch(self):
        if rank == 1 and self.training: self.learn.xb = (self.xb[0] * float('nan'),)
log = RunLog({out!r} + f'/{{rank}}.csv')
learn = plain_learner(8)
with distributed(learn), learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, cbs=[log, Poison()])
found['diverged'] = log.diverged
json.dump(found, open({out!r} + f'/{{rank}}.json', 'w'))
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    (out / "script.py").write_text(SCRIPT.format(tests=str(Path(__file__).parent), out=str(out)))
    done = torchrun(out / "script.py")
    assert done.returncode == 0, done.stderr
    return out, [json.loads((out / f"{r}.json").read_text()) for r in range(2)]


def test_two_processes_train_as_one_with_twice_the_batch(two):
    learn = plain_learner(16)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    first, second = two[1]
    for found in (first, second):
        for p, q in zip(learn.model.parameters(), found["weights"]): assert torch.allclose(p, torch.tensor(q, dtype=p.dtype), rtol=1e-6, atol=1e-9)
        assert found["values"][1:] == pytest.approx(list(learn.recorder.values[-1])[1:], rel=1e-6)
        assert found["type"] == "Sequential"
    assert first["values"] == second["values"] and first["draw"] != second["draw"]


def test_every_validation_picture_counts_once(two):
    learn, (out, found) = metrics_learner(), two
    load_model(learn.model, out / "model.safetensors")
    with learn.no_bar(), learn.no_logging(): values, (preds, labels) = list(learn.validate()), learn.get_preds()
    assert len(values) == 5   # the loss and the four metrics
    for f in found:
        assert f["together"] == pytest.approx(values, rel=1e-5) and f["labels"] == labels.tolist()
        assert torch.allclose(torch.tensor(f["preds"]), preds, atol=1e-5)


def test_all_processes_get_what_the_first_got(two):
    assert [found["once"] for found in two[1]] == [0, 0] and [found["error"] for found in two[1]] == ["division by zero"] * 2


def test_a_loss_that_is_not_finite_in_one_process_stops_both(two):
    assert [found["diverged"] for found in two[1]] == [0, 0]


@pytest.mark.parametrize("end", ["raise RuntimeError('out of memory')", "os.kill(os.getpid(), signal.SIGINT)"])
def test_the_end_of_one_process_ends_all(tmp_path, end):
    (tmp_path / "script.py").write_text(f"""
import os, signal, sys
from fastai.vision.all import Callback
from attnpool.distributed import distributed, is_first, join_processes
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_distributed import plain_learner
class Stop(Callback):
    def after_batch(self):
        if not is_first(): {end}
join_processes('cpu')
learn = plain_learner(8)
with distributed(learn), learn.no_bar(), learn.no_logging(): learn.fit(10**6, 1e-2, cbs=Stop())
""")
    done = torchrun(tmp_path / "script.py")   # its time limit is the test
    assert done.returncode not in (0, None) and "rank      : 1" in done.stderr


def test_the_command_on_two_processes(tmp_path):
    command = ["-m", "attnpool.cli", "bench", "digits", "--device", "cpu", "--heads", "concat", "--seeds", "1", "--epochs", "1", "--size", "20", "--bs", "64",
               "--out", tmp_path / "runs"]
    done = torchrun(*command)
    assert done.returncode == 0, done.stderr
    assert len(re.findall("run 1/1  concat seed 1: accuracy", done.stdout)) == 1 and done.stdout.count("Report:") == 1
    spec = scale_up(make_spec(head="concat", epochs=1, size=20, bs=64), 2)
    result = load_run(tmp_path / "runs" / spec.name)
    folder = Path(result.folder)
    assert {f.name for f in folder.iterdir()} >= {"spec.json", "history.csv", "maps.npz", "weights.safetensors", "result.json"}
    assert result.processes == 2 and result.spec.recipe.bs == 128
    learn = recipe_learner(digits_dls(20, 64, "cpu"), spec.arch, spec.head)
    learn.model.load_state_dict(load_file(folder / "weights.safetensors"))
    with learn.no_bar(): loss, right, *_ = learn.validate()
    assert result.value == pytest.approx(right) and result.metrics["valid_loss"] == pytest.approx(loss, rel=1e-4)
    again = torchrun(*command)
    assert again.returncode == 0 and "1 of 1 runs are in" in again.stdout
    wrong = torchrun(*command[:-4], "--bs", "0", "--out", tmp_path / "runs")
    assert wrong.returncode != 0 and wrong.stderr.count("attnpool: bs") == 1   # one voice


MIXED = """
import json, sys, torch
from attnpool.data.digits import digits_dls
from attnpool.distributed import distributed, is_first, join_processes
from attnpool.recipe import recipe_learner
from fastai.vision.all import Callback

class Watch(Callback):
    seen = []
    def after_pred(self): self.seen.append((self.training, self.x.mean().item(), self.x.std().item()))

device = join_processes("cpu")
learn = recipe_learner(digits_dls(24, 16, device, n_train=64, n_valid=32), "xeca_resnext_tiny", "avg", "mixed", epochs=2, precision="float32", cbs=[watch := Watch()])
with distributed(learn), learn.no_bar(), learn.no_logging(): learn.fit_recipe()
if is_first(): print(json.dumps(watch.seen))
"""


@pytest.mark.parametrize("n", [1, 2])
def test_mixed_pictures_are_normalised_once(tmp_path, n):
    (tmp_path / "train.py").write_text(MIXED)
    done = torchrun(tmp_path / "train.py", n=n)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert {t for t, *_ in seen} == {True, False}
    for _, mean, std in seen: assert abs(mean) < .5 and .5 < std < 1.5


def test_the_papers_recipe_on_two_processes_from_pictures_to_report(tmp_path):
    rng = np.random.default_rng(0)
    for part, n in (("train", 24), ("val", 5)):
        for c, colour in enumerate(((180, 60, 60), (60, 60, 180))):
            (folder := tmp_path / "photos" / part / f"class-{c}").mkdir(parents=True)
            for i in range(n):
                levels = rng.integers(-50, 50, (30 + i, 44, 3)) + np.array(colour)
                Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg")
    command = ["-m", "attnpool.cli", "bench", tmp_path / "photos", "--device", "cpu", "--recipe", "paper-small", "--arch", "patchconvnet_tiny", "--heads", "paper",
               "--seeds", "1", "--epochs", "2", "--size", "32", "--bs", "16", "--repeats", "3", "--micro-bs", "4", "--eval-sizes", "40", "--out", tmp_path / "runs"]
    env = dict(FASTAI_HOME=str(tmp_path / "home"))
    done = torchrun(*command, extra=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall("run 1/1  paper seed 1: accuracy", done.stdout)) == 1 and done.stdout.count("Report:") == 1
    folder, = (f for f in (tmp_path / "runs").iterdir() if (f / "result.json").is_file())
    result = load_run(folder)
    r = result.spec.recipe
    assert result.status == "complete" and result.processes == 2 and result.pictures == [48, 10] and list(result.sizes) == ["40"]
    assert (r.bs, r.micro_bs, r.repeats, r.augment, r.opt) == (16, 4, 3, "imagenet", "timm-lamb")
    history = result.history()
    assert len(history) == 2 and np.isfinite(history[["train_loss", "valid_loss"]]).all(axis=None) and history.valid_loss.nunique() == 2
    learn = open_run(folder, "cpu", data=tmp_path / "photos")   # one process gets the same from the weights, through the same crop
    with learn.no_bar(): loss, right, *_ = learn.validate()
    assert result.value == pytest.approx(right) and result.metrics["valid_loss"] == pytest.approx(loss, rel=1e-4)
    said = read_predictions(result)
    assert len(said) == 10 and (said.label == said.said).mean() == pytest.approx(right) and said.loss.mean() == pytest.approx(loss, rel=1e-4)
    again = torchrun(*command, extra=env)
    assert again.returncode == 0 and "1 of 1 runs are in" in again.stdout
