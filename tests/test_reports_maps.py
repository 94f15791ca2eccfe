"Maps from any Learner: its own validation pipeline, its own loss, after an export, with any names; and from any network."
import base64
import html
import io
import json
import re
import subprocess
import sys
from contextlib import contextmanager
from functools import partial

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.losses import BaseLoss
from fastai.vision.all import (
    aug_transforms, BCEWithLogitsLossFlat, CategoryBlock, CrossEntropyLossFlat, DataBlock, DataLoaders, Datasets, get_image_files, ImageBlock, IntToFloatTensor,
    ImageDataLoaders, imagenet_stats, Learner, load_learner, MSELossFlat, MultiCategoryBlock, Normalize, parent_label, PILImage, PILImageBW,
    PointBlock, RandomResizedCrop, RandomSplitter, RegressionBlock, Resize, ResizeMethod, ToTensor, vision_learner)
from PIL import Image
from torch import nn

from attnpool.data import get_dls
from attnpool.data.digits import digits_dls
from attnpool.heads import AvgPoolHead, AvgStartAttnPoolHead, ClassQueryPoolHead
from attnpool.maps.compute import class_activation_map, grad_cam, maps_of
from attnpool.maps.draw import captions, Reading, show_heads, show_maps
from attnpool.maps.learner import open_pictures, pictures_of
from attnpool.maps.page import class_index, maps_page
from attnpool.pooling.peers import PEERS
from attnpool.registry import BadInput

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Three classes of eight pictures, not square, larger than what the networks take."
    root, rng = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    for k, name in enumerate(("blue", "green", "red")):
        (root / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 120, (40 + 4 * i, 60, 3), dtype=np.uint8)
            pixels[..., 2 - k] += 120
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def network(n_out, head=AvgPoolHead, channels=3):
    body = nn.Sequential(nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
    return nn.Sequential(body, head(16, n_out))


def titles(figure): return [ax.get_title().removesuffix("\nlooks everywhere") for ax in figure.axes if len(ax.images) > 1]


def buttons(page):
    entry = '<(?:button type="button" class="pick"|div class="plain").*?>([^<]*)<span>(.*?)</span>'
    return [re.findall(entry, card) for card in page.read_text().split("<article")[1:]]


def mapped(page):
    "How many maps each picture of a page has: for all that is said, and for classes."
    return [part["n"] for part in json.loads(re.search('<script type="application/json">(.*?)</script>', page.read_text(), re.S)[1])["runs"][0]["parts"]]


@contextmanager
def inputs(model):
    "What a network receives, picture by picture, while the block runs."
    seen = []
    handle = model.register_forward_pre_hook(lambda m, args: seen.extend(args[0].detach().clone().as_subclass(torch.Tensor)))
    yield seen
    handle.remove()


def from_frame(photos):
    frame = pd.DataFrame([(str(f.relative_to(photos)), f.parent.name) for f in get_image_files(photos)], columns=["name", "label"])
    return ImageDataLoaders.from_df(frame, photos, fn_col="name", label_col="label", item_tfms=Resize(32), bs=8, num_workers=0)


def block(photos, blocks=(ImageBlock, CategoryBlock), get_y=parent_label, item_tfms=Resize(32), **kwargs):
    return DataBlock(blocks, get_items=get_image_files, splitter=RandomSplitter(seed=0), get_y=get_y, item_tfms=item_tfms,
                     **kwargs).dataloaders(photos, bs=8, num_workers=0, device="cpu")


from_folder = partial(ImageDataLoaders.from_folder, valid_pct=.25, seed=0, bs=8, num_workers=0, device="cpu")
PIPELINES = dict(
    crop=lambda p: from_folder(p, item_tfms=Resize(32)),
    squish=lambda p: from_folder(p, item_tfms=Resize((24, 40), ResizeMethod.Squish), batch_tfms=[*aug_transforms(size=20), Normalize.from_stats(*imagenet_stats)]),
    padded=lambda p: from_folder(p, item_tfms=Resize(32, ResizeMethod.Pad)),
    random=lambda p: from_folder(p, item_tfms=RandomResizedCrop(32, min_scale=.3), batch_tfms=aug_transforms()),
    frame=from_frame,
    block=block,
    grey=lambda p: block(p, (ImageBlock(PILImageBW), CategoryBlock)),
    alone=lambda p: DataLoaders(block(p).train, device="cpu"),
    ours=lambda p: get_dls(p, 32, 8, "cpu", cache=p.parent / "cache"),
    uncached=lambda p: get_dls(p, 32, 8, "cpu", augment="light", cache=p.parent / "cache", cache_gb=0))


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_maps_see_what_predict_and_validation_see(photos, pipeline):
    dls = PIPELINES[pipeline](photos)
    model, files = network(3, channels=1 if pipeline == "grey" else 3), sorted(get_image_files(photos))[::5]
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat())
    with inputs(learn.model) as shown, plt.rc_context(): said = titles(learn.show_attention(files))
    with learn.no_bar():
        if pipeline != "alone":
            with inputs(learn.model) as predicted: answers = [learn.predict(f) for f in files]
            assert all(map(torch.equal, shown, predicted)) and len(shown) == 2 * len(files)
            assert said == [f"{c} {p.max():.0%}" for c, _, p in answers]
    with inputs(learn.model) as one: learn.show_attention(str(files[0]))
    assert torch.equal(one[0], shown[0])
    if pipeline in ("crop", "ours", "uncached"):
        n = len(dls.valid_ds)
        with inputs(learn.model) as seen: learn.show_attention(n=n)
        own = dls.valid_ds.items if pipeline == "crop" else [dls.listing.root / f for f in dls.listing.files[-n:]]
        with inputs(learn.model) as again: learn.show_attention(own)
        with learn.no_bar(), learn.no_logging(), inputs(learn.model) as validated: learn.validate()
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(seen, again, validated)) and len(validated) == n


def test_what_is_shown_is_what_the_network_got(photos):
    file = sorted(get_image_files(photos))[0]
    upright = np.asarray(Resize(32)(PILImage.create(file), split_idx=1))
    for tfms in (None, [Normalize.from_stats(*imagenet_stats)]):
        learn = Learner(block(photos, batch_tfms=tfms), network(3))
        its, whole = pictures_of(learn, file), np.asarray(PILImage.create(file))
        assert np.array_equal(its.shown[0], whole) and its.labels is its.boxes is None
        seen = torch.from_numpy(upright).permute(2, 0, 1)[None] / 255
        assert (its.x - seen).abs().max() < 1e-6 if tfms is None else its.x.min() < -1
        drawn = next(ax for ax in learn.show_attention(file).axes if ax.images).images[0].get_array()
        assert np.array_equal(drawn, whole)
        page = maps_page(learn, photos.parent / "shown.html", file).read_text()
        pixels = Image.open(io.BytesIO(base64.b64decode(re.search('src="data:image/webp;base64,(.*?)"', page)[1]))).convert("RGB")
        assert np.array_equal(pixels, PILImage.create(file))   # the original: a small one is exact


LOADED = """
import re, sys
from fastai.vision.all import load_learner
import matplotlib; matplotlib.use("Agg")
import attnpool.all
from attnpool.maps.page import maps_page
def titles(figure): return [ax.get_title().removesuffix("\\nlooks everywhere") for ax in figure.axes if len(ax.images) > 1]
for name in sys.argv[1:]:
    learn = load_learner(name)
    for files in ("q.png", ["q.png", "folder"], "folder"): print(titles(learn.show_attention(files)))
    page = maps_page(learn, "maps.html", ["q.png", "folder"], classes=["red"])
    print(re.findall('class="(?:pick" data-map="[0-9]+|plain)">([^<]*)<span>(.*?)</span>', page.read_text()))
    for f in (learn.show_attention, lambda: maps_page(learn, "maps.html")):
        try: f()
        except ValueError as e: print(type(e).__name__, str(e)[:36])
"""


def test_exported_learners_show_maps_in_another_process(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files, expected = sorted(get_image_files(photos)), []
    (tmp_path / "folder").mkdir()
    for i, f in enumerate(files[8:11]): Image.open(f).save(tmp_path / "folder" / f"{i}.png")
    Image.open(files[0]).save("q.png")
    for pipeline, head in (("squish", AvgPoolHead), ("ours", AvgStartAttnPoolHead)):
        learn = Learner(PIPELINES[pipeline](photos), network(3, head), path=".")
        learn.export(f"{pipeline}.pkl")
        said = titles(learn.show_attention(["q.png", "folder"]))
        shown = buttons(maps_page(learn, "here.html", ["q.png", "folder"], classes=["red"]))
        expected += [said[:1], said, said[1:], sum(shown, []), *["BadInput dls: it holds no validation pictures"] * 2]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", LOADED, "squish.pkl", "ours.pkl"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == list(map(str, expected))


def test_files_are_given_in_any_form(photos, tmpdir):
    learn, file = Learner(block(photos), network(3)), sorted(get_image_files(photos))[0]
    Image.open(file).save(str(tmpdir / "a.png"))
    x = pictures_of(learn, file).x
    for files in (str(file), [file], (str(file),), get_image_files(photos).sorted()[:1], iter([file]), np.array([str(file)]).tolist(), tmpdir, tmpdir / "a.png"):
        assert torch.equal(pictures_of(learn, files).x, x)


def test_digits_learners_take_files_loaded_ones_too(tmp_path):
    Image.new("L", (60, 40), 200).save(tmp_path / "a.png")
    learn = Learner(digits_dls(40, n_train=64, n_valid=16, device="cpu"), network(10), path=tmp_path)
    learn.export("learner.pkl")
    said = titles(learn.show_attention(tmp_path / "a.png"))
    assert titles(load_learner(tmp_path / "learner.pkl").show_attention(tmp_path)) == said
    its = pictures_of(learn, tmp_path)
    assert its.x.shape == (1, 3, 40, 40) and its.shown[0].getcolors() == [(1600, (200,) * 3)]   # as these data read it
    assert its.crops.tolist() == [[0, 0, 40, 40]] and its.names == ["a.png"]
    with learn.no_bar(): assert str(learn.predict(tmp_path / "a.png")[0]) == said[0].split()[0]


def test_loaders_of_plain_torch(photos):
    pairs = [(torch.rand(3, 32, 32), i % 3) for i in range(12)]
    learn = Learner(DataLoaders(*(torch.utils.data.DataLoader(pairs, 4) for _ in range(2))), network(3), loss_func=nn.CrossEntropyLoss())
    with inputs(learn.model) as seen: assert len(titles(learn.show_attention(n=12))) == 12
    assert all(map(torch.equal, seen, [x for x, _ in pairs]))
    assert len(titles(learn.show_attention(sorted(get_image_files(photos))[:2]))) == 2
    assert len(buttons(maps_page(learn, photos.parent / "plain.html"))) == 8


def test_data_that_are_no_files_tell_the_size(photos):
    "Datasets over numbers, and a plain list of pictures."
    x = torch.rand(12, 3, 20, 20)
    files = sorted(get_image_files(photos))[:2]
    numbers = Datasets(range(12), [lambda i: x[i], lambda i: i % 2], splits=[range(8), range(8, 12)]).dataloaders(bs=4, num_workers=0, device="cpu")
    pairs = [(x[i], i % 2) for i in range(12)]
    for dls in (numbers, DataLoaders.from_dsets(pairs[:8], pairs[8:], bs=4, num_workers=0, device="cpu")):
        learn = Learner(dls, network(2), loss_func=nn.CrossEntropyLoss())
        with inputs(learn.model) as seen: learn.show_attention(files)
        assert torch.equal(torch.stack(seen[:2]), open_pictures(files, 20))


def test_data_without_labels(photos):
    from fastai.vision.all import TfmdLists
    files = sorted(get_image_files(photos))
    only = TfmdLists(files, [PILImage.create], splits=[range(16), range(16, 24)]).dataloaders(bs=4, num_workers=0, device="cpu", after_item=[Resize(20), ToTensor()], after_batch=[IntToFloatTensor()])
    for dls in (only, DataLoaders(*(torch.utils.data.DataLoader(list(torch.rand(6, 3, 20, 20)), 2) for _ in range(2)))):
        learn = Learner(dls, network(3), loss_func=nn.CrossEntropyLoss())
        assert len(titles(learn.show_attention(n=5))) == 5 == len(titles(learn.show_attention(files[:5])))
        assert pictures_of(learn, n=5).x.shape == (5, 3, 20, 20)


def test_each_learner_has_its_own_names_and_a_pool_that_is_not_there_is_told(photos):
    a, b = (Learner(block(photos), fixed([3., 1., 1.])) for _ in range(2))
    b.dls.train.vocab = ["one", "two", "three"]
    x = pictures_of(a, n=1).x
    def said(**kwargs): return [ax.texts[-1].get_text().split()[0] for ax in show_heads(dict(a=a, b=b, c=a.model), x, **kwargs).axes if ax.texts]
    assert said() == ["blue", "one", "blue"] and said(vocab=np.array(["x", "y", "z"])) == ["x"] * 3
    with pytest.raises(BadInput, match="^model: there is no attention pool in it"): a.show_attention(pool="1.0")


def test_pictures_of_several_sizes_are_told_before_the_network_runs(photos):
    learn = Learner(block(photos, item_tfms=None), network(3))
    files = sorted(get_image_files(photos))[:2]
    with pytest.raises(BadInput, match="^files: the pictures have several sizes.*item_tfms=Resize"): learn.show_attention(files)
    with pytest.raises(BadInput, match="^files: the pictures have several sizes"): learn.show_attention(n=3)
    assert len(titles(learn.show_attention(files[0]))) == 1


def test_broken_files_are_named_all_and_nothing_else_happens(photos, tmp_path):
    for name, content in dict(a=b"", b=b"no picture", c=b"\x89PNG\r\n\x1a\nbroken").items(): (tmp_path / f"{name}.png").write_bytes(content)
    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    for dls in (block(photos), PIPELINES["ours"](photos)):
        learn = Learner(dls, network(3))
        with pytest.raises(BadInput, match=r"^files: 3 of 4 cannot be read: .*a.png \(.*b.png \(.*c.png \(") as e: learn.show_attention(tmp_path)
        assert "good" not in str(e.value) and "\n" not in str(e.value)
        with pytest.raises(BadInput, match="^files: 1 of 1"): maps_page(learn, tmp_path / "p.html", tmp_path / "a.png")
    with pytest.raises(TypeError, match="^files: expected paths"): learn.show_attention([3])
    with pytest.raises(BadInput, match="^files: the list is empty"): learn.show_attention([])


def test_what_is_no_picture_in_a_folder_is_left_out_and_told(photos, tmp_path, capsys):
    for name in ("._0.png", "notes.pdf", ".DS_Store"): (tmp_path / name).write_bytes(b"%PDF")
    Image.new("RGB", (40, 40)).save(tmp_path / "good.webp")
    learn = Learner(PIPELINES["ours"](photos), network(3))
    assert len(titles(learn.show_attention(tmp_path))) == 1
    assert "left out" in (err := capsys.readouterr().err) and "notes.pdf" in err


def test_pictures_in_memory_are_shown_as_files_are(photos):
    learn, file = Learner(PIPELINES["ours"](photos), network(3)), sorted(get_image_files(photos))[0]
    x = pictures_of(learn, file).x
    with Image.open(file) as im:
        for o in (im, np.asarray(im), [im]): assert torch.equal(pictures_of(learn, o).x, x)


def test_many_files_go_through_the_network_in_batches(photos):
    learn, sizes = Learner(block(photos), network(3)), []
    learn.model.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    assert len(titles(learn.show_attention(photos))) == 24 and max(sizes) == 8
    sizes.clear()
    assert len(buttons(maps_page(learn, photos.parent / "many.html", photos))) == 24 and max(sizes) == 8


@pytest.mark.parametrize("head", [AvgPoolHead, AvgStartAttnPoolHead])
def test_networks_in_other_precisions_and_formats(photos, head):
    file, model = sorted(get_image_files(photos))[0], network(3, head)
    learn = Learner(block(photos), model)
    said = titles(learn.show_attention(file))
    for change in (model.double, lambda: model.to(torch.bfloat16), lambda: model.float().to(memory_format=torch.channels_last)):
        change()
        assert titles(learn.show_attention(file))[0].split()[0] == said[0].split()[0]
        assert len(titles(learn.show_attention(n=2))) == 2
        maps_page(learn, photos.parent / "precision.html", file)
    learn.model = torch.compile(model, backend="eager")
    assert len(titles(learn.show_attention(file))) == 1


def test_several_inputs_are_refused_with_words(photos):
    dls = block(photos, (ImageBlock, ImageBlock, CategoryBlock), n_inp=2, get_x=[lambda f: f, lambda f: f], get_y=parent_label)
    learn = Learner(dls, network(3))
    for files in (None, sorted(get_image_files(photos))[0]):
        with pytest.raises(BadInput, match="^learn: its network takes 2 inputs"): learn.show_attention(files)


def several(f): return [f.parent.name, "odd"] if int(f.stem) % 2 else [f.parent.name]
def number(f): return float(f.stem)
def odd(f): return str(int(f.stem) % 2)
def points(f): return torch.tensor([[3., 4.], [20., float(f.stem)]])


def fixed(values, n=1):
    "A network that ends on average pooling and says the same of every picture, up to its brightness."
    model = network(len(values))
    with torch.no_grad():
        model[-1][-1].weight.mul_(1e-4)
        model[-1][-1].bias.copy_(torch.tensor(values))
    return model


def labelled(f): return ",\n".join(sorted(several(f)))
LABELS = dict(   # blocks, label, loss; what the network says; its title, the truth in it, and the page's buttons
    several=((ImageBlock, MultiCategoryBlock), several, None, [3., -3., 1., -1.], "blue 95%,\nodd 73%", labelled,
             [("blue", "95.3%"), ("odd", "73.1%")]),
    strict=((ImageBlock, MultiCategoryBlock), several, BCEWithLogitsLossFlat(thresh=.9), [3., -3., 1., -1.], "blue 95%", labelled,
            [("blue", "95.3%"), ("odd", "73.1%")]),
    none=((ImageBlock, MultiCategoryBlock), several, None, [-1., -3., -2., -4.], "none", labelled,
          [("blue", "26.9%"), ("odd", "11.9%")]),
    number=((ImageBlock, RegressionBlock), number, None, [2.5], "2.5", lambda f: f"{number(f):.3g}", [("output 0", "2.5")]),
    points=((ImageBlock, PointBlock), points, None, [.1, .2, .3, .4], "0.1, 0.2, 0.3, 0.4", None,
            [("output 0", "0.1"), ("output 1", "0.2")]),
    binary=((ImageBlock, CategoryBlock), odd, BCEWithLogitsLossFlat(), [1.], "1 73%", odd, [("1", "73.1%"), ("0", "26.9%")]))


@pytest.mark.parametrize("kind", LABELS)
def test_titles_and_pages_of_other_labels(photos, kind, tmp_path):
    blocks, get_y, loss, values, title, truth, offered = LABELS[kind]
    dls = block(photos, blocks, get_y)
    learn, files = Learner(dls, fixed(values), loss_func=loss), sorted(get_image_files(photos))[:3]
    assert titles(learn.show_attention(files)) == [title] * 3
    right = dict(several=lambda f: several(f) == ["blue", "odd"], strict=lambda f: several(f) == ["blue"], binary=lambda f: odd(f) == "1")
    if kind == "points":
        fixed_at = dict(zip(dls.valid_ds.items, torch.cat([y for _, y in dls.valid]).flatten(1).tolist()))
        def truth(f): return ", ".join(f"{v:.3g}" for v in fixed_at[f])
    for f, said in zip(dls.valid_ds.items, titles(learn.show_attention(n=99))):
        assert said == (title if right.get(kind, lambda f: False)(f) else f"{title}\n({truth(f)})")
    assert buttons(maps_page(learn, tmp_path / "m.html", files, top=2, classes=[0])) == [offered] * 3
    page = maps_page(learn, tmp_path / "valid.html", n=99).read_text()
    texts = [html.unescape(re.sub("<i>.*?</i>", "", text)).strip() for text in re.findall('<p class="said.*?">(.*?)</p>', page, re.S)]
    wrong, known = '✗ wrong:' in page, titles(learn.show_attention(n=99))
    assert texts == [t.partition("\n(")[0].replace("\n", " ") for t in known]
    truths = [t.partition("\n(")[2][:-1].replace("\n", " ") for t in known]
    assert all(f"<small>is {html.escape(truth)}</small>" in page for truth in truths if truth)
    assert wrong == (any(truths) and kind not in ("number", "numbers", "points"))
    drawn = show_heads({"a": learn}, pictures_of(learn, files).x).axes[0].texts
    assert [t.get_text().removesuffix("\nlooks everywhere") for t in drawn] == ["a", title.replace("\n", " ")]


def test_every_loss_is_read_in_its_own_way():
    out, vocab = torch.tensor([[2., -1.], [-2., -1.]]), ["cat", "dog"]
    def say(loss, vocab=vocab, out=out): return Reading(loss, vocab).titles(*Reading(loss, vocab).read(out))
    one, labels, numbers = ["cat 95%", "dog 73%"], ["cat 88%", "none"], ["2, -1", "-2, -1"]
    import timm.loss
    for loss in (nn.CrossEntropyLoss(), F.cross_entropy, partial(F.cross_entropy, label_smoothing=.1), CrossEntropyLossFlat(), None, BaseLoss(nn.CrossEntropyLoss),
                 timm.loss.LabelSmoothingCrossEntropy(), timm.loss.SoftTargetCrossEntropy(), lambda out, y: out.sum()): assert say(loss) == one
    for loss in (nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits, BCEWithLogitsLossFlat(), timm.loss.BinaryCrossEntropy(),
                 nn.MultiLabelSoftMarginLoss(), timm.loss.AsymmetricLossMultiLabel()): assert say(loss) == labels
    for loss in (nn.MSELoss(), F.mse_loss, MSELossFlat(), nn.L1Loss(), nn.SmoothL1Loss(), nn.HuberLoss(), nn.GaussianNLLLoss()): assert say(loss) == numbers
    assert say(lambda out, y: out.sum(), None) == say(lambda out, y: 0., "abc") == numbers   # no name for each output
    assert say(nn.NLLLoss(), out=out.log_softmax(1)) == one
    for loss in (nn.BCELoss(), F.binary_cross_entropy, BaseLoss(nn.BCELoss)): assert say(loss, out=out.sigmoid()) == labels
    single = torch.tensor([[1.], [-1.]])
    assert say(nn.BCEWithLogitsLoss(), out=single) == ["dog 73%", "cat 73%"] and say(None, None, single) == ["1", "-1"]
    assert say(nn.BCEWithLogitsLoss(), ["sunny"], single) == ["sunny 73%", "none"]   # a label of its own
    assert say(nn.BCEWithLogitsLoss(), None, single) == ["1 73%", "0 73%"]
    assert say(None, [7, 8]) == ["7 95%", "8 73%"]   # names that are numbers
    for bad in (torch.zeros(2, 3, 4, 4), (out, out)):
        with pytest.raises(BadInput, match=r"^model: expected outputs \(b, n_out\)"): Reading().read(bad)


def test_the_truth_stands_in_brackets_where_it_is_another():
    p = torch.tensor([[.9, .1], [.25, .75]])
    for truth in ([0, 0], torch.tensor([0, 0]), np.array([0, 0]), torch.tensor([[0], [0]]), [[1., 0.], [.6, .4]]): assert captions(p, "ab", truth) == ["a 90%", "b 75% (a)"]
    labels = Reading(nn.BCEWithLogitsLoss(), "abcde")
    out = torch.tensor([[1., 2., 3., 4., 5.], [-1., -1., -1., -1., 1.], [-1.] * 5])
    truth = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [0, 0, 0, 0, 0]])
    assert labels.titles(*labels.read(out), truth) == ["e 99%, d 98%, c 95%, and 2 more", "e 73% (a, e)", "none"]
    assert labels.titles(*labels.read(out[1:]), [4, 4]) == ["e 73%", "none (e)"]   # a class each
    with pytest.raises(BadInput, match="^labels: expected one for each of 2 pictures, got 3"): captions(p, "ab", [0, 0, 0])
    assert captions(p, "ab", [[0, 1, 1], [1, 1, 1]]) == ["a 90%", "b 75%"]   # of another kind
    assert captions(p, "ab", [-100, 5]) == ["a 90% (-100)", "b 75% (5)"]


HOSTILE = ["$x_1$", "a$b", r"$\frac{$", "$", "[red]", "<b>&amp;", "a\nb", "n" * 200, "\N{GRINNING FACE}", "\udcff\x07", "", '"><script>alert(1)</script>', "{{ 7 * 7 }}"]


def test_names_are_shown_as_they_are(photos, tmp_path, recwarn):
    model, x = fixed([float(i) for i in range(len(HOSTILE))]), torch.rand(len(HOSTILE), 3, 16, 16)
    fig = show_maps(x, maps_of(model, x), titles=captions(torch.eye(len(HOSTILE)), HOSTILE, [0] * len(HOSTILE), sep="\n"), ncols=4)
    fig.savefig(tmp_path / "a.png")
    assert titles(fig)[0] == "$x_1$ 100%" and titles(fig)[1] == "a$b 100%\n($x_1$)" and titles(fig)[6] == "a b 100%\n($x_1$)" and len(titles(fig)[7]) < 60
    show_maps(x, maps_of(model, x), titles=HOSTILE).savefig(tmp_path / "a.svg")
    for i in range(len(HOSTILE)): show_heads({HOSTILE[i]: model}, x[:2], [i, 0], vocab=HOSTILE).savefig(tmp_path / "b.svg")
    dls = block(photos)
    learn = Learner(dls, fixed([3.] * len(HOSTILE)))
    learn.dls.train.vocab = HOSTILE
    assert list(learn.dls.vocab) == HOSTILE
    page = maps_page(learn, tmp_path / "p.html", sorted(get_image_files(photos))[:1], top=50).read_text(encoding="utf-8")
    assert page.count("<script>") == 1 and "&lt;b&gt;&amp;amp;" in page and "{{ 7 * 7 }}" in page and "$x_1$" in page and "n" * 199 in page
    learn.show_attention(n=2).savefig(tmp_path / "c.png")
    odd = tmp_path / "$x_1$ <b>.png"
    Image.new("RGB", (40, 40)).save(odd)
    learn.show_attention(odd).savefig(tmp_path / "d.png")


def test_a_page_of_equal_names_and_more_classes_than_there_are(photos, tmp_path):
    learn = Learner(block(photos), fixed([1., 2., 3.]))
    learn.dls.train.vocab = ["same", "same", "other"]
    page = buttons(maps_page(learn, tmp_path / "m.html", sorted(get_image_files(photos))[0], top=9, classes=["same", 2]))
    assert [n for n, _ in page[0]] == ["other", "same", "same"]   # each output once
    for bad in ("²", "-1", "3"):
        with pytest.raises(BadInput, match="^classes: "): class_index(bad, ["a", "b"])


def cam_by_hand(model, layer, x, target, view=lambda t: t):
    "Grad-CAM from its formula: autograd at one layer."
    seen = []
    handle = layer.register_forward_hook(lambda m, args, out: seen.append(out))
    score = model.eval()(x).gather(1, target[:, None]).sum()
    handle.remove()
    grad, fmap = map(view, (torch.autograd.grad(score, seen[-1])[0], seen[-1]))
    return (grad.mean((2, 3), keepdim=True) * fmap).sum(1, keepdim=True).clamp(min=0).detach()


def last(t): return t.permute(0, 3, 1, 2)
def tokens(prefix, h, t): return t[:, prefix:].unflatten(1, (h, -1)).permute(0, 3, 1, 2)


def timm_network(name, **kwargs):
    import timm
    return timm.create_model(name, num_classes=2, **kwargs)


def torchvision_network(name, **kwargs):
    import torchvision
    return getattr(torchvision.models, name)(num_classes=2, **kwargs)


NETWORKS = dict(   # network; its last map by name; how to view it; whether it ends on average pooling and a linear layer
    resnet18=(partial(timm_network, "resnet18"), "layer4", None, True),
    convnext=(partial(timm_network, "convnext_atto"), "stages", None, False),
    mobilenet=(partial(timm_network, "mobilenetv3_small_050"), "blocks", None, False),
    densenet=(partial(timm_network, "densenet121", growth_rate=8, block_config=(2, 2, 2, 2)), "features", None, True),
    regnet=(partial(timm_network, "regnetx_002"), "final_conv", None, True),
    swin=(partial(timm_network, "swin_tiny_patch4_window7_224", img_size=64, window_size=2, embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4)), "norm", last, True),
    vit=(partial(timm_network, "vit_tiny_patch16_224", img_size=64, depth=2), "blocks.1.norm1", partial(tokens, 1, 4), False),
    deit=(partial(timm_network, "deit_tiny_distilled_patch16_224", img_size=64, depth=2), "blocks.1.norm1", partial(tokens, 2, 4), False),
    registers=(partial(timm_network, "vit_tiny_patch16_224", img_size=64, depth=2, reg_tokens=8), "blocks.1.norm1", partial(tokens, 9, 4), False),
    averaged=(partial(timm_network, "vit_tiny_patch16_224", img_size=64, depth=2, global_pool="avg", fc_norm=False), "norm", partial(tokens, 1, 4), True),
    mixer=(partial(timm_network, "mixer_s32_224", img_size=64), "norm", partial(tokens, 0, 2), True),
    tv_resnet18=(partial(torchvision_network, "resnet18"), "layer4", None, True),
    tv_efficientnet=(partial(torchvision_network, "efficientnet_b0"), "features", None, True),
    tv_vgg=(partial(torchvision_network, "vgg11"), "features", None, False),
    tv_vit=(lambda: __import__("torchvision").models.VisionTransformer(64, 16, 2, 3, 48, 96, num_classes=2), "encoder.layers.encoder_layer_1.ln_1", partial(tokens, 1, 4), False),
    patchconvnet=(partial(timm_network, "patchconvnet_s60", embed_dim=32, depth=2), "blocks", None, False))


@pytest.mark.parametrize("name", NETWORKS)
def test_grad_cam_finds_the_last_map_of_any_network(name):
    import attnpool.models  # noqa: F401 registers PatchConvNets
    make, layer, view, averaged = NETWORKS[name]
    model, x, target = make().eval(), torch.randn(2, 3, 64, 64), torch.tensor([1, 0])
    layers = dict(model.named_modules())
    expected = cam_by_hand(model, layers[layer], x, target, view or (lambda t: t))
    cam = grad_cam(model, x, target)
    assert cam.shape == expected.shape and min(cam.shape[2:]) > 1 and torch.allclose(cam, expected, rtol=1e-4, atol=1e-9)
    assert torch.allclose(cam, grad_cam(model, x, target, layers[layer]), rtol=1e-4, atol=1e-9)   # hooks change the form
    both = grad_cam(model, x, torch.tensor([[1, 0], [0, 1]]))
    assert both.shape == (2, 2, *cam.shape[2:]) and torch.allclose(both[:, :1], cam) and not any(m._forward_hooks for m in model.modules())
    if averaged:
        logit = model(x)[[0, 1], target] - [m for m in model.modules() if isinstance(m, nn.Linear)][-1].bias[target]
        own = class_activation_map(model, x, target)
        assert own.shape == cam.shape and torch.allclose(own.mean((1, 2, 3)), logit, atol=1e-5)
        assert torch.allclose(cam * cam[0].numel(), own.clamp(min=0), atol=1e-5)
    else:
        with pytest.raises(BadInput, match="^model: expected average pooling.*grad_cam"): class_activation_map(model, x, target)


@pytest.mark.parametrize("name, kwargs, size, grid, layer, view", [
    ("resnet18", {}, (33, 130), (2, 5), "layer4", None), ("vit_tiny_patch16_224", dict(img_size=(48, 80), depth=2), (48, 80), (3, 5), "blocks.1.norm1", partial(tokens, 1, 3)),
    ("swin_tiny_patch4_window7_224", dict(img_size=(64, 128), window_size=2, embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4)), (64, 128), (2, 4), "norm", last)])
def test_grad_cam_of_oblong_pictures_with_checkpointing_too(name, kwargs, size, grid, layer, view):
    model, x, target = timm_network(name, **kwargs).eval(), torch.randn(2, 3, *size), torch.tensor([1, 0])
    cam = grad_cam(model, x, target)
    expected = cam_by_hand(model, dict(model.named_modules())[layer], x, target, view or (lambda t: t))
    assert cam.shape == (2, 1, *grid) and torch.allclose(cam, expected, rtol=1e-4, atol=1e-9)
    model.set_grad_checkpointing(True)
    assert torch.allclose(grad_cam(model, x, target), cam, atol=1e-9)


def test_grad_cam_of_resnet18_at_any_layer_is_captums():
    captum = pytest.importorskip("captum.attr")
    model, x, target = timm_network("resnet18").eval(), torch.randn(2, 3, 64, 96), torch.tensor([0, 1])
    for p in model.parameters(): p.requires_grad_(False)   # a frozen network too
    for layer in (model.layer2, model.layer3, model.layer4):
        theirs = captum.LayerGradCam(model, layer).attribute(x.clone().requires_grad_(), target, relu_attributions=True)
        assert torch.allclose(grad_cam(model, x, target, layer), theirs, atol=1e-7)


def test_a_fastai_body_with_fastais_head(photos):
    learn = vision_learner(block(photos), __import__("torchvision").models.resnet18, pretrained=False)
    x, target = torch.randn(2, 3, 64, 64), torch.tensor([2, 0])
    cam = grad_cam(learn.model, x, target)
    assert torch.allclose(cam, cam_by_hand(learn.model, learn.model[0], x, target), atol=1e-8) and cam.shape == (2, 1, 2, 2)


def test_any_learner_shows_maps_and_any_page_offers_its_classes(photos, tmp_path):
    "fastai's own head, a transformer, y_range: Grad-CAM, where nothing else is to be had."
    from fastai.vision.all import resnet18
    vit = timm_network("vit_tiny_patch16_224", img_size=32, depth=2)
    numbers = block(photos, (ImageBlock, RegressionBlock), number)
    for learn in (vision_learner(block(photos), resnet18, pretrained=False), Learner(block(photos, get_y=odd), vit),
                  vision_learner(block(photos), "resnet18", pretrained=False), vision_learner(numbers, resnet18, pretrained=False, y_range=(0, 8))):
        assert len(titles(learn.show_attention(n=3))) == 3
        assert mapped(maps_page(learn, tmp_path / "m.html", n=2, top=2)) == [1 if learn.dls is numbers else 2]


def test_untrained_heads_and_pictures_of_a_few_pixels():
    model, x = timm_network("resnet18"), torch.randn(2, 3, 32, 32)   # its last map has one position
    assert torch.allclose(grad_cam(model, x, torch.tensor([0, 1])), cam_by_hand(model, model.layer3, x, torch.tensor([0, 1])), atol=1e-8)
    assert class_activation_map(model, x).shape == (2, 1, 1, 1)
    nn.init.zeros_(model.fc.weight)
    zeros = grad_cam(model, torch.randn(2, 3, 64, 64))
    assert zeros.shape == (2, 1, 2, 2) and not zeros.any()


def test_a_column_of_numbers_may_be_squeezed(photos):
    class Squeezed(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = fixed([2.5])
        def forward(self, x): return self.network(x).squeeze(1)
    learn = Learner(block(photos, (ImageBlock, RegressionBlock), number), Squeezed())
    assert {t.split("\n")[0] for t in titles(learn.show_attention(n=9))} == {"2.5"}
    assert buttons(maps_page(learn, photos.parent / "squeezed.html", n=2)) == [[("output 0", "2.5")]] * 2


def test_grad_cam_in_any_mode_of_autograd():
    model, x, target = network(3), torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
    expected = grad_cam(model, x, target)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode(): assert torch.equal(grad_cam(model, x.clone(), target), expected)


def test_a_single_token_is_no_map():
    model, x = timm_network("pit_xs_224"), torch.randn(1, 3, 224, 224)   # ends on its class tokens
    with pytest.raises(BadInput, match="^model: expected average pooling"): class_activation_map(model, x)
    assert grad_cam(model, x).shape == (1, 1, 7, 7)


def test_layers_that_give_no_map_are_told():
    model, x = timm_network("resnet18"), torch.randn(2, 3, 64, 64)
    with pytest.raises(BadInput, match="^layer: this Linear gives no map"): grad_cam(model, x, layer=model.fc)
    with pytest.raises(BadInput, match="^layer: this SelectAdaptivePool2d gives no map"): grad_cam(model, x, layer=model.global_pool)
    with pytest.raises(BadInput, match="^layer: .*no map"): grad_cam(model, x, layer=nn.Identity())   # never called
    with pytest.raises(BadInput, match="^layer: the network makes no map"): grad_cam(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.randn(2, 3, 2, 2))
    with pytest.raises(TypeError, match="^layer: expected a module"): grad_cam(model, x, layer="layer4")
    with pytest.raises(BadInput, match="^target: expected classes from 0 to 1, got"): grad_cam(model, x, torch.tensor([0, 2]))
    with pytest.raises(BadInput, match="^target: expected the classes of 2"): class_activation_map(model, x, torch.tensor([0]))
    with pytest.raises(BadInput, match="^model: expected outputs"): grad_cam(nn.Sequential(nn.Conv2d(3, 2, 1)), x)
    with pytest.raises(BadInput, match="^x: expected pictures"): grad_cam(model, x[0])


def test_a_single_output_shows_what_makes_it_what_it_is():
    model, x = network(1), torch.randn(6, 3, 16, 24)
    model[-1][-1].bias.data.zero_()
    out = model.eval()(x).detach()
    fmap = model[0](x).detach()
    terms = torch.einsum("c,bchw->bhw", model[-1][-1].weight[0], fmap).detach()[:, None]
    assert torch.allclose(class_activation_map(model, x), terms * out.sign()[..., None, None], atol=1e-6)
    assert torch.allclose(class_activation_map(model, x, torch.zeros(6, dtype=torch.long)), terms, atol=1e-6)
    assert torch.allclose(grad_cam(model, x) * terms[0].numel(), (terms * out.sign()[..., None, None]).clamp(min=0), atol=1e-6)


def test_a_page_never_takes_the_place_of_a_picture(photos, tmp_path):
    learn, file = Learner(block(photos), network(3)), tmp_path / "a.png"
    Image.new("RGB", (40, 40)).save(file)
    before = file.read_bytes()
    with pytest.raises(BadInput, match="^path: .*a.png is a picture"): maps_page(learn, file, file)
    with pytest.raises(FileNotFoundError, match="^path: there is no folder"): maps_page(learn, tmp_path / "none" / "m.html", file)
    assert file.read_bytes() == before and len(buttons(maps_page(learn, maps_page(learn, tmp_path / "m.html", file), file))) == 1


def test_maps_of_a_query_per_class_stay_with_their_class(photos, tmp_path):
    learn = Learner(block(photos), network(3, ClassQueryPoolHead))
    assert mapped(maps_page(learn, tmp_path / "m.html", sorted(get_image_files(photos))[0], top=3)) == [3]
    def heads(ni, n_out): return nn.Sequential(nn.Conv2d(ni, 48, 1), PEERS["torch-mha"](48, n_out, num_heads=3))
    one = Learner(block(photos), network(3, heads))   # as many heads as classes, by chance
    page = maps_page(one, tmp_path / "m.html", sorted(get_image_files(photos))[0], top=3)
    assert mapped(page) == [1, 3] and "one map for all" in page.read_text()
    decoder = Learner(block(photos), network(3, partial(PEERS["mldecoder"], dim=32)))
    assert mapped(maps_page(decoder, tmp_path / "m.html", sorted(get_image_files(photos))[0], top=3)) == [3]
