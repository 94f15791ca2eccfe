"""Networks that were trained on made digits of 64 px, asked about digits of the same share of larger pictures.

    python digit_sizes.py runs-small        # digit_sizes/small.csv: accuracy at 96 and 128 px, without training
"""
import argparse
from functools import cache
from pathlib import Path

import pandas as pd
import torch

from attnpool.data.digits import digits_dls
from attnpool.report.collect import collect
from attnpool.runs.train import open_run

HEADS = 'avg', 'avgstart', 'maxstart'


@cache
def batches(data, size, stats):
    "The validation pictures of made digits, in another size, normalised as in the training."
    dls = digits_dls(size, share=1 / int(data.split('-')[1]), stats=stats, device='cpu')
    return [part for x, y in dls.valid for part in zip(x.split(16), y.split(16))]   # three times as quick as by 256


@torch.inference_mode()
def accuracy(model, dl):
    return float(torch.cat([model(x).argmax(1) == y for x, y in dl]).float().mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', help='folders of runs')
    parser.add_argument('--sizes', type=int, nargs='+', default=[96, 128], help='sides of the pictures, in px')
    asked, rows = parser.parse_args(), []
    for r in collect(asked.runs)[0]:
        if r.spec.head not in HEADS: continue
        learn = open_run(r.folder, 'cpu', with_data=False)
        norm = learn.dls.after_batch[-1]
        stats = tuple(tuple(t.flatten().tolist()) for t in (norm.mean, norm.std))
        for size in asked.sizes:
            its = batches(r.spec.data.name, size, stats)
            rows.append((r.spec.data.name, r.spec.head, r.spec.seed, size, accuracy(learn.model.eval(), its)))
            print(*rows[-1], flush=True)
    out = Path(__file__).parent/'digit_sizes'/'small.csv'
    out.parent.mkdir(exist_ok=True)
    table = pd.DataFrame(rows, columns=['data', 'head', 'seed', 'size', 'accuracy'])
    table.sort_values(['data', 'head', 'seed', 'size']).to_csv(out, index=False)


if __name__ == '__main__': main()
