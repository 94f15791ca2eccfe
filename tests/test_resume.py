"Runs that are stopped at any moment, and go on: real ones, killed for real."
import hashlib
import json
import os
import random
import re
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

from attnpool.cli import main
from attnpool.registry import BadInput
from attnpool.runs.checkpoint import Checkpoint
from attnpool.runs.spec import make_spec
from attnpool.runs.store import CHECKPOINT, load_run
from attnpool.runs.sweep import sweep
from attnpool.runs.train import run
from attnpool.tasks import TASKS
from attnpool.weights import weights_hash

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


def test_resume_in_either_fit_of_finetune(pics, tmp_path):
    start = run(make_spec(pics, **SMALL | dict(epochs=1)), tmp_path, "cpu").folder
    spec = make_spec(pics, **SMALL | dict(recipe="finetune", start=start, epochs=4, freeze_epochs=2, opt="ranger", lr=4e-3))
    whole = gone_on(spec, tmp_path / "b")[0]
    for epoch in (1, 2, 3):   # in the first, between them, in the second
        stopped(spec, tmp_path / str(epoch), epoch)
        assert gone_on(spec, tmp_path / str(epoch)) == (whole, [(f"goes on after epoch {epoch}", epoch)])


def test_resume_is_not_for_a_probe_which_writes_no_checkpoint(pics, tmp_path):
    start = run(make_spec(pics, **SMALL | dict(epochs=1)), tmp_path, "cpu").folder
    spec, seen = make_spec(pics, **SMALL | dict(recipe="probe", start=start, lr=1e-3, wd=.01)), []
    run(spec, tmp_path, "cpu", lambda row: seen.append((tmp_path / spec.name / CHECKPOINT).exists()), checkpoint_seconds=0)
    assert seen == [False] * 3


def test_resume_with_worker_processes(pics, tmp_path, monkeypatch):
    "Each worker draws the crops of its own batches, so they are as many on a machine with other cores."
    cores = 2
    def dls(spec, bs, device):
        made = TASKS["classify"].dls(spec, bs, device)
        for dl in made.loaders: dl.fake_l.num_workers = cores
        return made
    monkeypatch.setitem(TASKS, "with workers", replace(TASKS["classify"], dls=dls))
    spec = make_spec(pics, task="with workers", **SMALL | dict(epochs=2, augment="imagenet"))
    stopped(spec, tmp_path / "a")
    whole, cores = gone_on(spec, tmp_path / "b")[0], 0
    assert gone_on(spec, tmp_path / "a") == (whole, [("goes on after epoch 1", 1)])


def rewrite(checkpoint, change):
    "Change what a checkpoint holds."
    with safe_open(checkpoint, "pt") as f: parts, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    parts = {k: json.loads(v) for k, v in parts.items() if k != "digest"}
    change(parts, tensors)
    texts = {k: json.dumps(v) for k, v in parts.items()}
    digest = hashlib.sha256(json.dumps([*(texts.get(k) for k in ("made", "state", "history", "seconds")), weights_hash(tensors)]).encode()).hexdigest()
    save_file(tensors, checkpoint, texts | dict(digest=digest))


LOST = {
    "the optimizer": lambda parts, tensors: [t.zero_() for k, t in tensors.items() if k.startswith("opt.") and t.ndim],
    "torch's generator": lambda parts, tensors: tensors.update({"processes.0.torch": torch.Generator().manual_seed(3).get_state()}),
    "the mixing generator": lambda parts, tensors: [tensors.update({k: torch.Generator().manual_seed(3).get_state()}) for k in tensors if ".generators." in k],
    "the smoothed loss": lambda parts, tensors: tensors["processes.0.smooth_loss.val"].zero_(),
    "BatchNorm's statistics": lambda parts, tensors: [t.zero_() for k, t in tensors.items() if k.startswith("weights.") and "running_mean" in k],
}


def test_resume_needs_all_that_a_checkpoint_holds(pics, tmp_path):
    spec = make_spec(pics, **SMALL | dict(recipe="mixed", drop_path=.2, epochs=2))
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


@pytest.fixture(scope="module")
def halfway(pics, tmp_path_factory):
    "A run that was stopped after its first epoch, and a network like its own."
    spec = make_spec(pics, **SMALL | dict(epochs=2))
    checkpoint = stopped(spec, tmp_path_factory.mktemp("halfway"))
    task = TASKS["classify"]
    return spec, checkpoint.read_bytes(), task.model(spec, task.dls(spec, 8, "cpu"))[0]


@pytest.mark.parametrize("change, words", [
    (other_run, "run digits-avg-1-0123456789 in the place of "), (other_torch, "torch 1.2.3 in the place of "),
    (other_processes, "processes 4 in the place of 1"), (other_network, "a network with other weights"), (no_state, "torn"),
], ids=["run", "torch", "processes", "network", "part"])
def test_resume_leaves_a_checkpoint_aside_that_is_another(halfway, tmp_path, change, words):
    spec, content, model = halfway
    (tmp_path / CHECKPOINT).write_bytes(content)
    assert len(Checkpoint(tmp_path, spec, torch.device("cpu"), tell=lambda *said: None).read(model)) == 1
    rewrite(tmp_path / CHECKPOINT, change)
    told = []
    assert Checkpoint(tmp_path, spec, torch.device("cpu"), tell=lambda *said: told.append(said)).read(model) == []
    (text, done), = told
    assert text.startswith("begins anew. Its checkpoint is of ") and words in text and "\n" not in text and done == 0


def test_resume_of_a_torn_checkpoint_begins_anew(halfway, tmp_path, capsys):
    spec, content, _ = halfway
    flipped = content[:-5000] + bytes(255 - b for b in content[-5000:-4990]) + content[-4990:]
    ends = dict(torn="begins anew. Its checkpoint is of nothing that can be read: it is torn.",
                flipped="begins anew. Its checkpoint is of nothing that can be trusted: bytes differ.", good="goes on after epoch 1")
    for out, there in dict(torn=content[:-100], flipped=flipped, good=content).items():
        (folder := tmp_path / out / spec.name).mkdir(parents=True)
        (folder / CHECKPOINT).write_bytes(there)
        (folder / "history.csv.77.tmp").write_bytes(b"left by a killed process")
        sweep([spec], tmp_path / out, "cpu")
        said = capsys.readouterr().out
        assert f"run 1/1  slim seed 1: {ends[out]}" in said and "no result.json" in said
        assert "It goes on." not in said
        assert {f.name for f in folder.iterdir()} == {*load_run(folder).files, "result.json"}
        (folder / CHECKPOINT).write_bytes(content)   # as after a kill before it is removed
        assert sweep([spec], tmp_path / out, "cpu")[0].status == "complete" and not (folder / CHECKPOINT).exists()
    assert left(tmp_path / "torn", spec) == left(tmp_path / "flipped", spec) == left(tmp_path / "good", spec)


def script(pics, out, how, seconds=0, more="", runner=(), **kwargs):
    "A process that makes a run."
    text = SCRIPT.format(data=str(pics), how=how, out=str(out), seconds=seconds, more=more)
    (file := Path(out).with_suffix(".py")).write_text(text)
    return subprocess.Popen([sys.executable, "-W", "ignore", *runner, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def test_resume_after_a_kill_between_any_two_writes(pics, tmp_path):
    """One process loads the libraries; for each place of a kill it forks one that dies there, and one that goes on."""
    fork = """
import os
def forked(out, at):
    if child := os.fork(): return os.waitpid(child, 0)[1]
    def hook(event, args, left=[at]):   # before a file is renamed or removed
        if event in ('os.rename', 'os.remove') and out in str(args[0]) and '.locks' not in str(args[0]):
            left[0] -= 1
            if left[0] < 0: os.kill(os.getpid(), 9)
    sys.addaudithook(hook)
    try: run(spec, out, 'cpu', checkpoint_seconds=0)
    finally: os._exit(0)
spec, out, at = make_spec(sys.argv[1], head='slim', epochs=2, size=20, bs=8), sys.argv[2], 0
while forked(f'{out}/{at}', at):
    assert forked(f'{out}/{at}', 10**6) == 0
    at += 2
print(at)
"""
    (file := tmp_path / "script.py").write_text(SCRIPT.format(data="", how={}, out="", seconds=0, more=fork).rpartition("run(")[0])
    done = subprocess.run([sys.executable, "-W", "ignore", file, pics, tmp_path], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    spec, n = make_spec(pics, **SMALL | dict(epochs=2)), int(done.stdout)
    assert n >= 10 and {left(tmp_path / str(i), spec) for i in range(0, n + 1, 2)} == {left(tmp_path / str(n), spec)}
    for i in range(0, n, 2): assert load_run(tmp_path / str(i) / spec.name).status == "complete"
    assert "goes on after epoch 1" in done.stderr and "goes on after epoch 2" in done.stderr and not list(tmp_path.rglob("*.safetensors.*"))


@pytest.mark.parametrize("kills, processes", [(2, 1), (1, 2)])
def test_resume_after_sigkill(kills, processes):
    kill = Path(__file__).parents[1] / "docs" / "results" / "kill_and_resume.py"
    done = subprocess.run([sys.executable, kill, str(kills), str(processes)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and f"{kills} of {kills} equal" in done.stdout, done.stdout + done.stderr


def test_resume_where_the_disk_is_full(pics, tmp_path):
    "Files may have a megabyte: more than the weights have, less than a checkpoint."
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))"
    process = script(pics, tmp_path / "a", SMALL | dict(head="avg"), more=limit)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    spec = make_spec(pics, **SMALL | dict(head="avg"))
    said = [line for line in err.splitlines() if "checkpoint" in line]
    assert said == [f"attnpool: {spec.name}: its checkpoint cannot be written (File too large). It goes on without one; "
                    "if it were stopped, it would begin after epoch 0."]
    result = load_run(tmp_path / "a" / spec.name)
    assert result.status == "complete" and {f.name for f in result.folder.iterdir()} == {*result.files, "result.json"}


def test_resume_where_the_disk_is_full_for_a_while(pics, tmp_path):
    "Files may have a hundred bytes, as long as the second epoch is written: neither history nor checkpoint fit."
    limit = """
import resource
from functools import partial
def on_epoch(row): resource.setrlimit(resource.RLIMIT_FSIZE, (100 if row['epoch'] == 0 else -1, -1))
run = partial(run, on_epoch=on_epoch)
"""
    process = script(pics, tmp_path / "a", SMALL, seconds=3600, more=limit)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    spec = make_spec(pics, **SMALL)
    assert f"attnpool: {spec.name}: its history cannot be written (File too large). It goes on, and tries again.\n" in err
    assert list(load_run(tmp_path / "a" / spec.name).history().epoch) == [0, 1, 2]


def test_resume_of_two_processes_sends_no_weights_between_them(halfway, pics, tmp_path):
    "Each reads the checkpoint for itself: what the first tells the others is a few bytes."
    spec, content, _ = halfway
    (folder := tmp_path / "a" / spec.name).mkdir(parents=True)
    (folder / CHECKPOINT).write_bytes(content)
    rewrite(folder / CHECKPOINT, lambda parts, tensors: parts["made"].update(processes=2))
    both = """
import os, pickle, torch
import torch.distributed as dist
from attnpool.runs.checkpoint import Checkpoint
from attnpool.tasks import TASKS
def run(spec, out, device, checkpoint_seconds):
    sizes, send = [], dist.broadcast_object_list
    def sent(box, first):
        send(box, first)
        sizes.append(len(pickle.dumps(box)))
    dist.broadcast_object_list = sent
    rank = 0 if os.fork() else 1
    os.environ |= dict(RANK=str(rank), WORLD_SIZE='2')
    dist.init_process_group('gloo', f'file://{out}.meet', rank=rank, world_size=2)
    model = TASKS['classify'].model(spec, TASKS['classify'].dls(spec, 8, device))[0]
    checkpoint = Checkpoint(f'{out}/{spec.name}', spec, torch.device(device))
    rows = checkpoint.read(model)
    total = sum(t.double().sum().item() for _, t in sorted(checkpoint.state['weights'].items()))
    print(f'{rank} {len(rows)} {max(sizes) < 1000} {total}\\n', end='', flush=True)
    dist.barrier()
"""
    process = script(pics, tmp_path / "a", SMALL | dict(epochs=2), more=both)
    out, err = process.communicate(timeout=240)
    with safe_open(folder / CHECKPOINT, "pt") as f: total = sum(f.get_tensor(k).double().sum().item() for k in sorted(f.keys()) if k.startswith("weights."))
    assert sorted(out.splitlines()) == [f"{rank} 1 True {total}" for rank in (0, 1)], err


def test_resume_checkpoints_are_few_and_their_time_is_counted(pics, tmp_path, monkeypatch):
    spec = make_spec(pics, **SMALL)
    with pytest.raises(KeyboardInterrupt): run(spec, tmp_path, "cpu", stop(2))
    assert not (tmp_path / spec.name / CHECKPOINT).exists()   # no minute has passed
    checkpoint = stopped(spec, tmp_path, 2)
    rewrite(checkpoint, lambda parts, tensors: parts.update(seconds=1000.))
    result = run(spec, tmp_path, "cpu", checkpoint_seconds=float("inf"))
    assert 1000 < result.run_seconds < 1100 and list(result.history().epoch) == [0, 1, 2]
    for wrong in (-1, float("nan")):
        with pytest.raises(BadInput, match="checkpoint_seconds: expected 0 or more seconds, got"): run(make_spec(pics, **SMALL | dict(seed=2)), tmp_path, "cpu", checkpoint_seconds=wrong)


def test_resume_options_of_the_commands(pics, tmp_path, capsys):
    spec = make_spec(pics, **SMALL | dict(head="avg"))
    stopped(spec, tmp_path)
    words = ["bench", str(pics), "--heads", "avg", "--seeds", "1", "--epochs", "3", "--size", "20", "--bs", "8", "--device", "cpu", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as e: main([*words, "--checkpoint-seconds", "-1"])
    assert e.value.code == 2 and "--checkpoint-seconds" in capsys.readouterr().err
    with pytest.raises(SystemExit) as e: main([*words, "--checkpoint-seconds", "0"])
    said = capsys.readouterr().out
    assert not e.value.code and "run 1/1  avg seed 1: goes on after epoch 1" in said and "so the run did not finish." in said
    assert re.findall(r"(\d)/3 epochs", said) == ["2", "3"] and not list(tmp_path.rglob(CHECKPOINT))
