"Pictures of segmentation: colours, masks as files, pages, reports, show_results, the command."
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
import torch.nn.functional as F
from fastai.vision.all import Learner, SegmentationInterpretation, TensorMask, load_learner
from PIL import Image
from typer.testing import CliRunner

from attnpool.cli import app
from attnpool.data.dense import dense_dls
from attnpool.dense import DenseLoss, dense_metrics
from attnpool.maps.areas import Areas, areas_html, areas_page, is_dense, read_areas, segment_pictures, Segmented
from attnpool.maps.masks import class_bars, class_colours, error_colours, mask_colours, mask_image, name_places, occurring, show_masks
from attnpool.maps.page import maps_page
from attnpool.masks import IGNORED
from attnpool.models.upernet import build_segmenter
from attnpool.registry import BadInput
from attnpool.report.collect import by_row, collect, group_by_setting
from attnpool.report.dense import class_tables, dense_parts, format_classes
from attnpool.report.page import write_report
from attnpool.report.stats import format_table, remarks, summarize
from attnpool.runs.spec import make_spec
from attnpool.runs.train import open_run, run

matplotlib.use("Agg")
SMALL = dict(channels=8, aux_channels=8)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def a_scene(rng, h=24, w=32):
    "A picture and its mask: a bright disc, perhaps a square, and a margin without labels."
    image, mask = rng.integers(0, 60, (h, w, 3), dtype=np.uint8), np.zeros((h, w), np.uint8)
    for k in (1, 2):
        top, left = rng.integers(0, h - 8), rng.integers(0, w - 10)
        mask[top:top + 8, left:left + 8], image[top:top + 8, left:left + 8, k] = k, 220
    mask[:, -2:] = IGNORED
    return Image.fromarray(image), Image.fromarray(mask)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A folder of pictures with masks, one of two classes, and runs: a classification, and segmentations from scratch and from it."
    root, rng = tmp_path_factory.mktemp("segment"), np.random.default_rng(0)
    for kind in ("images", "masks"): (root / "shapes" / kind).mkdir(parents=True)
    (root / "shapes" / "classes.txt").write_text("background\n$disc$\nNA\n")
    for i in range(12):
        for kind, im in zip(("images", "masks"), a_scene(rng)): im.save(root / "shapes" / kind / f"{i}.png")
    for name in ("red", "blue"):
        (root / "photos" / name).mkdir(parents=True)
        for i in range(6): a_scene(rng, 40, 50)[0].save(root / "photos" / name / f"{i}.png")
    a_scene(rng, 61, 143)[0].save(root / "wide.jpg")
    first = run(make_spec(root / "photos", "slim", epochs=1, size=32, bs=4), root / "first", "cpu")
    how = dict(task="segment", epochs=2, size=24, bs=4, options=SMALL)
    for start in ("", first.folder):
        for seed in (1, 2): run(make_spec(root / "shapes", seed=seed, start=start, **how), root / "runs", "cpu")
    return root


@pytest.fixture(scope="module")
def results(here):
    found, problems = collect([here / "runs"])
    assert not problems
    return found


def a_run(here): return next(r.folder for r in collect([here / "runs"])[0] if r.spec.seed == 1 and not r.spec.start)


# Colours

def lab(rgb):
    "CIE L*a*b* of linear light."
    xyz = rgb @ np.array([[.4124564, .3575761, .1804375], [.2126729, .7151522, .0721750], [.0193339, .1191920, .9503041]]).T
    f = xyz / np.array([.95047, 1, 1.08883])
    f = np.where(f > .008856, np.cbrt(f.clip(0)), 7.787 * f + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


# what is left of linear red, green, blue without one kind of receptor: Machado, Oliveira and Fernandes, 2009
LACKING = dict(none=np.eye(3),
               red=np.array([[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]]),
               green=np.array([[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]]))


@pytest.mark.parametrize("lacking", LACKING)
def test_segment_colours_of_eleven_classes_differ_for_colour_blind_eyes(lacking):
    v = np.vstack([class_colours(11), [[136] * 3]]) / 255
    linear = np.where(v <= .04045, v / 12.92, ((v + .055) / 1.055)**2.4)
    seen = lab((linear @ LACKING[lacking].T).clip(0, 1))
    apart = np.linalg.norm(seen[:, None] - seen[None], axis=-1)[~np.eye(12, dtype=bool)]
    assert apart.min() > 9   # 2.3 is just noticeable


def test_segment_colours_stay_with_their_class_and_none_is_taken_twice():
    many = class_colours(255)
    for n in (0, 1, 2, 11, 150): np.testing.assert_array_equal(class_colours(n), many[:n])
    assert len({tuple(c) for c in many} | {(136,) * 3}) == 256
    class_colours(3)[:] = 0
    assert class_colours(3).any()
    with pytest.raises(BadInput, match="^n: expected 0 to 255"): class_colours(256)


# Masks

def test_segment_mask_survives_a_file(tmp_path):
    mask = torch.arange(12).view(3, 4) % 5
    mask[0, 0] = IGNORED
    mask_image(mask, 5).save(tmp_path / "m.png")
    with Image.open(tmp_path / "m.png") as im:
        assert im.mode == "P" and np.asarray(im).tolist() == mask.tolist()
        assert np.asarray(im.convert("RGB"))[0, 1].tolist() == class_colours(5)[1].tolist()
    for bad, words in ((mask.float(), "whole numbers"), (mask[None], r"\(1, 3, 4\)"), (mask + 1, "classes 0 to 4"), (mask - 2, "got -")):
        with pytest.raises(BadInput, match=f"^mask: .*{words}"): mask_image(bad, 5)


def test_segment_errors_are_a_share_of_the_labelled_pixels():
    truth, said = torch.tensor([[0, 1, 2, IGNORED]]), torch.tensor([[0, 2, 2, 0]])
    colours, share = error_colours(truth, said)
    assert share == pytest.approx(1 / 3) and colours[0, 1].tolist() == [255, 225, 0, 235] and colours[0, 0].tolist() == colours[0, 2].tolist()
    assert np.isnan(error_colours(truth * 0 + IGNORED, said)[1])
    with pytest.raises(BadInput, match="^said: expected the shape"): error_colours(truth, said[:, :2])


def test_segment_background_is_left_clear_and_only_what_occurs_is_in_the_legend():
    mask, vocab = np.array([[0, 0, 2], [0, IGNORED, 2]]), ["background", "car", "$tree$"]
    over = mask_colours(mask, vocab)
    assert over[0, 0, 3] == 0 and over[0, 2, 3] == 153 and over[1, 1, 3] > 0
    assert [(k, name) for k, name, _ in occurring([mask], vocab)] == [(0, "background"), (2, "$tree$"), (IGNORED, "no label")]
    fig = show_masks([np.zeros((2, 3, 3), np.uint8)], [mask], vocab, [mask])
    assert [t.get_text().strip("\u200b") for t in fig.legends[0].get_texts()] == ["background", "$tree$", "no label"]
    assert [ax.get_title() for ax in fig.axes] == ["picture", "truth", "prediction", "0% wrong"]


@pytest.mark.parametrize("asked, words", [
    (dict(images=[]), "images: there is no picture"), (dict(said=None), "said: there is no mask"),
    (dict(said=[np.zeros((2, 2), int)] * 2), "said: expected a mask for each of 1"), (dict(vocab=["a"]), "said: expected classes 0 to 0")])
def test_segment_show_masks_says_what_is_wrong(asked, words):
    with pytest.raises(BadInput, match=f"^{words}"):
        show_masks(**dict(images=[np.zeros((2, 2, 3), np.uint8)], said=[np.ones((2, 2), int)], vocab=["a", "b"]) | asked)


def test_segment_bars_are_means_and_deviations_and_of_many_classes_the_extremes():
    def table(*iou): return pd.DataFrame({"class": [*map(str, range(len(iou)))], "iou": iou})
    ax = class_bars({"a": [table(.2, .5), table(.4, np.nan)]}).axes[0]
    np.testing.assert_allclose([b.get_width() for b in ax.patches], [50, 30])   # the best first
    assert [t.get_text() for t in ax.get_yticklabels()] == ["1", "0"] and "worst" not in ax.get_xlabel()
    assert len(class_bars({"a": [table(.2, np.nan)]}).axes[0].patches) == 1   # a class that is nowhere is no 0%
    ax = class_bars({"a": [table(*np.linspace(0, 1, 150))]}).axes[0]
    names = [t.get_text() for t in ax.get_yticklabels()]
    assert len(names) == 30 and names[0] == "149" and names[-1] == "0" and "15 worst of 150" in ax.get_xlabel()


def test_segment_names_stand_where_they_fit():
    mask = np.zeros((40, 60), int)
    mask[22:], mask[5:35, 50:56], mask[0, :3] = 1, 2, 3
    vocab = ["background", "grass", "tower", "speck"]
    (grass, *at), (tower, *there) = name_places(mask, vocab)   # neither the background nor what is too small
    assert (grass, tower) == ("grass", "tower") and mask[int(at[1] * 40), int(at[0] * 60)] == 1
    assert mask[int(there[1] * 40), int(there[0] * 60)] == 2 and there[2] < .11 < .5 < at[2]   # thin and high; wide
    assert name_places(np.full((4, 4), IGNORED), vocab) == []
    whole = np.zeros((9, 9), int)
    assert name_places(whole, ["sky"])[0][1:3] == pytest.approx((.5, .5))


def test_segment_figure_of_many_classes_has_names_on_areas_and_a_short_legend():
    mask, vocab = np.arange(48).repeat(2).reshape(8, 12).repeat(10, 0).repeat(10, 1), [f"c{i}" for i in range(150)]
    fig = show_masks([np.zeros((80, 120, 3), np.uint8)], [mask], vocab, cell=4)
    words = [t.get_text() for t in fig.legends[0].get_texts()]
    assert len(words) == 31 and "and 18 more" in words
    assert not fig.axes[0].texts and {t.get_text() for t in fig.axes[1].texts} == set(vocab[:48])
    assert not show_masks([np.zeros((80, 120, 3), np.uint8)], [mask % 11], vocab, cell=4).axes[1].texts


def test_segment_page_has_names_on_areas_and_shares_of_the_truth():
    truth, said = np.zeros((20, 40), np.uint8), np.ones((20, 40), np.uint8)
    truth[:, 30:] = 1
    text = areas_html([Areas(["<sky>", "road"], [Image.new("RGB", (40, 20))], [""], [said], [truth])])
    assert re.findall(r"(&lt;sky&gt;|road) <small>(\S+)</small>", text) == [("&lt;sky&gt;", "75.0%"), ("road", "25.0%")]
    assert re.findall(r"<b [^>]+>(.*?)</b>", text) == ["&lt;sky&gt;", "road", "road"]   # two of the truth, one that is said


# A Learner

def test_segment_learner_shows_results_in_one_set_of_colours(here):
    learn = open_run(a_run(here), "cpu")
    assert is_dense(learn)
    x, y = learn.dls.valid.one_batch()
    with learn.no_bar(): learn.show_results(max_n=2, shuffle=False)
    fig = plt.gcf()
    assert [ax.get_title() for ax in fig.axes[:3]] == ["picture", "truth", "prediction"] and len(fig.axes) == 8
    with torch.no_grad(): said = learn.model.eval()(x)[0].argmax(0)
    np.testing.assert_array_equal(fig.axes[1].images[1].get_array(), mask_colours(y[0], learn.dls.vocab))
    np.testing.assert_array_equal(fig.axes[2].images[1].get_array(), mask_colours(said, learn.dls.vocab))
    assert abs(np.asarray(fig.axes[0].images[0].get_array()).astype(float).mean() - 50) < 30   # neither dark nor washed out
    learn.dls.show_batch(max_n=2)
    assert [ax.get_title() for ax in plt.gcf().axes[:2]] == ["picture", "truth"]
    with pytest.raises(BadInput, match=r"learn.show_results\(\)"): learn.show_attention(n=2)


def test_segment_photo_of_any_size_is_enlarged_before_the_likeliest_class_is_taken(here):
    learn = open_run(a_run(here), "cpu")
    one, = segment_pictures(learn, here / "wide.jpg")
    assert one.image.size == (143, 61) and one.name == "wide.jpg" and one.p.shape == (3, 24, 56) and one.truth is None
    whole = F.interpolate(one.p[None], (61, 143), mode="bilinear").argmax(1)[0]
    np.testing.assert_array_equal(one.said(), whole)
    each = [*segment_pictures(learn, n=2)]
    assert len(each) == 2 and all(e.truth.shape == e.said().shape == (24, 32) for e in each)
    sharp = Segmented(Image.new("RGB", (8, 8)), "", torch.tensor([[[.9, .1]], [[.1, .9]]]))
    assert sharp.said()[0].tolist() == [0] * 4 + [1] * 4


def test_segment_page_lies_beside_masks_that_can_be_trained_on(here, tmp_path):
    learn = open_run(a_run(here), "cpu")
    shutil.copytree(here / "shapes" / "images", tmp_path / "own" / "images")
    page, picture, masks = areas_page(learn, tmp_path / "own" / "maps.html", sorted((tmp_path / "own" / "images").iterdir()))
    assert (masks.name, picture.name) == ("maps-masks", "maps-masks.png") and Image.open(picture).width > 400
    before = (masks / "3.png").read_bytes()
    again = areas_page(learn, page, tmp_path / "own" / "images" / "3.png")
    assert again[2].name == "maps-masks-2" and (masks / "3.png").read_bytes() == before == (again[2] / "3.png").read_bytes()
    for f in masks.glob("*.png"):   # mended by hand: so that every class is there
        values = np.array(Image.open(f))
        values[:2] = [[0], [1]]
        Image.fromarray(values).save(f)
    masks.rename(tmp_path / "own" / "masks")
    (tmp_path / "own" / "masks" / "classes.txt").rename(tmp_path / "own" / "classes.txt")
    shutil.rmtree(again[2])
    dls = dense_dls(tmp_path / "own", size=24, bs=2, device="cpu")
    assert dls.vocab == ["background", "$disc$", "NA"] and isinstance(dls.one_batch()[1], TensorMask)


def test_segment_pages_of_two_networks_stand_side_by_side_and_photos_of_one_name_apart(here, tmp_path):
    (tmp_path / "a").mkdir()
    shutil.copy(here / "wide.jpg", tmp_path / "a" / "wide.jpg")
    learners = {name: open_run(r.folder, "cpu") for name, r in zip(("one", "<two>"), collect([here / "runs"])[0])}
    page, _, masks = areas_page(learners, tmp_path / "m.html", [here / "wide.jpg", tmp_path / "a" / "wide.jpg"])
    assert sorted(str(f.relative_to(masks)) for f in masks.rglob("*.png")) == [
        f"{name}/wide{k}.png" for name in ("<two>", "one") for k in ("", "_2")]
    text = page.read_text()
    assert "one: prediction" in text and "&lt;two&gt;: prediction" in text and "<two>" not in text
    with pytest.raises(BadInput, match="other pictures"):
        looks = [Areas(["a"], [Image.new("RGB", (8, 8))], [n], [np.zeros((8, 8), np.uint8)]) for n in "xy"]
        areas_html(looks)
    with pytest.raises(BadInput, match="is a picture"): areas_page(learners, here / "wide.jpg")
    with pytest.raises(FileNotFoundError, match="^path: there is no folder"): areas_page(learners, tmp_path / "no" / "m.html")


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_segment_page_runs_its_script(here, tmp_path):
    page, *_ = areas_page(open_run(a_run(here), "cpu"), tmp_path / "m.html", n=1)
    dom = subprocess.run(["chromium", "--headless", "--no-sandbox", "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60).stdout
    assert '<label class="strength">' in dom and 'class="under"' in dom   # both the script's


def test_segment_arrays_of_several_sizes_are_cut_to_each():
    said = np.full((2, 6, 8), IGNORED, np.uint8)
    said[0], said[1, :4, :5] = 1, 0
    its = read_areas(dict(images=np.zeros((2, 6, 8, 3), np.uint8), truth=said, said=said, vocab=np.array(["a", "b"])))
    assert [im.size for im in its.shown] == [(8, 6), (5, 4)] and its.said[1].shape == (4, 5) and its.where is None


# As fastai's users have it

@pytest.fixture(scope="module")
def trained(here):
    "A plain fastai `Learner` of pictures with masks."
    dls = dense_dls(here / "shapes", size=24, bs=4, device="cpu")
    network = build_segmenter("xeca_resnext_tiny", len(dls.vocab), **SMALL)
    learn = Learner(dls, network.model, DenseLoss(), splitter=network.splitter, metrics=dense_metrics())
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1, 4e-3)
    return learn


def test_segment_fastai_learner_is_exported_and_says_the_same_of_photos_of_any_size(here, trained, tmp_path):
    trained.export(tmp_path / "m.pkl")
    loaded = load_learner(tmp_path / "m.pkl")
    for learn in (trained, loaded):
        with learn.no_bar(): mask, _, p = learn.predict(here / "wide.jpg")
        one, = segment_pictures(learn, here / "wide.jpg")
        assert mask.shape == one.p.shape[1:] == (24, 56) and (mask == p.argmax(0)).all()
        torch.testing.assert_close(p, one.p)
    shown = areas_page(loaded, tmp_path / "m.html", here / "wide.jpg")
    assert all(path.exists() for path in shown)


def test_segment_fastai_interpretation_finds_the_hardest_pictures(trained):
    with trained.no_bar():
        found = SegmentationInterpretation.from_learner(trained)
        losses, which = found.top_losses(2)
        mean = trained.validate()[0]
        found.show_results(which)
    assert len(found.losses) == len(trained.dls.valid_ds) and losses[0] == found.losses.max() > losses[1]
    assert abs(found.losses.mean().item() - mean) < 1e-4   # as many labelled pixels in each picture
    assert len(plt.gcf().axes) == 8 and trained.loss_func.reduction == "mean"


# Reports

def test_segment_report_compares_starts(results):
    group, = group_by_setting(results)
    rows = by_row(group)
    first, second = rows
    assert first == "from scratch" and second.startswith("from photos-slim-1-") and [len(r) for r in rows.values()] == [2, 2]
    table = summarize(group)
    values = {name: [r.metrics["miou"] for r in rs] for name, rs in rows.items()}
    np.testing.assert_allclose(table.miou, [np.mean(v) for v in values.values()])
    np.testing.assert_allclose(table.difference[1], np.subtract(values[second], values[first]).mean())
    text = format_table(table)
    assert list(text.columns[:3]) == ["start", "n", "mIoU %"] and "points vs from scratch [95%]" in text
    assert not any("avg" in line or "pictures of" in line for line in remarks(group)), remarks(group)
    assert any("Without runs from scratch" in line for line in remarks(rows[second] + [replace(r, spec=replace(
        r.spec, start=replace(r.spec.start, name="b", fingerprint="b"))) for r in rows[second]]))


def test_segment_report_has_floor_and_ceiling_where_they_are_known(results):
    bounded = [replace(r, metrics=r.metrics | dict(floor=.1, ceiling=.9)) for r in results]
    text = format_table(summarize(bounded)).set_index("start")["mIoU %"]
    assert [v for name, v in text.items() if name.startswith(("(floor", "(ceiling"))] == ["10.0", "90.0"]


def test_segment_report_tells_each_class(results):
    tables = class_tables(results)
    read = [pd.read_csv(r.folder / "classes.csv", keep_default_na=False) for r in results if not r.spec.start]
    text = format_classes({"": tables["from scratch"]}).set_index("class")
    iou = [float(t.set_index("class").iou["$disc$"]) * 100 for t in read]
    assert text.loc["$disc$", "IoU %"] == f"{np.mean(iou):.1f} ± {np.std(iou, ddof=1):.1f}" and {"background", "NA"} <= {*text.index}
    assert sum(text["pixels %"].astype(float)) == pytest.approx(100, abs=.2)


def test_segment_report_folds_a_long_table_of_classes(results, tmp_path):
    shutil.copytree(results[0].folder, tmp_path / "a")
    table = pd.DataFrame({"class": [f"c{i}" for i in range(150)], "iou": .5, "accuracy": .5, "pixels": 9, "predicted": 9})
    table.loc[0, ["iou", "accuracy"]] = np.nan
    table.to_csv(tmp_path / "a" / "classes.csv", index=False)
    one = [replace(results[0], folder=tmp_path / "a")]
    text = write_report(one, tmp_path / "r.html").read_text()
    assert "<summary>All 150 classes</summary>" in text and dense_parts(results)["many"] == 0
    assert dense_parts(one)["classes"].set_index("class").loc["c0", "IoU %"] == "–"


def test_segment_report_is_one_page_with_pictures(here, results, tmp_path):
    page = write_report(results, tmp_path / "r.html")
    text = page.read_text()
    assert "<title>Segmentation on shapes</title>" in text and "Class by class" in text and 'class="areas"' in text
    assert "where photos-slim-1-" in text   # the head of the run that training began from
    assert "for each head" not in text and "Where they look" not in text
    again, _ = collect([tmp_path / "r.runs.csv"])   # without folders: no classes, no pictures
    text = write_report(again, tmp_path / "again.html").read_text()
    assert "Class by class" not in text and re.search(r"from scratch", text)


# The command

def asked(*words): return CliRunner().invoke(app, ["maps", *map(str, words)])


def test_segment_maps_command(here, tmp_path):
    out = asked(a_run(here), here / "wide.jpg", "--out", tmp_path / "m.html", "--device", "cpu")
    assert out.exit_code == 0 and "m-masks.png" in out.output and (tmp_path / "m.html").exists(), out.output
    assert Image.open(tmp_path / "m-masks" / "wide.png").size == (143, 61)


@pytest.mark.parametrize("words, said", [
    (("--top", 5), "--top: every class is shown"), (("--classes", "NA"), "--classes: every class is shown"), (("--measure",), "has no maps to measure")])
def test_segment_maps_command_refuses_what_does_not_apply(here, tmp_path, words, said):
    out = asked(a_run(here), *words, "--out", tmp_path / "m.html")
    assert out.exit_code != 0 and not [*tmp_path.iterdir()]
    assert said in (str(out.exception) if isinstance(out.exception, BadInput) else out.output)


def test_segment_and_classification_are_not_shown_on_one_page(here, tmp_path):
    first = next((here / "first").glob("photos-*"))
    out = asked(a_run(here), first, here / "wide.jpg", "--out", tmp_path / "m.html")
    assert out.exit_code != 0 and "says a class for each pixel" in (str(out.exception) + out.output) and not [*tmp_path.iterdir()]
    with pytest.raises(BadInput, match="maps RUN PHOTO"): maps_page(open_run(a_run(here), "cpu"), tmp_path / "m.html")
