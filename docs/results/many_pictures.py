"""What a data set of very many pictures costs before the first batch: seconds, and memory for each picture.

    python docs/results/many_pictures.py                # 100,000 tiny JPEGs
    python docs/results/many_pictures.py --n 1300000    # as many as ImageNet-1k has

The pictures are made in a temporary folder, in 1000 classes. Each step runs in a process of its own, so that its peak of
memory is its own.
"""
import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CLASSES = 1000
STEPS = dict(
    listing='find_pictures(root)',
    fingerprint='fingerprint(digests(listing))',
    check='check_pictures(listing, cache)',
    again='check_pictures(listing, cache)   # kept',
    batch='picture_dls(root, 16, 64, "cpu", cache=cache, cache_gb=0).train.one_batch()',
    order='dls.train.get_idxs()')


def make(root, n):
    "Tiny JPEGs, each with a comment of its own so that no two have the same bytes; a twentieth validates."
    import numpy as np
    from PIL import Image
    noise = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), np.uint8)
    bodies = []
    for pixels in noise:
        Image.fromarray(pixels).save(buffer := io.BytesIO(), 'JPEG')
        bodies.append(buffer.getvalue())
    for i in range(n):
        c, part = i % CLASSES, 'val' if i // CLASSES % 20 == 0 else 'train'
        folder = root/part/f'n{c:08}'
        if i < 40 * CLASSES: folder.mkdir(parents=True, exist_ok=True)
        comment, body = b'%d' % i, bodies[i % 64]
        (folder/f'n{c:08}_{i}.JPEG').write_bytes(body[:2] + b'\xff\xfe' + (len(comment) + 2).to_bytes(2, 'big') + comment + body[2:])


def step(name, root, cache):
    "Seconds and peak memory of one step, after what it needs."
    from attnpool.data.check import check_pictures
    from attnpool.data.listing import digests, fingerprint
    from attnpool.data.pictures import find_pictures, picture_dls
    def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    listing = find_pictures(root) if name in ('fingerprint', 'check', 'again') else None
    if name == 'order': dls = picture_dls(root, 16, 64, 'cpu', cache=cache, cache_gb=0)
    before, start = peak(), time.perf_counter()
    found = dict(
        listing=lambda: len(find_pictures(root).files), fingerprint=lambda: fingerprint(digests(listing)),
        check=lambda: check_pictures(listing, cache).looked, again=lambda: check_pictures(listing, cache).looked,
        batch=lambda: list(picture_dls(root, 16, 64, 'cpu', cache=cache, cache_gb=0).train.one_batch()[0].shape),
        order=lambda: len(dls.train.get_idxs()))[name]()
    return dict(step=name, seconds=round(time.perf_counter() - start, 1), memory=peak() - before, found=found)


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--n', type=int, default=100_000, help='Pictures to make.')
    parser.add_argument('--step', nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(step(args.step[0], Path(args.step[1]), Path(args.step[2]))))
        sys.exit()
    with tempfile.TemporaryDirectory() as tmp:
        start = time.perf_counter()
        make(root := Path(tmp)/'many', args.n)
        print(f'{args.n:,} pictures of {CLASSES} classes made in {time.perf_counter() - start:.0f} s; {os.cpu_count()} cores\n')
        print('| step | seconds | bytes a picture | what | gave |\n| --- | ---: | ---: | --- | --- |')
        for name, what in STEPS.items():
            words = [sys.executable, '-W', 'ignore', __file__, '--step', name, str(root), str(Path(tmp)/'cache')]
            out = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
            r = json.loads(out.splitlines()[-1])
            print(f"| {name} | {r['seconds']} | {r['memory'] / args.n:.0f} | `{what}` | {r['found']} |", flush=True)
