"Pictures for published weights: the pixels that torchvision makes of them, whatever they are."
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.data.external import fastai_cfg
from fastai.vision.all import PILImage, Pipeline, ToTensor
from PIL import Image
from torchvision import transforms as T

from attnpool.data.augment import AUGMENTS, CentreCrop
from attnpool.data.evaluation import eval_dl
from attnpool.data.listing import list_folder
from attnpool.data.pictures import empty_dls, picture_dls, valid_dl
from attnpool.data.reader import open_picture
from attnpool.registry import BadInput


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTAI_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    fastai_cfg.cache_clear()


def drawn(size, mode="RGB", seed=0):
    "Noise over slopes: every pixel counts, and edges are where they are."
    w, h = size
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:h, :w]
    levels = np.stack([x / w, y / h, (x + y) / (w + h)], 2) * 180 + rng.integers(0, 76, (h, w, 3))
    return Image.fromarray(levels.astype(np.uint8)).convert(mode)


def torchvisions(im, size, ratio=.875):
    return T.Compose([T.Resize(int(size / ratio), T.InterpolationMode.BICUBIC, antialias=True), T.CenterCrop(size), T.PILToTensor()])(im)


SIZES = [(500, 375), (375, 500), (301, 97), (97, 301), (64, 64), (33, 31), (20, 400), (225, 224), (1, 9)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side,ratio", [(64, .875), (97, .875), (224, .875), (48, 1.), (31, .9)])
def test_evaluation_pixels_are_those_of_torchvision(size, side, ratio):
    im = drawn(size)
    assert torch.equal(torch.as_tensor(np.array(CentreCrop(side, ratio)(PILImage.create(im)))).permute(2, 0, 1), torchvisions(im, side, ratio))
    if ratio == .875:
        items = Pipeline(AUGMENTS["imagenet"].items(side), split_idx=1)
        assert torch.equal(items(PILImage.create(im)).as_subclass(torch.Tensor), torchvisions(im, side))


def folder(root="photos", n=3, sizes=((90, 60), (50, 130), (40, 40))):
    for part in ("train", "val"):
        for c in ("cat", "dog"):
            Path(root, part, c).mkdir(parents=True)
            for i in range(n): drawn(sizes[i % len(sizes)], seed=hash((part, c, i)) % 2**32).save(Path(root, part, c, f"{i}.png"))
    return Path(root)


def seen(dl): return torch.cat([x.as_subclass(torch.Tensor) for x, *_ in dl]), torch.cat([y for *_, y in dl]).as_subclass(torch.Tensor)


def wanted(root, part, size):
    x = torch.stack([torchvisions(open_picture(f), size) for f in sorted(Path(root, part).rglob("*.*"))]) / 255
    return (x - torch.tensor((.485, .456, .406)).view(3, 1, 1)) / torch.tensor((.229, .224, .225)).view(3, 1, 1)


IMAGENET = ((.485, .456, .406), (.229, .224, .225))


@pytest.mark.parametrize("gb", [4., 0.])
def test_evaluate_loaders_of_a_training_with_the_imagenet_augmentation(gb):
    root = folder()
    dls = picture_dls(root, 32, 2, "cpu", augment="imagenet", stats=IMAGENET, cache_gb=gb)
    assert torch.allclose(seen(dls.valid)[0], wanted(root, "val", 32), atol=1e-6)
    for size in (24, 32, 48, 64, 200): assert torch.allclose(seen(valid_dl(dls, size, bs=3))[0], wanted(root, "val", size), atol=1e-6)
    files = sorted((root / "val").rglob("*.png"))
    bare = empty_dls(**dls.about, device="cpu")
    for d in (dls, bare): assert torch.allclose(seen(d.test_dl(files, with_labels=True))[0], wanted(root, "val", 32), atol=1e-6)
    x = dls.train.one_batch()[0]
    assert x.shape == (2, 3, 32, 32) and AUGMENTS["imagenet"].load(32) is None and AUGMENTS["light"].load(32) == 64


def test_evaluate_pixels_of_other_augmentations_stay_as_they_were():
    root = folder(sizes=((90, 60), (500, 130), (400, 400)))
    one, two = (picture_dls(root, 32, 2, "cpu", augment=a, stats=IMAGENET) for a in ("light", "imagenet"))
    squeezed = seen(one.valid)[0]
    for a in ("none", "randaugment"): assert torch.equal(seen(picture_dls(root, 32, 2, "cpu", augment=a, stats=IMAGENET).valid)[0], squeezed)
    assert not torch.allclose(squeezed, seen(two.valid)[0], atol=.1)


def test_evaluate_dl_gives_pictures_of_a_listing_with_indices_into_a_vocab():
    root = folder()
    listing = list_folder(root)
    dl = eval_dl(listing, ["bird", "dog", "cat"], 48, bs=5, device="cpu")
    x, y = seen(dl)
    assert len(x) == 12 and y.tolist() == [2, 2, 2, 1, 1, 1] * 2 and y.dtype == torch.int64
    assert torch.allclose(x, torch.cat([wanted(root, p, 48) for p in ("train", "val")]), atol=1e-6)
    valid = replace(listing, files=listing.files[6:], labels=listing.labels[6:], n_train=0)
    for workers in (0, 2): assert torch.equal(seen(eval_dl(valid, ["bird", "dog", "cat"], 48, bs=4, device="cpu", num_workers=workers))[0], x[6:])
    with pytest.raises(BadInput, match="^data: .*photos has classes that the network does not know: dog. It knows 1: cat"): eval_dl(listing, ["cat"])
    with pytest.raises(BadInput, match="^size: expected 8 pixels or more, got 4"): eval_dl(listing, ["cat", "dog"], 4)
    with pytest.raises(BadInput, match="^ratio: expected more than 0, up to 1, got 1.5"): eval_dl(listing, ["cat", "dog"], 48, ratio=1.5)
