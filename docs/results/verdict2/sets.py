"""The real data sets of the second comparison, each cut into disjoint training parts that share one test set.

    python sets.py cifar10 cifar10-8000.tar sets     # 500 training and 300 test files a class, as CLASS/NUMBER.jpg
    python sets.py clutter cifar10-8000.tar sets     # the same at a third of the side, among tiles of other pictures
    python sets.py clutter-imagenette imagenette-128 sets     # and these, at a third of the side
    python sets.py cells BCCD_Dataset/BCCD sets      # or an archive of it; smears are kept apart
    python sets.py roads camvid-240.tar sets         # patches around the middle of an object; the test drive is apart
    python sets.py scans sets                        # the 1,797 digits that come with scikit-learn
    python sets.py imagenette imagenette-128 sets    # 250 training files a class and the official validation, no parts

Each but the last writes `sets/NAME-PART/train/CLASS/*.png` and `sets/NAME-PART/val/CLASS/*.png`, PART from 01 to 10,
the same bytes each time. All parts have the same test pictures. Part 3 comes as `sets/NAME-03-inner` too, to find rates
on: of its training pictures every fifth of a class validates. Then: `attnpool bench sets/cifar10-01 --recipe probe --heads ...`
"""
import argparse
import random
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

PARTS = 10
TUNED = 2   # the part that finds rates, from 0
CELLS = {'RBC': 'red cell', 'WBC': 'white cell', 'Platelets': 'platelet'}


def unpacked(source):
    "The folder, or the one in the archive."
    if Path(source).is_dir(): return Path(source)
    folder = tempfile.mkdtemp()
    shutil.unpack_archive(source, folder, filter='data')
    inside = [*Path(folder).iterdir()]
    return inside[0] if len(inside) == 1 else Path(folder)


def cifar10(source):
    "All files; of a class 50 to each part."
    root = unpacked(source)
    def picture(file):
        with Image.open(file) as image: return image.convert('RGB')
    for part in ('train', 'val'):
        for folder in sorted((root/part).iterdir()):
            files = sorted(folder.iterdir())
            for i, file in enumerate(files):
                yield None if part == 'val' else i * PARTS // len(files), folder.name, file.stem, picture(file)


def scattered(found, side, tile, width):
    "Each picture at a random place of a canvas whose tiles are cut from training pictures of any class."
    rng, found = np.random.default_rng(0), [*found]
    cut = [np.asarray(image) for part, *_, image in found if part is not None]
    for part, kind, name, image in found:
        canvas = np.empty((side, side, 3), np.uint8)
        for y in range(0, side, tile):
            for x in range(0, side, tile):
                other, (v, u) = cut[rng.integers(len(cut))], rng.integers(0, width - tile + 1, 2)
                canvas[y:y+tile, x:x+tile] = other[v:v+tile, u:u+tile]
        y, x = rng.integers(0, side - width + 1, 2)
        canvas[y:y+width, x:x+width] = np.asarray(image)
        yield part, kind, name, Image.fromarray(canvas)


def clutter(source):
    "Pictures of 32 px at a third of the side."
    return scattered(cifar10(source), 96, 16, 32)


def clutter_imagenette(source, each=250, tests=150):
    "The first files of each class, shrunk to 64 px, at a third of the side."
    def pictures():
        for part, kind, name, image in imagenette(source, each, tests):
            yield None if part is None else part * PARTS // each, kind, name, image.resize((64, 64), Image.BICUBIC)
    return scattered(pictures(), 192, 32, 64)


def cells(source, train=600, val=200, side=128):
    "Cells with their surroundings, 2.5 times as wide as they are; of each class as many as there are, at most `train`."
    root = unpacked(source)
    for part, lists, most in (('train', ['train'], train), ('val', ['val', 'test'], val)):
        smears = sorted(n for one in lists for n in (root/f'ImageSets/Main/{one}.txt').read_text().split())
        found = {kind: [] for kind in CELLS}
        for at, smear in enumerate(smears):
            text = (root/f'Annotations/{smear}.xml').read_text()
            for number, cell in enumerate(re.findall(r'<object>(.*?)</object>', text, re.S)):
                box = [int(re.search(rf'<{s}>(\d+)<', cell)[1]) for s in ('xmin', 'ymin', 'xmax', 'ymax')]
                found[re.search(r'<name>(.*?)</name>', cell)[1]].append((at % PARTS, smear, number, box))
        for kind, its in found.items():
            random.Random(0).shuffle(its)
            for at, smear, number, (l, t, r, b) in sorted(its[:most]):
                wide = min(round(2.5 * max(r - l, b - t)), 640, 480)
                if min(r - l, b - t) < 8: continue
                with Image.open(root/f'JPEGImages/{smear}.jpg') as image:
                    x, y = (max(0, min((a + c - wide) // 2, most - wide)) for a, c, most in
                            ((l, r, image.width), (t, b, image.height)))
                    cell = image.convert('RGB').crop((x, y, x + wide, y + wide)).resize((side, side), Image.LANCZOS)
                yield at if part == 'train' else None, CELLS[kind], f'{smear}-{number}', cell


def roads(source, side=64, least=150):
    "Of each frame and class the patch around the point that lies deepest inside it; each part has every tenth frame."
    from scipy.ndimage import distance_transform_edt
    root = unpacked(source)
    names = (root/'classes.txt').read_text().split()[:11]
    rare = 'fence', 'bicyclist'   # missing in some part
    frames = sorted((root/'train/images').iterdir())
    tests = sorted(f for f in (root/'test/images').iterdir() if f.name.startswith('Seq05V'))
    for part, files in (('train', frames), ('val', tests)):
        for i, file in enumerate(files):
            with Image.open(file) as image: picture = image.convert('RGB')
            labels = np.asarray(Image.open(file.parent.parent/'masks'/f'{file.stem}.png'))
            for k, name in enumerate(names):
                if name in rare or (inside := labels == k).sum() < least: continue
                y, x = np.unravel_index(distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1].argmax(), labels.shape)
                x, y = (int(np.clip(a - side // 2, 0, n - side)) for a, n in ((x, picture.width), (y, picture.height)))
                yield (i % PARTS if part == 'train' else None, name, file.stem,
                       picture.crop((x, y, x + side, y + side)))


def scans():
    "Half of the scans are tested; of the others a tenth of each class goes to each part."
    from sklearn.datasets import load_digits
    digits = load_digits()
    for k in range(10):
        mine = np.flatnonzero(digits.target == k)
        half = len(mine) // 2
        for i, at in enumerate(mine):
            image = Image.fromarray((digits.images[at] * 15.9).astype(np.uint8)).convert('RGB')
            yield None if i < half else (i - half) * PARTS // (len(mine) - half), str(k), f'{at:04}', image


def imagenette(source, each=250, tests=None):
    "The first files of each class; a second set, to find rates on, has four fifths of them, and the others to validate."
    root = unpacked(source)
    def picture(file):
        with Image.open(file) as image: return image.convert('RGB')
    for folder in sorted((root/'train').iterdir()):
        for i, file in enumerate(sorted(folder.iterdir())[:each]): yield i, folder.name, file.stem, picture(file)
    for folder in sorted((root/'val').iterdir()):
        for file in sorted(folder.iterdir())[:tests]: yield None, folder.name, file.stem, picture(file)


SETS = dict(imagenette=imagenette, cifar10=cifar10, clutter=clutter, cells=cells, roads=roads, scans=scans) | {
    'clutter-imagenette': clutter_imagenette}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', choices=SETS)
    parser.add_argument('source', nargs='?', help='folder or archive; none for scans')
    parser.add_argument('out', type=Path, help='folder to write to')
    asked = parser.parse_args()
    counts = {}   # of each class, by part; the test pictures are the last
    for part, kind, name, image in SETS[asked.name](*[asked.source] * (asked.source is not None)):
        if asked.name == 'imagenette':
            inner = [] if part is None else [('imagenette-2500-inner', 'val' if part % 5 == 4 else 'train')]
            places, part = [('imagenette-2500', 'val' if part is None else 'train'), *inner], part and 0
        else:
            places = [(f'{asked.name}-{at + 1:02}', 'val' if part is None else 'train')
                      for at in (range(PARTS) if part is None else [part])]
            if part == TUNED:
                fifth = counts.get(kind, [0] * PARTS)[part] % 5 == 4
                places.append((f'{asked.name}-{part + 1:02}-inner', 'val' if fifth else 'train'))
        for folder, which in places:
            (folder := asked.out/folder/which/kind).mkdir(parents=True, exist_ok=True)
            image.save(folder/f'{name}.png')
        row = counts.setdefault(kind, [0] * (PARTS + 1))
        row[PARTS if part is None else part] += 1
    for kind, (*parts, tests) in counts.items(): print(f"{kind}: {' '.join(map(str, parts))}; {tests} to test")


if __name__ == '__main__': main()
