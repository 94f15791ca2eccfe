"Runs that are stopped at any moment, and go on: real ones, killed for real."
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from skimage import data as photos
from PIL import Image

import attnpool.runs.checkpoint
from attnpool.cli import main
from attnpool.registry import BadInput
from attnpool.runs.checkpoint import Checkpoint
from attnpool.runs.spec import make_spec
from attnpool.runs.store import CHECKPOINT, load_run
from attnpool.runs.sweep import sweep
from attnpool.runs.train import run
from attnpool.tasks import TASKS

SCRIPT = """
import signal, sys
from pathlib import Path
from attnpool.runs.spec import make_spec
from attnpool.runs.train import run
{more}
run(make_spec({data!r}, **{how!r}), {out!r}, 'cpu', checkpoint_seconds={seconds})
"""
SMALL = dict(head="slim", epochs=3, size=20, bs=8)


@pytest.fixture(scope="module")
def pics(tmp_path_factory):
    "Crops of two photos, a folder each."
    root, rng = tmp_path_factory.mktemp("pics"), random.Random(0)
    for name in ("chelsea", "coffee"):
        (root / name).mkdir()
        photo = Image.fromarray(getattr(photos, name)())
        for i in range(20):
            x, y = rng.randrange(photo.width - 60), rng.randrange(photo.height - 60)
            photo.crop((x, y, x + 60, y + 60)).resize((24, 24)).save(root / name / f"{i}.png")
    return root


def stop(epoch):
    def on_epoch(row):
        if row["epoch"] == epoch: raise KeyboardInterrupt
    return on_epoch


def stopped(spec, out, epoch=1):
    "Stop a run when an epoch is over, before its checkpoint; those before have theirs."
    with pytest.raises(KeyboardInterrupt): run(spec, out, "cpu", stop(epoch), checkpoint_seconds=0)
    return Path(out) / spec.name / CHECKPOINT


def left(out, spec):
    "What has to be equal."
    history = pd.read_csv(Path(out) / spec.name / "history.csv", dtype=str)
    return history.drop(columns=["seconds", "train_seconds"]).to_csv(), (Path(out) / spec.name / "weights.safetensors").read_bytes()


def gone_on(spec, out, **kwargs):
    "Make the run again, and tell after which epoch it went on."
    told = []
    run(spec, out, "cpu", on_checkpoint=lambda *said: told.append(said), **kwargs)
    return left(out, spec), told


TRAININGS = {
    "adam and one_cycle": dict(),
    "ranger, flat_cos, mixed samples, bf16": dict(recipe="mixed"),
    "fastai's lamb and cosine, mixed batches": dict(opt="lamb", schedule="cosine", mix="cutmixup-batch", lr=3e-3),
    "sgd with erasing": dict(opt="sgd", lr=1e-2, augment="randaugment-erase", schedule="paper"),
    "the paper: repeats, accumulation, timm's lamb": dict(
        recipe="paper-small", repeats=3, micro_bs=4, drop_path=.1, augment="randaugment", arch="patchconvnet_tiny", size=24, head="paper", warmup=.1),
    "the head alone, adamw": dict(train="head", opt="adamw", lr=1e-3),
}


@pytest.mark.parametrize("how", TRAININGS.values(), ids=TRAININGS)
def test_resume_gives_the_history_of_a_run_that_was_not_stopped(pics, tmp_path, how):
    spec = make_spec(pics, **SMALL | how)
    checkpoint = stopped(spec, tmp_path / "a")
    assert checkpoint.exists() and len(pd.read_csv(checkpoint.with_name("history.csv"))) == 2
    found, told = gone_on(spec, tmp_path / "a")
    whole, nothing = gone_on(spec, tmp_path / "b")
    assert told == [("goes on after epoch 1", 1)] and nothing == [] and found == whole
    assert not checkpoint.exists() and CHECKPOINT not in load_run(checkpoint.parent).files


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_resume_in_either_fit_of_finetune(pics, tmp_path, epoch):
    start = run(make_spec(pics, **SMALL | dict(epochs=1)), tmp_path, "cpu").folder
    spec = make_spec(pics, **SMALL | dict(recipe="finetune", start=start, epochs=4, freeze_epochs=2, opt="ranger", lr=4e-3))
    stopped(spec, tmp_path / "a", epoch)
    found, told = gone_on(spec, tmp_path / "a")
    assert told == [(f"goes on after epoch {epoch}", epoch)] and found == gone_on(spec, tmp_path / "b")[0]


def test_resume_with_worker_processes(pics, tmp_path, monkeypatch):
    def dls(spec, bs, device):
        made = TASKS["classify"].dls(spec, bs, device)
        for dl in made.loaders: dl.fake_l.num_workers = 2
        return made
    monkeypatch.setitem(TASKS, "with workers", replace(TASKS["classify"], dls=dls))
    spec = make_spec(pics, task="with workers", **SMALL | dict(epochs=2))
    stopped(spec, tmp_path / "a")
    assert gone_on(spec, tmp_path / "a")[0] == gone_on(spec, tmp_path / "b")[0]


def rewrite(checkpoint, change):
    "Change what a checkpoint holds."
    with safe_open(checkpoint, "pt") as f: parts, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    parts = {k: json.loads(v) for k, v in parts.items()}
    change(parts, tensors)
    save_file(tensors, checkpoint, {k: json.dumps(v) for k, v in parts.items()})


LOST = {
    "the optimizer": lambda parts, tensors: [t.zero_() for k, t in tensors.items() if k.startswith("opt.") and t.ndim],
    "torch's generator": lambda parts, tensors: tensors.update({"processes.0.torch": torch.Generator().manual_seed(3).get_state()}),
    "the mixing generator": lambda parts, tensors: [tensors.update({k: torch.Generator().manual_seed(3).get_state()}) for k in tensors if ".generators." in k],
    "the smoothed loss": lambda parts, tensors: tensors["processes.0.smooth_loss.val"].zero_(),
    "BatchNorm's statistics": lambda parts, tensors: [t.zero_() for k, t in tensors.items() if k.startswith("weights.") and "running_mean" in k],
}


def test_resume_needs_all_that_a_checkpoint_holds(pics, tmp_path):
    spec = make_spec(pics, **SMALL | dict(recipe="mixed", drop_path=.2))
    checkpoint = stopped(spec, tmp_path / "a")
    kept, whole = checkpoint.read_bytes(), gone_on(spec, tmp_path / "a")[0]
    for name, lose in LOST.items():
        (folder := tmp_path / name / spec.name).mkdir(parents=True)
        (folder / CHECKPOINT).write_bytes(kept)
        rewrite(folder / CHECKPOINT, lose)
        assert gone_on(spec, tmp_path / name)[0] != whole, name


def other_run(parts, tensors): parts["made"]["run"] = "digits-avg-1-0123456789"
def other_torch(parts, tensors): parts["made"]["torch"] = "1.2.3"
def other_processes(parts, tensors): parts["made"]["processes"] = 4
def other_network(parts, tensors): tensors["weights.0.0.0.weight"] = torch.zeros(3)
def no_state(parts, tensors): del parts["state"]


@pytest.mark.parametrize("change, words", [
    (other_run, "run digits-avg-1-0123456789 in the place of "), (other_torch, "torch 1.2.3 in the place of "),
    (other_processes, "processes 4 in the place of 1"), (other_network, "a network with other weights"), (no_state, "torn"),
    (None, "torn"),
], ids=["run", "torch", "processes", "network", "part", "torn"])
def test_resume_leaves_a_checkpoint_aside_that_is_another(pics, tmp_path, change, words):
    spec = make_spec(pics, **SMALL | dict(epochs=2))
    checkpoint = stopped(spec, tmp_path / "a")
    if change: rewrite(checkpoint, change)
    else: os.truncate(checkpoint, checkpoint.stat().st_size // 2)
    found, ((text, done),) = gone_on(spec, tmp_path / "a")
    assert text.startswith("begins anew. Its checkpoint is of ") and words in text and "\n" not in text and done == 0
    assert found == gone_on(spec, tmp_path / "b")[0]
