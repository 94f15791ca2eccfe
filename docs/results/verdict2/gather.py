"""What the second comparison keeps of its runs, beside this file.

    python gather.py scratch runs-scratch                   # scratch.runs.csv and pictures/scratch.csv.gz
    python gather.py scratch runs-scratch --maps --data imagenette-2500     # maps/scratch.csv, from the weights

`NAME.runs.csv` is what `attnpool report` reads. The parts of a set are the seeds of one setting there: they have its
name without the part, and the mean number of training pictures. `pictures/NAME.csv.gz` has a row for each run: which of the validation
pictures, by name, it got right, as the bits of a hexadecimal number. `maps/NAME.csv` has a row for each run: where its
maps point, against the true boxes of made pictures, and what hiding the highest positions does to it.
Each call writes its files anew, the same bytes for the same runs.
"""
import argparse
import gzip
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from attnpool.report.collect import collect, write_runs
from attnpool.report.measures import measure_maps
from attnpool.runs.tested import read_predictions

HERE = Path(__file__).parent
PART = re.compile(r'-\d\d$')
NAMES = (
    'scratch', 'late', 'small', 'probes', 'finetune', 'finetune-long', 'sizes', 'screen', 'two-maps', 'rates', 'rates-long')


def joined(results):
    "Parts of a set as seeds of it."
    sets = {}
    for r in results: sets.setdefault(PART.sub('', r.spec.data.name), []).append(r)
    for name, rs in sets.items():
        if not PART.search(rs[0].spec.data.name): yield from rs; continue
        trained = round(np.mean([r.pictures[0] for r in rs]))
        for r in rs:
            data = replace(r.spec.data, name=name, fingerprint='')
            yield replace(r, spec=replace(r.spec, data=data), pictures=(trained, r.pictures[1]))


def answers(result):
    "Names of the validation pictures, sorted, and whether the run was right; made pictures have their number alone."
    table = read_predictions(result)
    names = table.path.where(table.path != '', [f'{i:06}' for i in range(len(table))])
    order = names.map(lambda n: '/'.join(Path(n).parts[-2:])).sort_values(kind='stable')
    return [*order], (table.label == table.said).to_numpy()[order.index]


def packed(results):
    "A row for each run. Runs of one set, whatever its part, have to have seen the same pictures."
    rows, seen = [], {}
    for r in results:
        if read_predictions(r) is None: continue   # diverged
        names, right = answers(r)
        first = seen.setdefault(PART.sub('', r.spec.data.name), names)
        if first != names: raise SystemExit(f'{r.folder}: not the validation pictures of the runs before it')
        rows.append(dict(data=PART.sub('', r.spec.data.name), head=r.spec.head, seed=r.spec.seed, pictures=len(right), right=np.packbits(right).tobytes().hex()))
    return pd.DataFrame(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', choices=NAMES)
    parser.add_argument('runs', nargs='+', help='folders of runs')
    parser.add_argument('--heads', help='only these, separated by commas')
    parser.add_argument('--maps', action='store_true', help='measure maps instead, which takes minutes')
    parser.add_argument('--data', help='with --maps: where the pictures are now')
    parser.add_argument('--no-check', action='store_true', help='with --maps: take these pictures as they are')
    asked = parser.parse_args()
    results, problems = collect(asked.runs)
    for line in problems: print(line)
    heads = asked.heads and asked.heads.split(',')
    done = [r for r in results if r.status in ('complete', 'diverged') and (not heads or r.spec.head in heads)]
    done.sort(key=lambda r: (r.spec.data.name, r.spec.head, r.spec.seed, str(r.spec.recipe)))
    if asked.maps:
        where = (dict(data=asked.data) if asked.data else {}) | (dict(check=False) if asked.no_check else {})
        rows = []
        for r in done:
            [row] = measure_maps([r], **where).to_dict('records')
            rows.append(dict(data=r.spec.data.name, seed=r.spec.seed, late=r.spec.recipe.late) | row)
            print(*rows[-1].values(), flush=True)
        out = HERE/'maps'/f'{asked.name}.csv'
        out.parent.mkdir(exist_ok=True)
        pd.DataFrame(rows).drop(columns=['runs', 'agreement']).round(5).to_csv(out, index=False)
        return
    write_runs([*joined(done)], HERE/f'{asked.name}.runs.csv')
    if not asked.name.startswith('rates'):
        (HERE/'pictures').mkdir(exist_ok=True)
        text = packed(done).to_csv(index=False).encode()
        (HERE/'pictures'/f'{asked.name}.csv.gz').write_bytes(gzip.compress(text, mtime=0))
    print(f'{len(done)} runs')


if __name__ == '__main__': main()
