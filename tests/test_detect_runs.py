"Runs of a detection as people ask for them: killed, begun from others, evaluated, exported, on several processes."
import json
import math
import os
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
from attnpool.registry import BadInput
from attnpool.runs.spec import make_spec
from attnpool.runs.store import CHECKPOINT
from attnpool.runs.train import open_run, run
from attnpool.tasks import TASKS

ROOT = Path(__file__).parents[1]
SMALL = dict(channels=8, box_channels=16, mask_layers=(8,), rois=8, before_nms=(20, 20), proposals=(20, 20), detections=10)
TINY = dict(task="detect", size=32, bs=4, epochs=1, options=SMALL, augment="none", steps=None, lr=2e-3)


def photographed(folder, masks=True, n=dict(train=8, val=5)):
    "Squares on grey, as COCO has them; pictures of several sizes, one without objects, one with a crowd."
    rng = np.random.default_rng(1)
    (folder/"annotations").mkdir(parents=True)
    for part, k in n.items():
        (folder/part).mkdir()
        images, annotations = [], []
        for i in range(k):
            h, w = [(40, 48), (48, 40), (40, 40)][i % 3]
            image = rng.integers(0, 90, (h, w, 3)).astype(np.uint8)
            images.append(dict(id=i, file_name=f"{i}.png", width=w, height=h))
            for c in range(0 if i == 2 else 1 + i % 2):
                x, y, s = *rng.integers(0, 20, 2).tolist(), 14 + 4 * c
                image[y:y + s, x:x + s, c] = 240
                its = dict(id=len(annotations) + 1, image_id=i, category_id=1 + c, bbox=[x, y, s, s], area=s * s, iscrowd=0)
                if masks: its["segmentation"] = [[x, y, x + s, y, x + s, y + s, x, y + s]]
                annotations.append(its)
            Image.fromarray(image).save(folder/part/f"{i}.png")
        said = dict(images=images, annotations=annotations, categories=[dict(id=1, name="red"), dict(id=2, name="green")])
        (folder/"annotations"/f"instances_{part}.json").write_text(json.dumps(said))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory): return photographed(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory): return run(make_spec(photos, **TINY), tmp_path_factory.mktemp("trained"), "cpu")


def asked(*words):
    "The exit status of a command."
    with pytest.raises(SystemExit) as e: main([*map(str, words)])
    return e.value.code


def test_a_detect_run_keeps_what_it_measured(trained, photos):
    names = ["box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75"]
    history = trained.history()
    assert trained.status == "complete" and {*names, "train_loss", "valid_loss", "loss_mask", "loss_objectness"} <= {*history}
    parts = [c for c in history if c.startswith("loss_")]
    assert len(parts) == 5 and math.isclose(history[parts].sum(axis=1).iloc[0], history.valid_loss.iloc[0], rel_tol=1e-5)
    assert all(math.isclose(trained.metrics[name], history[name].iloc[-1], abs_tol=1e-6) for name in names)
    with np.load(trained.folder/"maps.npz") as f:
        assert f["images"].shape == (5, 48, 48, 3) and f["sizes"].tolist()[:2] == [[40, 48], [48, 40]]
        truth = f["truth"]
        masks = np.unpackbits(f["truth_masks"], axis=-1, count=48)
        assert len(truth) == len(masks) == 6 and not (truth[:, 0] == 2).any()
        for (_, label, l, t, r, b), mask in zip(truth, masks):
            y, x = mask.nonzero()
            assert [x.min(), y.min(), x.max() + 1, y.max() + 1] == [l, t, r, b] and r - l == 14 + 4 * (label - 1)
    assert list(pd.read_csv(trained.folder/"classes.csv").objects) == [4, 2]


def test_a_detect_run_that_is_killed_goes_on_to_the_same_weights(photos, tmp_path):
    how = TINY | dict(epochs=3)
    script = f"""
import os, signal
from attnpool.runs.spec import make_spec
from attnpool.runs.train import run
def on_epoch(row):
    if row['epoch'] == 1: os.kill(os.getpid(), signal.SIGKILL)
run(make_spec({str(photos)!r}, **{how!r}), {str(tmp_path/'a')!r}, 'cpu', on_epoch, checkpoint_seconds=0)
"""
    env, spec = os.environ | dict(PYTHONPATH=str(ROOT)), make_spec(photos, **how)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path/"a"/spec.name/CHECKPOINT).exists() and not (tmp_path/"a"/spec.name/"result.json").exists()
    told = []
    again = run(spec, tmp_path/"a", "cpu", on_checkpoint=lambda *said: told.append(said))
    whole = run(spec, tmp_path/"b", "cpu")
    assert told == [("goes on after epoch 1", 1)] and again.metrics == whole.metrics
    for name in ("weights.safetensors", "classes.csv", "curves.csv"):
        assert (again.folder/name).read_bytes() == (whole.folder/name).read_bytes()


def test_an_exported_detect_learner_finds_objects_in_a_photo(trained, photos, tmp_path):
    from fastai.vision.all import load_learner
    learn = open_run(trained.folder, "cpu")
    with learn.no_bar(): value = learn.validate()[1]
    assert math.isclose(value, trained.value, abs_tol=1e-6)
    file = photos/"val"/"0.png"   # 48 x 40 pixels
    with learn.no_bar(): likely, _, said = learn.predict(file)
    learn.export(tmp_path/"learner.pkl")
    again = load_learner(tmp_path/"learner.pkl")
    with again.no_bar(): _, _, same = again.predict(file)
    assert all(torch.equal(said[k], same[k]) for k in said) and said["masks"].shape[1:] == (1, 40, 48)
    with torch.no_grad(): direct, = learn.model.eval()([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255])
    assert torch.allclose(direct["boxes"], said["boxes"], atol=1e-4)
    with learn.no_bar(): each, targets = learn.get_preds()
    assert len(each) == len(targets) == 5 and [len(t["labels"]) for t in targets] == [1, 2, 0, 2, 1]


def test_a_detect_run_begins_from_a_classifier(trained, photos, tmp_path):
    digits = run(make_spec("digits", "avg", size=24, bs=64, epochs=1, steps=1), tmp_path, "cpu")
    had = open_run(digits.folder, "cpu", with_data=False)
    torch.save(had.model.state_dict(), tmp_path/"body.pth")
    for start in (digits.folder, tmp_path/"body.pth"):
        spec = make_spec(photos, start=start, **TINY)
        dls = TASKS["detect"].dls(spec, 4, "cpu")
        model, _ = TASKS["detect"].model(spec, dls)
        theirs = {v.data_ptr(): v for v in had.model.state_dict().values()}
        mine = [v for k, v in model.body.state_dict().items() if v.ndim == 4]
        assert mine and all(any(v.shape == t.shape and torch.equal(v, t) for t in theirs.values()) for v in mine)


def test_a_detect_run_begins_from_a_detector(trained, photos, capsys):
    "All goes on in one of the same classes, but what belongs to a class in one of others; the body alone with other options."
    had = open_run(trained.folder, "cpu", with_data=False).model.state_dict()
    def new(data, start, **more):
        spec = make_spec(data, start=start, **TINY | more)
        its = TASKS["detect"].model(spec, TASKS["detect"].dls(spec, 4, "cpu"))[0].state_dict()
        return {k for k, v in its.items() if not (v.shape == had[k].shape and torch.equal(v, had[k]))}
    capsys.readouterr()
    assert new(photos, trained.folder) == new(photos, trained.folder/"weights.safetensors") == set()
    assert "its body is taken." in (said := capsys.readouterr().err) and ": so is all else." in said and "left out" not in said
    assert {k.rpartition(".")[0].rpartition(".")[2] for k in new("scenes", trained.folder)} == {"cls_score", "bbox_pred", "mask_fcn_logits"}
    assert "so is all else, but what belongs to its classes, which are others." in capsys.readouterr().err
    other = new(photos, trained.folder, options=SMALL | dict(channels=16))
    assert other and not any(k.startswith("body.") for k in other) and "its heads have other options and begin anew" in capsys.readouterr().err


def test_detect_runs_are_evaluated_on_other_pictures(trained, photos, tmp_path, capsys):
    other = photographed(tmp_path/"other", n=dict(train=1, val=3))
    for data in (photos, other):
        assert asked("evaluate", trained.folder, data, "--device", "cpu", "--out", tmp_path/"e") == 0
    said = capsys.readouterr().out
    assert "5 pictures" in said and "3 pictures" in said
    table = pd.read_csv(tmp_path/"e"/"detection.csv")
    assert list(table.pictures) == [3] and {"box_ap", "mask_ap50"} <= {*table}
    assert len(list((tmp_path/"e"/"objects").glob("*.json"))) == 2
    assert asked("evaluate", trained.folder, photos, "--ratios", ".5,1", "--out", tmp_path/"e") == 2
    assert "ratios: it is for runs of a segmentation" in capsys.readouterr().err


@pytest.mark.parametrize("more, words", [
    (dict(mix="cutmixup"), "mix: pictures with one label"), (dict(label_smoothing=.1), "label_smoothing: a detector has losses"),
    (dict(loss="balanced"), "loss: a detector has losses"), (dict(recipe="probe"), "train: frozen is for classifiers"),
    (dict(eval_sizes=(48,)), "eval_sizes: objects are found in whole"), (dict(head="avg"), "head: the task detect has one head")])
def test_what_detect_has_no_use_for_is_told(photos, more, words):
    with pytest.raises(BadInput, match=words): make_spec(photos, **TINY | more)


def test_detect_counts_of_several_processes_are_those_of_one(photos, tmp_path):
    script = tmp_path/"script.py"
    script.write_text(f"""
import json, os, torch
from attnpool.distributed import distributed, join_processes
from attnpool.runs.spec import make_spec
from attnpool.runs.train import open_run, run
device = join_processes('cpu')
result = run(make_spec({str(photos)!r}, **{TINY | dict(bs=2)!r}), {str(tmp_path)!r}, 'cpu')
learn = open_run(result.folder, 'cpu')
with learn.no_bar(), learn.no_logging():
    with distributed(learn): several, (found, targets) = learn.validate(), learn.get_preds()
    alone, (said, _) = learn.validate(), learn.get_preds()
same = all(torch.allclose(a['scores'], b['scores'], atol=1e-5) for a, b in zip(found, said))
told = [list(map(float, several)), list(map(float, alone)), result.metrics['box_ap'], len(learn.dls.valid_ds), same, [len(t['labels']) for t in targets]]
with open({str(tmp_path)!r} + '/told' + os.environ['RANK'] + '.json', 'w') as f: json.dump(told, f)
""")
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
                          capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads((tmp_path/f"told{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1]
    several, alone, ap, n, same, objects = told[0]
    assert n == 5 and same and objects == [1, 2, 0, 2, 1] and "UserWarning" not in done.stderr and np.allclose(several[1:7], alone[1:7], atol=1e-6) and math.isclose(ap, alone[1], abs_tol=1e-6)
