"Runs of a segmentation as people ask for them: killed, side by side, begun from others, compared, on several processes."
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from attnpool.cli import main
from attnpool.masks import IGNORED
from attnpool.models.start import find_start
from attnpool.registry import BadInput
from attnpool.report.collect import collect, group_by_setting, tell_apart
from attnpool.report.stats import remarks, summarize
from attnpool.runs.spec import make_spec
from attnpool.runs.store import CHECKPOINT, load_run
from attnpool.runs.train import open_run, run
from attnpool.tasks import TASKS

ROOT = Path(__file__).parents[1]
SMALL = dict(channels=8, aux_channels=4)
TINY = dict(task="segment", size=24, bs=4, epochs=1, options=SMALL)
WORDS = ["--task", "segment", "--size", "24", "--bs", "4", "--epochs", "1", "--options", "channels=8,aux_channels=4", "--device", "cpu", "--jobs", "1"]


def photographed(folder, sizes, n=dict(train=12, val=5)):
    "Squares on grey with their masks, in pictures of these sizes in turn."
    rng = np.random.default_rng(1)
    for part, k in n.items():
        for kind in ("images", "masks"): (folder/part/kind).mkdir(parents=True)
        for i in range(k):
            h, w = sizes[i % len(sizes)]
            image, mask = rng.integers(0, 90, (h, w, 3)).astype(np.uint8), np.zeros((h, w), np.uint8)
            y, x = rng.integers(0, 10, 2)
            mask[y:y + 12, x:x + 12], image[y:y + 12, x:x + 12, i % 2] = 1, 240
            mask[-1] = IGNORED
            Image.fromarray(image).save(folder/part/"images"/f"{i}.png")
            Image.fromarray(mask).save(folder/part/"masks"/f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory): return photographed(tmp_path_factory.mktemp("squares"), [(24, 28)])


@pytest.fixture(scope="module")
def odd_photos(tmp_path_factory): return photographed(tmp_path_factory.mktemp("odd"), [(24, 28), (30, 24), (24, 24)])


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory): return run(make_spec(photos, **TINY), tmp_path_factory.mktemp("trained"), "cpu")


def asked(*words):
    "The exit status of a command."
    with pytest.raises(SystemExit) as e: main([*map(str, words)])
    return e.value.code


# Killed

def test_a_segment_run_that_is_killed_goes_on_to_the_same_weights(photos, tmp_path):
    spec = make_spec(photos, **TINY | dict(epochs=3))
    script = f"""
import os, signal
from attnpool.runs.spec import make_spec
from attnpool.runs.train import run
def on_epoch(row):
    if row['epoch'] == 1: os.kill(os.getpid(), signal.SIGKILL)
run(make_spec({str(photos)!r}, **{TINY | dict(epochs=3)!r}), {str(tmp_path/'a')!r}, 'cpu', on_epoch, checkpoint_seconds=0)
"""
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path/"a"/spec.name/CHECKPOINT).exists() and not (tmp_path/"a"/spec.name/"result.json").exists()
    told = []
    again = run(spec, tmp_path/"a", "cpu", on_checkpoint=lambda *said: told.append(said))
    whole = run(spec, tmp_path/"b", "cpu")
    assert told == [("goes on after epoch 1", 1)] and again.metrics == whole.metrics
    for name in ("weights.safetensors", "classes.csv"): assert (again.folder/name).read_bytes() == (whole.folder/name).read_bytes()
    assert run(spec, tmp_path/"a", "cpu", on_epoch=lambda row: pytest.fail("a finished run is made again")) == again


# Begun from others

@pytest.mark.parametrize("arch", ["xeca_resnext_tiny", "tf_efficientnet_lite0", "torchvision.resnet18"])
def test_a_segment_run_is_a_start_of_its_body(photos, arch, tmp_path, capsys):
    task, spec = TASKS["segment"], make_spec(photos, arch=arch, **TINY | dict(size=32))
    first = run(spec, tmp_path, "cpu")
    had = open_run(first.folder, "cpu").model.state_dict()
    follows = make_spec(photos, arch=arch, start=first.folder, **TINY | dict(size=32, lr=1e-3))
    model, _ = task.model(follows, task.dls(follows, 4, "cpu"))
    now = model.state_dict()
    assert all(torch.equal(now[k], had[k]) for k in now if k.startswith("body."))
    assert not torch.equal(now["decode.classify.weight"], had["decode.classify.weight"])
    said = capsys.readouterr().err
    assert f"{first.folder.name}: its body is taken; its pyramid and decoder are not" in said
    cut = dict(tf_efficientnet_lite0="What comes after blocks.6.0.bn3 begins anew").get(arch)
    assert (cut or "ends on") in said if cut else "ends on" not in said
    digits = make_spec("digits", "avg", arch=arch, start=first.folder, size=32)
    theirs = {v.data_ptr(): v for v in TASKS["classify"].model(digits, TASKS["classify"].dls(digits, 8, "cpu"))[0].state_dict().values()}
    mine = [v for k, v in had.items() if k.startswith("body.") and v.numel() > 100]
    assert all(any(v.shape == t.shape and torch.equal(v, t) for t in theirs.values()) for v in mine)


def test_a_segment_run_of_another_network_is_no_start(trained, photos):
    with pytest.raises(BadInput, match="start: the run .* has the network xeca_resnext_tiny"):
        make_spec(photos, arch="torchvision.resnet18", start=trained.folder, **TINY)


@pytest.mark.parametrize("more, words", [
    (["digits", "--recipe", "fixres"], "is of a segmentation, and fixres goes on with classifiers"),
    (["digits"], "is of a segmentation, and quick goes on with classifiers"),
    (["{photos}", "--task", "segment"], "start: for the task segment all seeds begin from the body of one run"),
    (["{photos}", "--task", "segment", "--recipe", "probe"], "start: for the task segment"),
    (["{photos}", "--recipe", "quick"], "is of a segmentation, and quick goes on with classifiers")])
def test_folders_of_segment_runs_are_no_start(more, words, trained, photos, tmp_path, capsys):
    more = [str(photos) if word == "{photos}" else word for word in more]
    assert asked("bench", *more, "--start", trained.folder.parent, "--out", tmp_path/"runs") == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not (tmp_path/"runs").exists()


def test_a_probe_of_segment_says_that_it_is_for_classifiers(photos):
    with pytest.raises(BadInput, match="train: frozen is for classifiers"): make_spec(photos, recipe="probe", task="segment")


# Bad input: no run is begun

def masks_of(folder, part): return sorted((folder/part/"masks").iterdir())
def put(file, values): Image.fromarray(values).save(file)

BAD = {
    "another size": (lambda d: put(masks_of(d, "train")[0], np.zeros((20, 28), np.uint8)), "train/images/0.png (the mask is 28 x 20 pixels, the picture 28 x 24)"),
    "16 bits": (lambda d: put(masks_of(d, "train")[0], np.full((24, 28), 1000, np.uint16)), "train/masks/0.png: more than 8 bits a pixel"),
    "colours": (lambda d: put(masks_of(d, "train")[0], np.arange(24 * 28 * 3).reshape(24, 28, 3).astype(np.uint8)), "train/masks/0.png: colours (RGB) without a palette"),
    "no partner": (lambda d: masks_of(d, "val")[0].unlink(), "val/images/0.png (it has no mask)"),
    "one class": (lambda d: [put(f, np.zeros((24, 28), np.uint8)) for part in ("train", "val") for f in masks_of(d, part)], "hold one class only, '0'"),
    "nothing to train": (lambda d: [put(f, np.full((24, 28), IGNORED, np.uint8)) for f in masks_of(d, "train")], "the training masks of"),
    "nothing to measure": (lambda d: [put(f, np.full((24, 28), IGNORED, np.uint8)) for f in masks_of(d, "val")], "the validation masks of"),
}


@pytest.mark.parametrize("spoil, words", BAD.values(), ids=BAD)
def test_bench_of_bad_segment_masks_begins_no_run(spoil, words, tmp_path, capsys):
    spoil(photographed(tmp_path/"data", [(24, 28)]))
    assert asked("bench", tmp_path/"data", *WORDS, "--seeds", "1,2", "--out", tmp_path/"runs") == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not list((tmp_path/"runs").glob("*/spec.json"))


def test_segment_trains_on_batches_without_any_label(tmp_path):
    data = photographed(tmp_path/"data", [(24, 28)])
    for f in masks_of(data, "train")[:9]: put(f, np.full((24, 28), IGNORED, np.uint8))   # of twelve, in batches of two
    result = run(make_spec(data, **TINY | dict(bs=2)), tmp_path, "cpu")
    assert result.status == "complete" and np.isfinite(result.history().train_loss).all() and 0 < result.value < 1


@pytest.mark.parametrize("name", ["bs", "micro_bs"])
def test_segment_batches_of_one_are_refused_before_the_data_are_read(name, tmp_path, capsys):
    assert asked("bench", tmp_path, "--task", "segment", f"--{name.replace('_', '-')}", "1", "--out", tmp_path/"runs") == 2
    assert f"{name}: UPerNet's norms" in capsys.readouterr().err


# Compared

def test_segment_starts_are_compared_in_one_command(photos, trained, tmp_path, capsys):
    assert asked("bench", photos, *WORDS, "--start", f"none,{trained.folder}", "--seeds", "1,2", "--out", tmp_path) == 0
    said = capsys.readouterr().out
    table = pd.read_csv(tmp_path/"report.csv")
    assert list(table["head"]) == ["from scratch", f"from {trained.folder.name}"] and list(table.n_pairs) == [0, 2]
    runs = {(bool(r.spec.start), r.spec.seed): r.value for r in collect([tmp_path])[0]}
    d = [runs[True, seed] - runs[False, seed] for seed in (1, 2)]
    half = 12.7062 * np.std(d, ddof=1) / 2**.5   # t with one degree of freedom
    assert np.allclose(table.loc[1, ["difference", "low", "high"]].astype(float), [np.mean(d), np.mean(d) - half, np.mean(d) + half], atol=1e-4)
    assert "start=none seed 1" in said and f"start={trained.folder.name} seed 2" in said and "vs from scratch" in said
    assert asked("bench", photos, *WORDS, "--start", trained.folder, "--seeds", "1,2", "--out", tmp_path) == 0
    assert "2 of 2 runs are in" in capsys.readouterr().out
    only = [r for r in collect([tmp_path])[0] if r.spec.start]
    others = [r.__class__(**vars(r) | dict(spec=make_spec(photos, start="pretrained", arch="resnet18", seed=r.spec.seed, **TINY))) for r in only]
    assert any("--start none,START makes both" in line for line in remarks(only + others))


@pytest.mark.parametrize("more, words", [
    (["--heads", "avg,slim"], "start: heads are compared from one start"), (["--task", "segment", "--start", "none,nowhere"], "start: there is no file or folder nowhere")])
def test_starts_that_segment_does_not_find_and_heads_do_not_compare(more, words, tmp_path, capsys):
    assert asked("bench", "digits", "--start", "none,pretrained", *more, "--out", tmp_path/"runs") == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not (tmp_path/"runs").exists()


def test_segment_recipes_of_steps_are_told_in_steps(photos, tmp_path):
    result = run(make_spec(photos, **TINY | dict(epochs=2, steps=4)), tmp_path, "cpu")
    (title, _), = tell_apart(group_by_setting([result]))
    assert title.endswith("24 px, 4 steps") and result.spec.recipe.shown(12) == 16
    assert make_spec(photos, **TINY | dict(epochs=3)).recipe.shown(12) == 36


# Several processes

def test_segment_counts_of_several_processes_are_those_of_one(odd_photos, tmp_path):
    "Pictures of several sizes, five for two processes; and a start whose head looks at them."
    for i, f in enumerate(sorted((odd_photos/"train"/"images").iterdir())):
        (tmp_path/"classes"/("val", "train")[i > 3]/"ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.open(f).save(tmp_path/"classes"/("val", "train")[i > 3]/"ab"[i % 2]/f.name)
    start = run(make_spec(tmp_path/"classes", "learned", size=24, bs=4, epochs=1), tmp_path, "cpu").folder
    script = tmp_path/"script.py"
    script.write_text(f"""
import json, os
from attnpool.distributed import distributed, join_processes
from attnpool.runs.spec import make_spec
from attnpool.runs.train import run
from attnpool.runs.train import open_run
device = join_processes('cpu')
result = run(make_spec({str(odd_photos)!r}, start={str(start)!r}, **{TINY!r}), {str(tmp_path)!r}, 'cpu')
learn = open_run(result.folder, 'cpu')
with learn.no_bar(), learn.no_logging():
    with distributed(learn): several = learn.validate()
    alone = learn.validate()
told = [list(map(float, several)), list(map(float, alone)), result.metrics['miou'], len(learn.dls.valid_ds)]
with open({str(tmp_path)!r} + '/told' + os.environ['RANK'] + '.json', 'w') as f: json.dump(told, f)
""")
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
                          capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads((tmp_path/f"told{rank}.json").read_text()) for rank in range(2)]   # two share one output
    assert told[0] == told[1]
    several, alone, miou, n = told[0]
    folder, = tmp_path.glob("odd*-upernet-*")
    with np.load(folder/"maps.npz") as f: assert str(f["maps_of"]) == start.name and f["maps"].shape == f["truth"].shape
    assert n == 5 and np.allclose(several, alone, atol=1e-5) and math.isclose(miou, alone[1], abs_tol=1e-6)
