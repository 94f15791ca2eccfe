"Pictures of detection: matching, boxes and masks in figures, pages, reports, the command."
import json
import re
import shutil
import subprocess
from dataclasses import replace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou
from typer.testing import CliRunner

from attnpool.cli import app
from attnpool.data.objects import objects_dls
from attnpool.maps.boxes import (CROWD, MISSED, STATES, as_objects, box_overlap, curves_figure, match_objects, outline,
                                 place_names, show_objects)
from attnpool.maps.objects import Finds, detect_pictures, is_detector, objects_html, objects_page, read_objects
from attnpool.maps.page import maps_page
from attnpool.registry import BadInput
from attnpool.report.collect import collect, group_by_setting
from attnpool.report.dense import class_tables
from attnpool.report.objects import format_found, object_parts, precisions
from attnpool.report.page import write_report
from attnpool.report.stats import format_table, remarks, summarize
from attnpool.runs.spec import make_spec
from attnpool.runs.train import open_run, run

matplotlib.use("Agg")
VOCAB = ["$disc$", "NA", "<b>"]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def some(rng, k, h=60, w=80, crowds=False, masks=False):
    "Objects of a picture, at random."
    middle, side = rng.uniform(0, 1, (k, 2)) * (w, h), rng.uniform(8, 30, (k, 2))
    boxes = np.concatenate([middle - side / 2, middle + side / 2], 1).clip(0, [w, h, w, h])
    out = dict(boxes=boxes, labels=rng.integers(1, 4, k), scores=rng.uniform(.05, 1, k))
    if crowds: out["iscrowd"] = rng.random(k) < .3
    if masks:
        y, x = np.mgrid[:h, :w] + .5
        out["masks"] = np.stack([(x > l) & (x < r) & (y > t) & (y < b) for l, t, r, b in boxes]) if k else np.zeros((0, h, w), bool)
    return out


def jittered(rng, o, n):
    "What a network might say of these objects."
    i = rng.integers(0, len(o["boxes"]), n)
    out = {k: v[i].copy() for k, v in o.items() if k != "iscrowd"}
    return out | dict(boxes=out["boxes"] + rng.normal(0, 3, (n, 4)), scores=rng.uniform(.05, 1, n))


# Matching

def test_detect_overlap_is_that_of_torchvision_and_of_a_crowd_the_share_inside():
    rng = np.random.default_rng(0)
    a, b = some(rng, 40)["boxes"], some(rng, 30)["boxes"]
    np.testing.assert_allclose(box_overlap(a, b), box_iou(torch.tensor(a), torch.tensor(b)), atol=1e-9)
    assert box_overlap(np.array([[0, 0, 4, 4.]]), np.array([[2, 0, 90, 90.]]), np.array([True])) == pytest.approx(.5)
    assert box_overlap(np.zeros((0, 4)), b).shape == (0, 30)


def test_detect_matching_is_that_of_pycocotools_crowds_included():
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    rng, truth, said = np.random.default_rng(1), [], []
    for _ in range(60):
        truth.append(some(rng, 9, crowds=True))
        said.append(jittered(rng, truth[-1], 12))
    def row(o, i, j): return dict(image_id=i + 1, category_id=int(o["labels"][j]), bbox=[*o["boxes"][j, :2], *(o["boxes"][j, 2:] - o["boxes"][j, :2])])
    def area(o, j): return float(np.prod(o["boxes"][j, 2:] - o["boxes"][j, :2]))
    gt, number = COCO(), iter(range(1, 10_000))
    gt.dataset = dict(images=[dict(id=i + 1) for i in range(60)], categories=[dict(id=k) for k in (1, 2, 3)], annotations=[
        row(o, i, j) | dict(id=next(number), iscrowd=int(o["iscrowd"][j]), area=area(o, j)) for i, o in enumerate(truth) for j in range(9)])
    gt.createIndex()
    ev = COCOeval(gt, gt.loadRes([row(o, i, j) | dict(score=float(o["scores"][j])) for i, o in enumerate(said) for j in range(12)]), "bbox")
    ev.params.iouThrs, ev.params.areaRng, ev.params.areaRngLbl = np.array([.5]), [[0, 1e10]], ["all"]
    ev.evaluate()
    theirs = np.zeros(3, int)   # found, false, in a crowd
    for e in filter(None, ev.evalImgs):
        matched, ignored = e["dtMatches"][0] > 0, e["dtIgnore"][0].astype(bool)
        theirs += [(matched & ~ignored).sum(), (~matched).sum(), (matched & ignored).sum()]
    ours = np.zeros(3, int)
    for s, t in zip(said, truth):
        s, t = as_objects(s, 3), as_objects(t, 3)
        of_said, of_truth = match_objects(s, t)
        ours += [(of_said >= 0).sum(), (of_said == MISSED).sum(), (of_said == CROWD).sum()]
        assert (of_said >= 0).sum() == (of_truth >= 0).sum() and (of_truth == CROWD).sum() == t["iscrowd"].sum()
        assert all(of_truth[m] == i for i, m in enumerate(of_said) if m >= 0)
    assert min(ours) > 20 and ours.tolist() == theirs.tolist()


def test_detect_matching_of_surer_detections_is_a_part_of_that_of_all():
    rng = np.random.default_rng(2)
    t = as_objects(some(rng, 20), 3)
    s = as_objects(jittered(rng, t, 40), 3)
    every, _ = match_objects(s, t)
    sure = s["scores"] >= .6
    some_, _ = match_objects({k: v[sure] for k, v in s.items()}, t)
    assert some_.tolist() == every[sure].tolist() and (some_ >= 0).any()


@pytest.mark.parametrize("bad, words", [
    (dict(labels=[0]), "labels 1 to 2, got 0"), (dict(labels=[3]), "labels 1 to 2, got 3"), (dict(scores=[.1, .2]), "expected 1 scores"),
    (dict(labels=[1, 2]), "expected 1 labels"), (dict(masks=np.zeros((2, 4, 4))), "expected 1 masks")])
def test_detect_objects_that_cannot_be_meant_are_named(bad, words):
    with pytest.raises(BadInput, match=f"^said: .*{words}"): as_objects(dict(boxes=[[0, 0, 2, 2]], labels=[1]) | bad, 2, "said")
    with pytest.raises(BadInput, match="^truth: expected a dictionary with boxes"): as_objects([1, 2], 2, "truth")


def test_detect_objects_come_as_tensors_of_any_kind():
    o = as_objects(dict(boxes=torch.ones(2, 4, dtype=torch.bfloat16, requires_grad=True), labels=torch.tensor([1, 2]),
                        scores=torch.tensor([.5, .25], dtype=torch.float16), masks=torch.tensor([.4, .6]).view(2, 1, 1, 1)), 2)
    assert o["scores"].tolist() == [.5, .25] and o["masks"].tolist() == [[[False]], [[True]]] and not o["iscrowd"].any()
    assert as_objects(dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0)), 2)["boxes"].shape == (0, 4)


# Figures

def test_detect_outline_ends_where_pixels_end_and_knows_holes():
    mask = np.zeros((20, 30), bool)
    mask[3:15, 4:26], mask[6:10, 10:20] = True, False
    outer, inner = sorted(outline(mask), key=len, reverse=True)
    assert outer.min(0).tolist() == [4, 3] and outer.max(0).tolist() == [26, 15]
    assert inner.min(0).tolist() == [10, 6] and inner.max(0).tolist() == [20, 10]
    def area(line): return .5 * np.sum(line[:-1, 0] * line[1:, 1] - line[1:, 0] * line[:-1, 1])   # signed
    assert abs(area(outer) + area(inner)) == pytest.approx(mask.sum(), abs=1.1) and area(outer) * area(inner) < 0   # cut corners
    assert outline(np.zeros((4, 4), bool)) == [] and len(outline(np.ones((4, 4), bool))) == 1


def test_detect_names_cover_no_other_and_stay_inside():
    rng = np.random.default_rng(3)
    boxes, widths = some(rng, 60, 100, 160)["boxes"], rng.uniform(10, 40, 60)
    places = place_names(boxes, widths, 8, (160, 100))
    plates = np.array([(x, y, x + w, y + 8) for (x, y), w in ((at, w) for at, w in zip(places, widths) if at)])
    assert 10 < len(plates) < 60 and places[0]
    assert plates[:, :2].min() >= 0 and plates[:, 2].max() <= 160 and plates[:, 3].max() <= 100
    np.testing.assert_allclose(box_overlap(plates, plates)[~np.eye(len(plates), dtype=bool)], 0, atol=1e-12)
    hidden = box_overlap(boxes, plates, np.ones(len(plates), bool))   # shares of boxes under names
    own = [i for i, at in enumerate(places) if at]
    hidden[own, np.arange(len(own))] = 0
    assert .3 < hidden.max() <= .5
    small = [[10, 20, 70, 60], [30, 12, 38, 19]]   # the name of the first would hide the second, above it or in it
    assert place_names(small, [30, 9], 9, (200, 62))[0] == (40, 11) and place_names(small[:1], [30], 9, (200, 62))[0] == (10, 11)


def lines_of(ax):
    "Of each box what its line says, whatever its colour."
    says = {style: "solid" if style == "-" else state for state, (style, _) in STATES.items()}
    return sorted(says[p.get_linestyle()] for p in ax.patches if isinstance(p, matplotlib.patches.Rectangle) and not p.get_fill())


def test_detect_figure_marks_hits_misses_and_false_alarms_by_lines_and_signs():
    truth = dict(boxes=[[2, 2, 20, 20], [40, 10, 60, 40]], labels=[1, 2])
    said = dict(boxes=[[3, 2, 20, 21], [60, 40, 78, 58]], labels=[1, 3], scores=[.9, .7])
    fig = show_objects([np.zeros((60, 80, 3), np.uint8)], [said], VOCAB, [truth])
    first, second = fig.axes
    assert [ax.get_title() for ax in fig.axes] == ["truth", "prediction"]
    assert lines_of(first) == ["solid"] * 2 and lines_of(second) == ["false", "missed", "solid"]
    assert {t.get_text() for t in first.texts} == {"$disc$", "NA"}
    assert {t.get_text() for t in second.texts} == {"✓ $disc$ 0.90", "+ <b> 0.70", "− NA"}
    words = [t.get_text().strip("\u200b") for t in fig.legends[0].get_texts()]
    assert words == [*VOCAB, "✓ found", "− missed", "+ false alarm"] and not any(t.get_parse_math() for t in fig.legends[0].get_texts())
    fig.savefig("/dev/null", format="png")   # names are no formulas


def test_detect_figure_shows_only_what_is_sure_and_says_where_nothing_is():
    images = torch.rand(2, 1, 20, 30)
    said = [dict(boxes=[[1, 1, 9, 9]], labels=[1], scores=[.4]), dict(boxes=[[1, 1, 9, 9]], labels=[1], scores=[.6])]
    fig = show_objects(images, said, ["thing"], titles=["a $x$", "b"])
    assert [ax.get_title() for ax in fig.axes] == ["a $x$: nothing", "b"]
    assert [len(lines_of(ax)) for ax in fig.axes] == [0, 1] and [t.get_text() for t in fig.axes[1].texts] == ["0.60"]   # one class: no name
    assert all(len(lines_of(ax)) for ax in show_objects(images, said, ["thing"], score=.1).axes)
    np.testing.assert_allclose(fig.axes[0].images[0].get_array()[..., 0], images[0, 0])   # not stretched


def test_detect_figure_of_many_objects_and_of_odd_pictures():
    rng = np.random.default_rng(4)
    fig = show_objects([np.zeros((60, 80, 3), np.uint8)], [some(rng, 600)], VOCAB, [some(rng, 300)], score=0)
    assert not fig.axes[1].texts and len(lines_of(fig.axes[0])) == 300 and len(lines_of(fig.axes[1])) >= 600
    sizes = (60, 4000), (300, 20), (1, 1)
    fig = show_objects([np.zeros((*s, 3), np.uint8) for s in sizes], [some(rng, n, *s, masks=True) for n, s in zip((3, 2, 0), sizes)], VOCAB)
    assert fig.get_figheight() < 12 and len(fig.axes) == 3
    fig.savefig("/dev/null", format="png")


@pytest.mark.parametrize("asked, words", [
    (dict(images=[]), "images: there is no picture"), (dict(said=None), "said: there are no objects"),
    (dict(said=[]), "said: expected the objects of each of 1"), (dict(vocab=[]), "said: expected labels 1 to 0")])
def test_detect_show_objects_says_what_is_wrong(asked, words):
    with pytest.raises(BadInput, match=f"^{words}"):
        show_objects(**dict(images=[np.zeros((9, 9, 3), np.uint8)], said=[dict(boxes=[[0, 0, 4, 4]], labels=[1])], vocab=["a"]) | asked)


def test_detect_curves_are_means_over_runs():
    def table(p): return pd.DataFrame({"class": ["", "", "a", "a", "b", "b"], "recall": [0, 1] * 3, "precision": [1, p, 1, p / 2, 1, 3 * p / 2]})
    ax = curves_figure({"": [table(.2), table(.4)]}).axes[0]
    lines = {line.get_label().strip("\u200b"): line.get_ydata() for line in ax.lines}
    np.testing.assert_allclose(lines["mean"], [100, 30])
    np.testing.assert_allclose(lines["a"], [100, 15])
    only = curves_figure({"": [pd.concat([table(.2)[2:4].assign(**{"class": c}) for c in ("", "a")])]}).axes[0]   # the mean of one class is its own
    assert [line.get_label().strip("\u200b") for line in only.lines] == ["a"]
    ax = curves_figure({"_x": [table(.2)], "$y$": [table(.4)]}).axes[0]   # of several only the means, by colour and dashes
    assert len(ax.lines) == 2 and len({str(line._dash_pattern) for line in ax.lines}) == 2 == len(ax.get_legend().get_texts())
    with pytest.raises(BadInput, match="^tables: there is none"): curves_figure({})


# Pages

def arrays_of(rng, sizes=((60, 80), (40, 50)), masks=True):
    "What a run leaves: pictures in the corner of arrays for the largest, tables, packed masks."
    truth = [some(rng, 4, *s, masks=True) for s in sizes]
    said = [jittered(rng, t, 7) | dict(boxes=t["boxes"][[0, 0, 1, 1, 2, 2, 2]]) for t in truth]
    h, w = np.max(sizes, 0)
    def rows(each, *names): return np.concatenate([np.column_stack([np.full(len(o["labels"]), i), *(o[k] for k in names), o["boxes"]])
                                                   for i, o in enumerate(each)]).astype(np.float32)
    def packed(each): return np.packbits(np.concatenate([np.pad(o["masks"], ((0, 0), (0, h - s[0]), (0, w - s[1]))) for o, s in zip(each, sizes)]), axis=-1)
    out = dict(images=rng.integers(0, 255, (len(sizes), h, w, 3), dtype=np.uint8), sizes=np.array(sizes), vocab=np.array(VOCAB),
               truth=rows(truth, "labels"), said=rows(said, "labels", "scores"))
    return out | (dict(truth_masks=packed(truth), said_masks=packed(said)) if masks else {}), truth, said


def test_detect_arrays_of_a_run_come_back_as_they_were():
    arrays, truth, said = arrays_of(np.random.default_rng(5))
    its = read_objects(arrays, "one")
    assert [im.size for im in its.shown] == [(80, 60), (50, 40)] and its.vocab == VOCAB and its.name == "one"
    for kind, each in dict(truth=truth, said=said).items():
        for a, b in zip(getattr(its, kind), each):
            np.testing.assert_allclose(a["boxes"], b["boxes"], rtol=1e-6)
            assert a["labels"].tolist() == b["labels"].tolist() and (a["masks"] == b["masks"]).all() and a["masks"].any()
    np.testing.assert_allclose(its.said[1]["scores"], said[1]["scores"], rtol=1e-6)
    assert "masks" not in read_objects(arrays_of(np.random.default_rng(5), masks=False)[0]).said[0]


def counts_of(text):
    "What captions of predictions say, as numbers by word."
    told = re.findall(r"prediction: <span>(.*?)</span>", text)
    return [dict((w.removesuffix("s"), int(n)) for n, w in re.findall(r"(\d+) (found|missed|false alarms?|objects?)", t)) for t in told]


@pytest.mark.parametrize("score", [.05, .5, .9, 1.])
def test_detect_page_counts_what_is_matched_at_any_score(score):
    look = read_objects(arrays_of(np.random.default_rng(6))[0])
    text = objects_html([look], score=score)
    for told, s, t in zip(counts_of(text), look.said, look.truth):
        of_said, of_truth = match_objects({k: v[s["scores"] >= score] for k, v in s.items()}, t)
        expected = dict(found=(of_said >= 0).sum(), missed=(of_truth == MISSED).sum(), **{"false alarm": (of_said == MISSED).sum()})
        assert told == {k: v for k, v in expected.items() if v}
    assert "&lt;b&gt;" in text and "<b>\n" not in text and "<li class=\"k3\"><i></i><b>" not in text
    assert text.count("<path") >= 8 and 'name="masks"' in text


def test_detect_page_of_photos_has_no_truth_and_says_nothing_found():
    none = as_objects(dict(boxes=np.zeros((0, 4)), labels=[], scores=[]), 3)
    one = as_objects(dict(boxes=[[1, 1, 9, 9]] * 2, labels=[1, 3], scores=[.9, .1]), 3)
    text = objects_html([Finds(VOCAB, [Image.new("RGB", (20, 10))] * 2, ["<i>.jpg", "b.jpg"], [none, one])])
    assert re.findall(r"<figcaption>prediction: <span>(.*?)</span>", text) == ["nothing", "1 object"]
    assert "&lt;i&gt;.jpg" in text and "<i>.jpg" not in text and 'value="truth"' not in text and 'name="masks"' not in text
    assert 'value="said"' not in text and "side by side" not in text   # beside a prediction alone stands nothing
    at = objects_html([Finds(VOCAB, [Image.new("RGB", (240, 160))], [""], [as_objects(dict(boxes=[[60, 40, 90, 80], [200, 0, 240, 30]], labels=[2, 1]), 3)])])
    assert sorted(re.findall(r'<b [^>]*style="(.*?)"', at)) == ["left:25.0%;bottom:75.0%", "right:0.0%;top:18.8%"]   # at their boxes at any width
    only = objects_html([Finds(["cell"], [Image.new("RGB", (90, 90))], [""], [one | dict(labels=np.array([1, 1]))])])
    assert re.findall(r'data-name="(.*?)"', only) == ["cell 0.90", "cell 0.10"] and "cell" not in "".join(re.findall(r"<b .*?</b>", only, re.S))
    assert 'aria-label="b.jpg: prediction"' in text and text.count(" hidden>\n") >= 1


def test_detect_pages_of_two_networks_stand_side_by_side_if_they_show_the_same():
    a, b = (read_objects(arrays_of(np.random.default_rng(7))[0], name) for name in ("one", "<two>"))
    text = objects_html([a, b])
    assert "one: prediction" in text and "&lt;two&gt;: prediction" in text and text.count('class="truth"') == 2
    with pytest.raises(BadInput, match="other pictures"): objects_html([a, replace(b, names=["x", "y"])])
    with pytest.raises(BadInput, match="other classes"): objects_html([a, replace(b, vocab=["a", "b", "c"])])


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_detect_page_matches_anew_when_the_score_is_moved(tmp_path):
    from attnpool.maps.objects import OBJECTS_SCRIPT, OBJECTS_STYLE
    from attnpool.maps.page import html_page
    look = read_objects(arrays_of(np.random.default_rng(8))[0])
    at_half, at_nine = (objects_html([look], score=s) for s in (.5, .9))
    moved = at_half.replace('value="0.50"', 'value="0.90"')   # as if the slider had been moved: the script reads it
    assert moved != at_half and counts_of(at_half) != counts_of(at_nine)
    (tmp_path / "p.html").write_text(html_page("p", "{{ p|safe }}", OBJECTS_STYLE, OBJECTS_SCRIPT, p=moved))
    dom = subprocess.run(["chromium", "--headless", "--no-sandbox", "--dump-dom", (tmp_path / "p.html").as_uri()], capture_output=True, text=True,
                         timeout=60).stdout
    assert counts_of(dom) == counts_of(at_nine) and "<output>0.90</output>" in dom and '<label class="score">' in dom


# Runs

def a_scene(rng, h=40, w=56):
    "A picture of bright rectangles, and what COCO would say of them."
    image, its = rng.integers(0, 60, (h, w, 3), dtype=np.uint8), []
    for k in rng.integers(1, 4, 2):
        x, y, a, b = int(rng.integers(0, w - 20)), int(rng.integers(0, h - 18)), int(rng.integers(10, 20)), int(rng.integers(10, 18))
        image[y:y + b, x:x + a, k - 1] = 230
        its.append(dict(category_id=int(k), bbox=[x, y, a, b], area=a * b, iscrowd=0, segmentation=[[x, y, x + a, y, x + a, y + b, x, y + b]]))
    return Image.fromarray(image), its


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A folder in COCO's form, photos, and runs: a classification, and detections from scratch and from it; they say all they can."
    root, rng = tmp_path_factory.mktemp("detect"), np.random.default_rng(0)
    (root / "shapes").mkdir()
    said = dict(images=[], annotations=[], categories=[dict(id=i + 1, name=name) for i, name in enumerate(VOCAB)])
    for i in range(10):
        image, its = a_scene(rng)
        image.save(root / "shapes" / f"{i}.png")
        said["images"].append(dict(id=i, file_name=f"{i}.png", width=56, height=40))
        said["annotations"] += [o | dict(id=len(said["annotations"]) + j, image_id=i) for j, o in enumerate(its)]
    (root / "shapes" / "boxes.json").write_text(json.dumps(said))
    for name in ("red", "blue"):
        (root / "photos" / name).mkdir(parents=True)
        for i in range(6): a_scene(rng)[0].save(root / "photos" / name / f"{i}.png")
    (root / "own").mkdir()
    a_scene(rng, 90, 200)[0].save(root / "own" / "<i>.png")
    exif = Image.Exif()
    exif[274] = 6   # taken with the camera on its side
    a_scene(rng, 60, 100)[0].transpose(Image.Transpose.ROTATE_90).save(root / "own" / "turned.jpg", exif=exif)
    first = run(make_spec(root / "photos", "avg", epochs=1, size=32, bs=4), root / "first", "cpu")
    how = dict(task="detect", epochs=1, steps=None, size=32, bs=4, options=dict(channels=16, box_channels=16, mask_layers=(8,), score=0.))
    for start in ("", first.folder):
        for seed in (1, 2)[:2 if not start else 1]: run(make_spec(root / "shapes", seed=seed, start=start, **how), root / "runs", "cpu")
    return root


@pytest.fixture(scope="module")
def results(here):
    found, problems = collect([here / "runs"])
    assert not problems and len(found) == 3
    return found


def a_run(here): return next(r.folder for r in collect([here / "runs"])[0] if r.spec.seed == 1 and not r.spec.start)


@pytest.fixture(scope="module")
def learn(here): return open_run(a_run(here), "cpu", with_data=False)


def test_detect_photos_are_turned_upright_and_boxes_are_in_their_pixels(here, learn, tmp_path):
    assert is_detector(learn) and not is_detector(open_run(next((here / "first").glob("photos-*")), "cpu", with_data=False))
    page, picture, table, counts = objects_page(learn, tmp_path / "m.html", here / "own", score=0)
    found = pd.read_csv(table)
    assert (table.name, picture.name) == ("m-objects.csv", "m-objects.png") and {*found.picture} == {"<i>.png", "turned.jpg"}
    assert dict(counts) == found.groupby("picture").score.count().to_dict() and found.score.between(0, 1).all()
    for name, (w, h) in {"<i>.png": (200, 90), "turned.jpg": (100, 60)}.items():
        its = found[found.picture == name]
        assert its.left.min() >= 0 and its.right.max() <= w + .1 and its.bottom.max() <= h + .1 and its.right.max() > .6 * w
    pixels = torch.tensor(np.array(Image.open(here / "own" / "<i>.png"))).permute(2, 0, 1) / 255
    with torch.no_grad(): said, = learn.model.eval()([pixels])
    np.testing.assert_allclose(found[found.picture == "<i>.png"][["left", "top", "right", "bottom"]], said["boxes"], atol=.051)
    text = page.read_text()
    assert "&lt;i&gt;.png" in text and "<i>.png" not in text and Image.open(picture).width > 300


def test_detect_large_photo_is_reduced_and_its_boxes_are_not(here, learn, tmp_path):
    Image.open(here / "own" / "<i>.png").resize((3000, 1350)).save(tmp_path / "large.png")
    one, = detect_pictures(learn, tmp_path / "large.png")
    assert one.image.width * one.image.height <= 1_001_000 and one.scale == pytest.approx(3000 / one.image.width)
    assert one.said["masks"].shape[1:] == one.image.size[::-1]
    page, _, table, _ = objects_page(learn, tmp_path / "m.html", tmp_path / "large.png", pixels=100, score=0)
    found = pd.read_csv(table)
    np.testing.assert_allclose(found.right, one.said["boxes"][:, 2] * one.scale, atol=.051)
    assert 'viewBox="0 0 100 45"' in page.read_text()


def test_detect_table_can_be_trained_on_and_a_second_does_not_replace_it(here, learn, tmp_path):
    shutil.copytree(here / "own", tmp_path / "mine")
    shutil.copy(here / "shapes" / "0.png", tmp_path / "mine")
    _, picture, table, _ = objects_page(learn, tmp_path / "m.html", tmp_path / "mine", score=0)
    before = table.read_bytes()
    _, again, other, counts = objects_page(learn, tmp_path / "m.html", tmp_path / "mine", score=1.)
    assert (other.name, again.name) == ("m-objects-2.csv", "m-objects-2.png") and table.read_bytes() == before
    assert pd.read_csv(other)["class"].isna().all() and [n for _, n in counts] == [0, 0, 0] and len(pd.read_csv(other)) == 3
    shutil.copy(table, tmp_path / "mine" / "boxes.csv")
    dls = objects_dls(tmp_path / "mine", size=32, bs=1, device="cpu", skip_broken=True)
    assert {*dls.vocab} <= {*VOCAB} and len(dls.train_ds) + len(dls.valid_ds) == 3
    with pytest.raises(BadInput, match="^score: expected 0 to 1, got 2"): objects_page(learn, tmp_path / "m.html", score=2)
    with pytest.raises(BadInput, match="not at hand"): objects_page(learn, tmp_path / "m.html")
    with pytest.raises(BadInput, match="is a picture"): objects_page(learn, tmp_path / "mine" / "0.png", tmp_path / "mine")


# Reports

def test_detect_report_compares_starts_and_has_a_floor(results):
    group, = group_by_setting(results)
    table = summarize(group)
    table = table.set_index(table["head"].str[:12])
    assert {*table.index} == {"from scratch", "from photos-"} and table.versus.iloc[0] == "from scratch"
    np.testing.assert_allclose(table.box_ap["from scratch"], np.mean([r.metrics["box_ap"] for r in results if not r.spec.start]))
    bounded = [replace(r, metrics=r.metrics | dict(floor=.1)) for r in group]
    text = format_table(summarize(bounded)).set_index("start")["AP of boxes %"]
    assert [v for name, v in text.items() if name.startswith("(floor: a box")] == ["10.0"]
    assert not any("pictures of" in line or "avg" in line for line in remarks(group))


def test_detect_report_tells_precisions_and_classes(results):
    scratch = [r for r in results if not r.spec.start]
    of = precisions(scratch).set_index("of")
    for kind in ("box", "mask"):
        values = [100 * r.metrics[f"{kind}_ap50"] for r in scratch]
        assert of.loc[f"{kind}es" if kind == "box" else "masks", "AP50"] == f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    assert not {"medium", "large"} & {*precisions([replace(r, metrics={"box_ap": .1}) for r in scratch])}
    classes = class_tables(results)
    read = [pd.read_csv(r.folder / "classes.csv", keep_default_na=False).set_index("class") for r in scratch]
    text = format_found({"": classes["from scratch"]}).set_index("class")
    assert {*text.index} == {*VOCAB} and [int(n) for n in text.objects] == sorted((int(n) for n in read[0].objects), reverse=True)
    found = [100 * float(t.loc["NA", "box_ap50"]) for t in read] if read[0].loc["NA", "box_ap50"] != "" else None
    assert text.loc["NA", "boxes AP50 %"] == (f"{np.mean(found):.1f} ± {np.std(found, ddof=1):.1f}" if found else "–")
    assert {*class_tables(scratch, "curves")["from scratch"][0]["class"]} >= {""}


def test_detect_report_is_one_page_with_pictures_curves_and_alt_texts(results, tmp_path):
    page = write_report(results, tmp_path / "r.html")
    text = page.read_text()
    assert "<title>Object detection on shapes</title>" in text and 'class="objects"' in text and "Precision over recall" in text
    assert "Average precision" in text and "AP of boxes" in text and "What they find" in text
    assert "Where they look" not in text and "IoU:" not in text and "each pixel" not in text
    assert all(re.search(r'alt="[^"]{8,}"', tag) for tag in re.findall(r"<img [^>]*?(?=src=)", text))
    assert text.count("(const objects of") == 1   # its script once
    parts = object_parts(results)
    assert len(parts["bars"]) == 2 and parts["many"] == 0 and parts["course"].startswith("data:")
    again, _ = collect([tmp_path / "r.runs.csv"])   # without folders: numbers alone
    text = write_report(again, tmp_path / "again.html").read_text()
    assert "What they find" not in text and "Class by class" not in text and "Average precision" in text


def test_detect_report_of_boxes_alone_has_no_masks(results):
    boxes = [replace(r, metrics={k: v for k, v in r.metrics.items() if "mask" not in k}, folder=None) for r in results]
    parts = object_parts(boxes)
    assert {*parts["measures"]["of"]} == {"boxes"} and parts["bars"] == [] and parts["classes"] is None and parts["objects"] == ""


# The command

def asked(*words): return CliRunner().invoke(app, ["maps", *map(str, words)])


def test_detect_maps_command(here, tmp_path):
    out = asked(a_run(here), here / "own", "--out", tmp_path / "m.html", "--device", "cpu", "--score", "0")
    assert out.exit_code == 0 and "m-objects.png" in out.output and "objects in 2 of 2 pictures" in out.output, out.output
    out = asked(a_run(here), here / "own" / "turned.jpg", "--out", tmp_path / "n.html", "--device", "cpu", "--score", "1")
    assert out.exit_code == 0 and "turned.jpg: nothing that is at least 1 sure" in out.output and "0 objects in 0 of 1" in out.output
    out = asked(a_run(here), "--out", tmp_path / "v.html", "--device", "cpu", "--n", "2")
    assert out.exit_code == 0 and "truth" in (tmp_path / "v.html").read_text(), out.output


@pytest.mark.parametrize("words, said", [
    (("--top", 5), "--top: every class is shown"), (("--classes", "NA"), "--classes: every class is shown"),
    (("--measure",), "finds objects, and has no maps to measure"), (("--score", "1.5"), "--score")])
def test_detect_maps_command_refuses_what_does_not_apply(here, tmp_path, words, said):
    out = asked(a_run(here), *words, "--out", tmp_path / "m.html")
    assert out.exit_code != 0 and not [*tmp_path.iterdir()]
    assert said in (str(out.exception) if isinstance(out.exception, BadInput) else out.output)


def test_detect_and_classification_are_not_shown_on_one_page(here, tmp_path):
    first = next((here / "first").glob("photos-*"))
    out = asked(a_run(here), first, here / "own", "--out", tmp_path / "m.html")
    assert out.exit_code != 0 and "finds objects" in (str(out.exception) + out.output) and not [*tmp_path.iterdir()]
    out = asked(first, here / "own", "--out", tmp_path / "m.html", "--score", ".3")
    assert out.exit_code != 0 and "--score: it is for networks that find objects" in (str(out.exception) + out.output)
    with pytest.raises((BadInput, ValueError)): maps_page(open_run(a_run(here), "cpu", with_data=False), tmp_path / "m.html", here / "own")
