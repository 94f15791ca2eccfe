"What is measured of detections, and a detector in a Learner."
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from fastai.vision.all import (
    Callback, CSVLogger, EarlyStoppingCallback, GradientAccumulation, GradientClip, MixUp, SaveModelCallback)

from attnpool.callback.cutmixup import CutMixUpAugment
from attnpool.callback.precision import ChannelsLast
from attnpool.data.objects import scene_objects_dls
from attnpool.detect import detect_learner, objects_found
from attnpool.maps.learner import pictures_of   # with it come the methods of Learner
from attnpool.objects import Objects, class_table, curves
from attnpool.registry import BadInput
from attnpool.runs.train import RunLog


# Average precision

def rectangle(h, w, box, corner=0):
    "A mask of a box whose first pixels are cut off: fewer pixels than the box has."
    l, t, r, b = map(int, box)
    mask = torch.zeros(h, w, dtype=torch.bool)
    mask[t:b, l:r] = True
    mask[t:t + corner, l:l + corner] = False
    return mask


def picture(h, w, boxes, labels, scores=None, crowd=None, areas=None):
    "A picture's objects, or with scores what was said of it."
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.stack([rectangle(h, w, box, 3 * (scores is None)) for box in boxes]) if len(boxes) else torch.zeros(0, h, w, dtype=torch.bool)
    its = dict(boxes=boxes, labels=torch.tensor(labels, dtype=torch.long))
    if scores is not None: return its | dict(scores=torch.tensor(scores, dtype=torch.float32), masks=masks[:, None] * .8 + .1)
    areas = masks.sum((1, 2)) if areas is None else torch.tensor(areas)
    return its | dict(masks=masks.byte(), iscrowd=torch.tensor(crowd or [0] * len(boxes)).bool(), area=areas.float())


HAND = [   # truth and what was said: exact, off by exactly .6 and .75, in a crowd, doubled, of another class, of no object
    (picture(120, 160, [[0, 0, 10, 10], [20, 20, 60, 60], [60, 0, 160, 120]], [1, 2, 1]),
     picture(120, 160, [[0, 0, 10, 6], [20, 20, 50, 60], [62, 5, 158, 118], [0, 0, 10, 10]], [1, 2, 1, 2], [.9, .8, .7, .6])),
    (picture(100, 130, [[0, 0, 100, 100], [5, 5, 25, 25], [110, 0, 130, 20]], [1, 1, 3], crowd=[1, 0, 0]),
     picture(100, 130, [[5, 5, 25, 25], [6, 5, 25, 25], [40, 40, 70, 70], [110, 0, 130, 15]], [1, 1, 1, 3], [.5, .95, .85, .4])),
    (picture(60, 60, [], []), picture(60, 60, [[0, 0, 20, 20]], [2], [.75])),
    (picture(60, 60, [[0, 0, 30, 30], [20, 20, 50, 50]], [2, 2], areas=[1000., 1100.]), picture(60, 60, [], [], [])),
]


def drawn(n=40, seed=0):
    "Random truth, and detections near it and elsewhere; some crowds, some areas that are not those of the masks."
    rng, out = np.random.default_rng(seed), []
    for _ in range(n):
        h, w = rng.integers(60, 240, 2)
        def boxes(k):
            lt = rng.uniform(0, (w - 8, h - 8), (k, 2)).round()
            return np.concatenate([lt, np.minimum(lt + rng.integers(4, 130, (k, 2)), (w, h))], 1)
        k = int(rng.integers(0, 7))
        true, labels = boxes(k), rng.integers(1, 5, k)
        near = (true + rng.integers(-4, 5, (k, 4))).clip(0, (w, h, w, h))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        said = np.concatenate([near, boxes(4)])
        of = np.concatenate([np.where(rng.random(k) < .85, labels, rng.integers(1, 5, k)), rng.integers(1, 6, 4)])
        areas = None if rng.random() < .5 else [float(a) for a in rng.uniform(20, 12000, k)]
        out.append((picture(h, w, true.tolist(), labels.tolist(), crowd=(rng.random(k) < .15).tolist(), areas=areas),
                    picture(h, w, said.tolist(), of.tolist(), rng.random(len(said)).tolist())))
    return out


def by_pycocotools(pictures, kind):
    "COCO's own: AP, AP50, AP75, and AP of small, medium and large ones; -1 for none."
    from pycocotools import mask as coding
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    def annotations(side):
        for i, pair in enumerate(pictures):
            o = pair[side]
            masks = o["masks"][:, 0] > .5 if side else o["masks"]
            for j, (l, t, r, b) in enumerate(o["boxes"].tolist()):
                code = coding.encode(np.asfortranarray(masks[j].numpy().astype(np.uint8)))
                its = dict(image_id=i, category_id=int(o["labels"][j]), bbox=[l, t, r - l, b - t], segmentation=code)
                yield its | (dict(score=float(o["scores"][j])) if side else dict(iscrowd=int(o["iscrowd"][j]), area=float(o["area"][j])))
    truth = COCO()
    truth.dataset = dict(images=[dict(id=i, height=p[0]["masks"].shape[1], width=p[0]["masks"].shape[2]) for i, p in enumerate(pictures)],
                         annotations=[dict(id=k, **a) for k, a in enumerate(annotations(0), 1)], categories=[dict(id=c) for c in range(1, 6)], info={})
    truth.createIndex()
    said = [{k: v for k, v in a.items() if k != ("segmentation" if kind == "bbox" else "bbox")} for a in annotations(1)]
    its = COCOeval(truth, truth.loadRes(said), kind)
    its.evaluate(), its.accumulate(), its.summarize()
    return its.stats[:6], its.eval["precision"]


PARTS = "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"


@pytest.mark.parametrize("pictures", [HAND, drawn()], ids=["by hand", "drawn"])
def test_detect_average_precision_is_that_of_pycocotools(pictures):
    its = Objects()
    for true, said in pictures: its.add([said], [true])
    metrics = its.metrics()
    for ours, theirs in dict(box="bbox", mask="segm").items():
        stats, precision = by_pycocotools(pictures, theirs)
        assert (stats > 0).all() and len({*stats.round(6)}) >= 5   # each range has something to say
        assert np.allclose([metrics[f"{ours}_{part}"] for part in PARTS], stats, rtol=0, atol=1e-6)
        at = precision[..., 0, -1]
        table = class_table(its, [f"c{i}" for i in range(1, 6)])
        expected = [np.mean(at[0, :, c]) if at[0, 0, c] > -1 else np.nan for c in range(5)]
        assert np.allclose(table[f"{ours}_ap50"], expected, atol=1e-6, equal_nan=True)
        if ours == "box":
            course = curves(its, [f"c{i}" for i in range(1, 6)])
            assert np.allclose(course[course["class"] == "c2"].precision, at[0, :, 1], atol=1e-6)
            assert np.isclose(course[course["class"] == ""].precision.mean(), metrics["box_ap50"], atol=1e-6)
    assert list(table.objects) == [sum(int(((t["labels"] == c) & ~t["iscrowd"]).sum()) for t, _ in pictures) for c in range(1, 6)]


def test_detect_boxes_alone_have_the_same_average_precision():
    both, alone = Objects(), Objects(masks=False)
    for true, said in drawn(20, 1):
        both.add([said], [true])
        alone.add([{k: v for k, v in said.items() if k != "masks"}], [{k: v for k, v in true.items() if k != "masks"}])
    its = alone.metrics()
    assert 0 < its["box_ap"] < 1 and {k: v for k, v in both.metrics().items() if k.startswith("box")} == its


def test_detect_average_precision_of_nothing():
    true, none = HAND[0][0], picture(120, 160, [], [], [])
    its = Objects()
    its.add([none], [true])
    assert its.metrics()["box_ap"] == its.metrics()["mask_ap50"] == 0 and np.isnan(its.metrics()["mask_ap_medium"]) == False
    its.add([HAND[0][1]], [true])   # after it was computed
    assert 0 < its.metrics()["box_ap"] < 1
    its.reset()
    its.add([HAND[2][1]], [HAND[2][0]])   # no object anywhere
    assert np.isnan(list(its.metrics().values())).all() and curves(its, ["a", "b"]).empty


# A detector in a Learner

def test_detect_learner_trains_shows_and_finds():
    dls = scene_objects_dls(64, 4, n_train=8, n_valid=6)
    learn = detect_learner(dls, epochs=1, lr=1e-3)
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    parts = [row[name] for name in row if name.startswith("loss_")]
    assert len(parts) == 5 and row["valid_loss"] == pytest.approx(sum(parts), rel=1e-5) and all(np.isfinite([row["train_loss"], *parts]))
    assert {name for name in row if "_ap" in name} == {f"{kind}_{part}" for kind in ("box", "mask") for part in ("ap", "ap50", "ap75")}
    with learn.no_bar(): learn.show_results(max_n=3)   # of a loader made anew, which knows the names too
    shown = [ax for ax in plt.gcf().axes if ax.images]
    assert len(shown) == 6 and [ax.get_title().partition(":")[0] for ax in shown[:2]] == ["truth", "prediction"]
    plt.close("all")
    for ask in (learn.show_attention, lambda: pictures_of(learn)):
        with pytest.raises(BadInput, match="^learn: it finds objects, .*Use learn.show_results"): ask()
    picture = np.full((50, 70, 3), 90, np.uint8)
    with learn.no_bar(): found = learn.predict(picture)[0]
    assert {*found} == {"boxes", "labels", "scores", "masks"} and found["masks"].shape[1:] == (50, 70)


SMALL = dict(channels=8, box_channels=16, mask_layers=(8,), rois=8, before_nms=(20, 20), proposals=(20, 20), detections=10)


@pytest.fixture(scope="module")
def small():
    dls = scene_objects_dls(48, 4, n_train=8, n_valid=6)
    torch.manual_seed(1)
    return detect_learner(dls, epochs=1, steps=None, lr=1e-3, options=SMALL)


def test_detect_predictions_come_with_their_pictures(small):
    "Over several batches, the last of them of another length, with and without objects to compare with."
    dls, photos = small.dls, [np.full((40 + i, 50, 3), 20 * i, np.uint8) for i in range(5)]
    with small.no_bar():
        images, found, truth = small.get_preds(with_input=True)
        own, said, none = small.get_preds(dl=dls.test_dl(photos, bs=2), with_input=True)
    assert len(images) == len(found) == len(truth) == 6 and none is None and len(said) == 5
    for i, (x, y) in enumerate((x, y) for b in dls.valid for x, y in zip(*b)):
        assert torch.equal(images[i], x) and torch.equal(truth[i]["boxes"], y["boxes"])
        with torch.no_grad(): alone, = small.model.eval()([x])
        assert torch.allclose(alone["scores"], found[i]["scores"], atol=1e-5) and found[i]["masks"].is_floating_point()
    for x, photo in zip(own, photos): assert torch.allclose(x, torch.from_numpy(photo).permute(2, 0, 1) / 255)


def test_detect_metrics_are_those_of_masks_that_are_not_cut(small):
    its = Objects()
    with torch.no_grad():
        for images, targets in small.dls.valid: its.add(small.model.eval()(images), targets)
    known, again = its.metrics(), objects_found(small.model, small.dls.valid).metrics()
    assert known["box_ap"] > 0 and all(again[k] == v or np.isnan([again[k], v]).all() for k, v in known.items())
    names = [m.name for m in small.metrics]
    with small.no_bar(), small.no_logging(): values = dict(zip(["loss", *names], small.validate()))
    assert all(values[k] == known[k] for k in known if k in values)


def test_detect_trains_with_callbacks_of_fastai(small, tmp_path):
    counts = []
    class Counts(Callback):
        order, run_valid = 7, False   # after the accumulation, which counts pictures, not boxes
        def after_loss(self): counts.append(float(self.learn.loss_grad / self.learn.loss))
    small.path = tmp_path
    cbs = [SaveModelCallback(monitor="box_ap"), EarlyStoppingCallback(monitor="box_ap", min_delta=1., patience=1), CSVLogger(), GradientClip(1.),
           GradientAccumulation(8), Counts()]
    with small.no_bar(), small.no_logging(): small.fit(4, 1e-3, cbs=cbs)
    assert len(small.recorder.values) == 2 and counts == [.5] * 4   # stopped after the second epoch; four of eight pictures
    assert (tmp_path/"models"/"model.pth").exists() and len((tmp_path/"history.csv").read_text().splitlines()) == 3


def test_what_a_detector_in_a_learner_cannot_do_is_told(small):
    with small.no_bar(), pytest.raises(BadInput, match="^with_loss: a detector has losses of a batch"): small.get_preds(with_loss=True)
    small.recorder.train_metrics = True
    with small.no_bar(), pytest.raises(BadInput, match="train_metrics: a detector that trains says losses alone"): small.fit(1)
    small.recorder.train_metrics = False
    for cb in (ChannelsLast(), MixUp(), CutMixUpAugment()):
        with pytest.raises(BadInput, match=f"^cbs: {type(cb).__name__} is for pictures of one size"): detect_learner(small.dls, cbs=[cb])


def test_how_far_an_epoch_of_a_detector_is_can_be_told(small, tmp_path):
    told = []
    log = RunLog(tmp_path/"history.csv", on_part=lambda *part: told.append(part))
    with small.no_bar(), small.no_logging():
        log.every = 0.   # for a long epoch: once a second
        small.fit(1, 1e-3, cbs=log)
    assert told == [("trains", .5), ("trains", 1.), ("validates", .5), ("validates", 1.)]
