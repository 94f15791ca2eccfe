"""Cuts the cells out of the BCCD blood smears by their boxes: one picture a cell, a folder a class, for `attnpool`.

    git clone https://github.com/Shenggan/BCCD_Dataset
    python blood_cells.py BCCD_Dataset/BCCD cells
    attnpool data cells

Which smear trains and which validates is the data set's own split (`ImageSets/Main`: `train`; `val` and `test`), so that
no smear is on both sides. A cell stands in the middle of a square, with its neighbours around it: the margin makes the
square 2.5 times as wide as the cell. Of each class as many cells as asked for, the same each time.
"""
import argparse
import random
import re
from pathlib import Path

from PIL import Image

SPLITS = {'train': ['train'], 'val': ['val', 'test']}   # folder, lists of smears
NAMES = {'RBC': 'red cell', 'WBC': 'white cell', 'Platelets': 'platelet'}


def boxes(annotation):
    "`(class, (left, top, right, bottom))` of each cell of a smear."
    for cell in re.findall(r'<object>(.*?)</object>', annotation.read_text(), re.S):
        yield re.search(r'<name>(.*?)</name>', cell)[1], [int(re.search(rf'<{side}>(\d+)<', cell)[1]) for side in
                                                          ('xmin', 'ymin', 'xmax', 'ymax')]


def square(box, margin, width, height):
    "The square around a box with a margin, moved and cut so that it lies inside the smear; None for a box without area."
    left, top, right, bottom = box
    side = min(round((1 + margin) * max(right - left, bottom - top)), width, height)
    if min(right - left, bottom - top) < 8: return None
    x, y = ((a + b - side) // 2 for a, b in ((left, right), (top, bottom)))
    x, y = (max(0, min(at, whole - side)) for at, whole in ((x, width), (y, height)))
    return x, y, x + side, y + side


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('smears', type=Path, help='folder with JPEGImages, Annotations and ImageSets')
    parser.add_argument('out', type=Path, help='folder to write, as out/train/CLASS and out/val/CLASS')
    parser.add_argument('--margin', type=float, default=1.5, help='added to the longer side of a box, as a share of it')
    parser.add_argument('--side', type=int, default=128, help='side of the pictures in pixels')
    parser.add_argument('--train', type=int, default=100, help='training cells of each class, at most')
    parser.add_argument('--val', type=int, default=150, help='validation cells of each class, at most')
    asked = parser.parse_args()
    for part, lists in SPLITS.items():
        smears = [name for one in lists for name in (asked.smears/f'ImageSets/Main/{one}.txt').read_text().split()]
        cells = {kind: [] for kind in NAMES}
        for name in sorted(smears):
            for number, (kind, box) in enumerate(boxes(asked.smears/f'Annotations/{name}.xml')):
                cells[kind].append((name, number, box))
        for kind, found in cells.items():
            (folder := asked.out/part/NAMES[kind]).mkdir(parents=True, exist_ok=True)
            random.Random(0).shuffle(found)
            written = 0
            for name, number, box in found:
                with Image.open(asked.smears/f'JPEGImages/{name}.jpg') as smear:
                    where = square(box, asked.margin, *smear.size)
                    if where is None or written == getattr(asked, part): continue
                    cell = smear.convert('RGB').crop(where).resize((asked.side, asked.side), Image.LANCZOS)
                cell.save(folder/f'{name}-{number}.png')
                written += 1
            print(f'{part}: {written} of {len(found)} {NAMES[kind]}s')


if __name__ == '__main__': main()
