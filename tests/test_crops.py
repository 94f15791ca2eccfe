"""Which part of a picture the network saw, for any transforms; and pictures as their files have them."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import (
    CategoryBlock, CropPad, DataBlock, FlipItem, ImageBlock, ImageDataLoaders, Learner, Normalize, PILImage, PILImageBW, RandomResizedCrop,
    Resize, ResizeMethod, Transform, aug_transforms, get_image_files, load_learner, parent_label)
from PIL import Image
from torch import nn

from attnpool.data.pictures import picture_dls
from attnpool.heads import AvgStartAttnPoolHead
from attnpool.maps.learner import pictures_of
from attnpool.registry import BadInput

WIDE, TALL = (300, 200), (150, 250)


def photo(size, seed=0):
    "Smooth colours with some structure, unlike itself in any other orientation."
    small = np.random.default_rng(seed).integers(0, 255, (5, 7, 3)).astype(np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for c in "ab":
        (root / c).mkdir()
        for i in range(4): photo(WIDE if i % 2 else TALL, i + 10 * (c == "b")).save(root / c / f"{c}{i}.png")
    return root


def learner(dls, n_in=3):
    torch.manual_seed(0)
    return Learner(dls, nn.Sequential(nn.Conv2d(n_in, 8, 3, stride=4), AvgStartAttnPoolHead(8, 2)), loss_func=nn.CrossEntropyLoss())


def from_folder(folder, item_tfms, batch_tfms=None, **kw):
    return ImageDataLoaders.from_folder(folder, valid_pct=.5, seed=1, item_tfms=item_tfms, batch_tfms=batch_tfms, bs=4, device="cpu", num_workers=0, **kw)


def centre(size, w, h): return [(size[0] - w) / 2, (size[1] - h) / 2, (size[0] + w) / 2, (size[1] + h) / 2]


def squeezed(size, side=64, total=80):   # validation of RandomResizedCrop: to `total`, then the middle `side`
    return centre(size, size[0] * side / total, size[1] * side / total)


CASES = {
    "crop": (Resize(64), None, lambda s: centre(s, min(s), min(s))),
    "squish": (Resize(64, ResizeMethod.Squish), None, lambda s: [0, 0, *s]),
    "pad zeros": (Resize(64, ResizeMethod.Pad, pad_mode="zeros"), None, lambda s: centre(s, max(s), max(s))),
    "pad border": (Resize(64, ResizeMethod.Pad, pad_mode="border"), None, lambda s: centre(s, max(s), max(s))),
    "pad reflection": (Resize(64, ResizeMethod.Pad, pad_mode="reflection"), None, lambda s: centre(s, max(s), max(s))),
    "crop to a wide shape": (Resize((40, 80)), None, lambda s: centre(s, s[0], s[0] / 2)),
    "croppad": (CropPad(100), None, lambda s: centre(s, 100, 100)),
    "croppad beyond": (CropPad(260, pad_mode="zeros"), None, lambda s: centre(s, 260, 260)),
    "random crop in validation": (RandomResizedCrop(64), None, squeezed),
    "presizing": (Resize(96), aug_transforms(size=48), lambda s: centre(s, min(s), min(s))),
    "normalised": (Resize(64), [Normalize.from_stats(*([.5] * 3, [.25] * 3))], lambda s: centre(s, min(s), min(s))),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [WIDE, TALL])
def test_the_part_that_was_seen_on_the_page_of_maps(folder, tmp_path, case, size):
    tfm, batch, expected = CASES[case]
    photo(size, 3).save(tmp_path / "one.png")
    its = pictures_of(learner(from_folder(folder, tfm, batch)), tmp_path / "one.png")
    assert its.shown[0].size == size and its.names == ["one.png"] and its.sizes == [size]
    assert np.allclose(its.crops[0], expected(size), atol=.012 * max(size)), (its.crops, expected(size))
    x = its.x[0]   # what was seen is that part of the picture
    left, top, right, bottom = its.crops[0].tolist()
    if 0 <= left and 0 <= top and right <= size[0] and bottom <= size[1]:
        part = its.shown[0].resize(x.shape[:0:-1], Image.Resampling.BILINEAR, box=(left, top, right, bottom))
        if case != "normalised": assert (x - torch.from_numpy(np.array(part)).permute(2, 0, 1) / 255).abs().mean() < .02


class Turn(Transform):
    def encodes(self, o: PILImage): return o.transpose(Image.Transpose.ROTATE_90)


class Inverted(Transform):
    def encodes(self, o: PILImage): return PILImage.create(255 - np.array(o))


class Jitter(Transform):   # in validation too
    def encodes(self, o: PILImage):
        left, top = np.random.randint(0, 90, 2).tolist()
        return o.crop((left, top, left + 60, top + 60))


@pytest.mark.parametrize("tfms", [[Turn(), Resize(64)], [Inverted(), Resize(64)], [Resize(64), FlipItem(1.)]], ids=["turned", "inverted", "flipped"])
def test_what_is_no_upright_part_is_shown_as_the_network_got_it_on_a_page(folder, tfms):
    for t in tfms: t.split_idx = None
    dls = from_folder(folder, tfms)
    its = pictures_of(learner(dls), folder / "a" / "a1.png")
    assert its.shown[0].size == (64, 64) and its.crops.tolist() == [[0, 0, 64, 64]] and its.names == ["a1.png"] and its.files == [None]
    assert torch.equal(torch.from_numpy(np.array(its.shown[0])), (its.x[0] * 255).round().byte().permute(1, 2, 0))


def test_random_parts_are_those_that_were_seen_and_no_random_state_is_changed(folder):
    learn = learner(from_folder(folder, [Jitter()]))
    np.random.seed(7)
    expected = np.random.rand()
    np.random.seed(7)
    its = pictures_of(learn, [folder / "a" / "a1.png", folder / "b" / "b3.png"])
    assert np.random.rand() == expected
    for x, im, crop in zip(its.x, its.shown, its.crops):
        left, top, right, bottom = crop.round().int().tolist()
        assert right - left in (59, 60, 61) and bottom - top in (59, 60, 61) and im.size == WIDE
        part = torch.from_numpy(np.array(im.crop((left, top, left + 60, top + 60)))).permute(2, 0, 1) / 255
        assert (part - x).abs().mean() < .02


def test_grey_networks_and_tables_and_blocks(folder, tmp_path):
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_items=get_image_files, get_y=parent_label, item_tfms=Resize(64))
    its = pictures_of(learner(block.dataloaders(folder, bs=4, device="cpu", num_workers=0), 1), folder / "a" / "a1.png")
    assert its.shown[0].mode == "RGB" and np.allclose(its.crops[0], centre(WIDE, 200, 200), atol=3)
    rows = pd.DataFrame(dict(name=[str(f.relative_to(folder)) for f in sorted(get_image_files(folder))], label=list("aaaabbbb"), valid=[0, 1] * 4))
    dls = ImageDataLoaders.from_df(rows, folder, fn_col="name", label_col="label", valid_col="valid", item_tfms=Resize(64), bs=2, device="cpu", num_workers=0)
    its = pictures_of(learner(dls), n=4)
    assert its.names == ["a1.png", "a3.png", "b1.png", "b3.png"] and its.labels.tolist() == [0, 0, 1, 1]
    assert its.files == [folder / n[0] / n for n in its.names] and all(im.size == WIDE for im in its.shown)
    assert (np.array(its.shown[0]) == np.array(Image.open(its.files[0]))).all()


def test_validation_pictures_of_our_own_data_are_the_files(folder):
    dls = picture_dls(folder, size=16, bs=4, device="cpu", augment="none", valid_pct=.5)   # loads at 32 pixels
    learn = learner(dls)
    its = pictures_of(learn, n=4)
    for name, file, im, size, crop in zip(its.names, its.files, its.shown, its.sizes, its.crops):
        with Image.open(file) as original: assert file.name == name and (np.array(im) == np.array(original)).all()
        assert size == im.size and np.allclose(crop, squeezed(size, 16, 24), atol=.02 * max(size))
    small = pictures_of(learn, n=4, pixels=100)
    assert small.sizes == its.sizes and all(im.width == 100 for im in small.shown)
    scale = torch.tensor([100 / w for w, _ in its.sizes])[:, None]
    assert torch.allclose(small.crops, its.crops * scale, atol=1)
    with pytest.raises(BadInput, match="pixels: expected a width"): pictures_of(learn, n=1, pixels=0)


def test_exported_learners_and_pictures_in_memory(folder, tmp_path):
    for i, dls in enumerate((picture_dls(folder, size=16, bs=4, device="cpu", augment="none", valid_pct=.5), from_folder(folder, Resize(32)))):
        learn = learner(dls)
        learn.path = tmp_path
        learn.export(f"{i}.pkl")
        again, file = load_learner(tmp_path / f"{i}.pkl"), folder / "b" / "b1.png"
        want, im = pictures_of(learn, file), Image.open(file)
        for its in (pictures_of(again, file), pictures_of(again, im), pictures_of(again, np.asarray(im))):
            assert torch.equal(its.x, want.x) and torch.equal(its.crops, want.crops) and its.shown[0].size == WIDE
            assert (np.array(its.shown[0]) == np.array(im)).all()
        assert its.names == [""] and its.files == [None] and want.files == [file]


def test_the_orientation_that_a_camera_noted(folder, tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6   # to be turned by 90 degrees: stored lying, upright it is tall
    photo(WIDE, 5).save(tmp_path / "phone.jpg", exif=exif, quality=95)
    ours = learner(picture_dls(folder, size=16, bs=4, device="cpu", augment="none", valid_pct=.5))
    its = pictures_of(ours, tmp_path / "phone.jpg")
    assert its.shown[0].size == (200, 300) and np.allclose(its.crops[0], squeezed((200, 300), 16, 24), atol=6)
    lying = pictures_of(learner(from_folder(folder, Resize(32))), tmp_path / "phone.jpg")   # fastai's own reader passes over it
    assert lying.shown[0].size == WIDE and np.allclose(lying.crops[0], centre(WIDE, 200, 200), atol=3)


MEMORY = """
import resource, sys
from torch import nn
from fastai.vision.all import Learner
from attnpool.data.pictures import empty_dls
from attnpool.heads import AvgStartAttnPoolHead
from attnpool.maps.learner import pictures_of
learn = Learner(empty_dls(64, "ab", [.5] * 3, [.2] * 3, device="cpu"), nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), AvgStartAttnPoolHead(8, 2)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
its = pictures_of(learn, [sys.argv[1]] * 2, pixels=640)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, its.shown[0].size, its.sizes[0], its.crops[0].tolist())
"""


def test_a_huge_panorama_takes_the_memory_of_one(tmp_path):
    photo((12000, 3000)).save(tmp_path / "panorama.jpg", quality=60)
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", MEMORY, tmp_path / "panorama.jpg"], capture_output=True, text=True, check=True).stdout
    more, rest = out.strip().split("\n")[-1].split(" ", 1)
    assert int(more) < 280_000, out   # KB: one decoded is 108 MB; two, each decoded twice and kept, are more than 432 MB
    assert rest.startswith("(640, 160) (12000, 3000)")
