"""The comparisons of the second protocol, from the CSV files beside this module."""
from functools import cache, reduce
from pathlib import Path

import numpy as np
import pandas as pd

from attnpool.report.collect import collect
from attnpool.report.difference import Difference, crossed, holm, over_sets, paired
from attnpool.report.stats import guess_of

HERE = Path(__file__).parent
REAL = 'cifar10', 'cells', 'roads', 'scans'   # not ImageNet's classes
DIGITS = 'digits-3', 'digits-6', 'digits-8'
SAME = {'avgstart': 'avg', 'maxstart': 'fastai', 'avgstart-fastai': 'avg-fastai'}   # behind the same classifier


@cache
def runs(name):
    "Results of a setting; none where its runs are not there yet."
    file = HERE/f'{name}.runs.csv'
    return collect([file])[0] if file.exists() else []


def values(name, head, data=None, size=None):
    "Accuracy by seed, a share; at another size of the pictures than the training's, if given."
    its = [r for r in runs(name) if r.spec.head == head and data in (None, r.spec.data.name)]
    def value(r):
        if r.status != 'complete': return guess_of([r])   # it diverged
        return r.sizes[str(size)]['accuracy'] if size and size != r.spec.recipe.size else r.value
    return {r.spec.seed: value(r) for r in its}


def mean_of_sets(name, head, sets):
    "Accuracy by seed, the mean over data sets, of the seeds that all of them have."
    each = [values(name, head, data) for data in sets]
    seeds = reduce(set.intersection, (set(v) for v in each))
    return {s: float(np.mean([v[s] for v in each])) for s in seeds}


def against(name, a, b, data=None, size=None, other_size=None):
    "The paired difference of two heads; `other_size` is that of the second, if it is another."
    return paired(values(name, a, data, size), values(name, b, data, other_size or size))


@cache
def answers(name):
    "(data, head) -> seed -> whether each picture is right; pictures in the same order for all of a set."
    table = pd.read_csv(HERE/'pictures'/f'{name}.csv.gz')
    out = {}
    for r in table.itertuples():
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(r.right), np.uint8))[:r.pictures]
        out.setdefault((r.data, r.head), {})[r.seed] = bits
    return out


def with_pictures(name, a, b, data):
    "The difference of two heads as a sample of both trainings and test pictures."
    first, second = answers(name)[data, a], answers(name)[data, b]
    seeds = sorted(first.keys() & second.keys())
    return crossed(*(np.array([its[s] for s in seeds]) for its in (first, second)))


def probes(a, b, given=False, sets=REAL):
    "The mean difference over data sets, as sets like these or as these."
    return over_sets([with_pictures('probes', a, b, data) for data in sets], given)


def small(a, b): return paired(*(mean_of_sets('small', head, DIGITS) for head in (a, b)))


def finetuned(a, b, name='finetune'):
    "Over trainings, the same number on each set."
    def every(head): return {(data, seed): v for data in REAL for seed, v in values(name, head, data).items()}
    return paired(every(a), every(b))


def larger(head, data, size):
    "Accuracy by seed on made digits of the same share in pictures of another size, in px; at 64 of the runs themselves."
    if size == 64: return values('small', head, data)
    table = pd.read_csv(HERE/'digit_sizes/small.csv')
    return table[(table['head'] == head) & (table.data == data) & (table['size'] == size)].set_index('seed').accuracy.to_dict()


def late(size=None): return paired(values('late', 'avgstart', size=size), values('scratch', 'avg', size=size))


def chosen(*data, name='rates'):
    "The rate and decay with which each head had the lowest loss at the end, the mean over the sets; 0 is the optimizer's own."
    its = pd.DataFrame([dict(head=r.spec.head, lr=r.spec.recipe.lr, wd=r.spec.recipe.wd or 0., data=r.spec.data.name,
                             loss=r.metrics['valid_loss']) for r in runs(name) if r.spec.data.name in data])
    loss = its.pivot(index=['head', 'lr', 'wd'], columns='data', values='loss').mean(axis=1, skipna=False)
    return {head: loss[head].idxmin() for head in dict.fromkeys(its['head'])}


def better_baseline(name, data=None):
    "The one of `avg` and `fastai` with the higher mean."
    return max(('avg', 'fastai'), key=lambda head: np.mean([*values(name, head, data).values()]))


def verdicts(rows, correct=True):
    "A table of differences in points, with what may be said of each."
    p = holm([d.p for d in rows.values()])
    def line(d, corrected):
        low, high = (100 * v for v in d.interval())
        return {'points': f'{100 * d.mean:+.2f}', '95%': f'{low:+.2f} to {high:+.2f}', 'n': d.n, 'p': f'{d.p:.2g}',
                "Holm's p": f'{corrected:.2g}', 'seen with 80%': f'{100 * d.seen():.2f}', 'verdict': d.verdict()}
    table = pd.DataFrame([line(*pair) for pair in zip(rows.values(), p)], index=[*rows])
    return table if correct and len(rows) > 1 else table.drop(columns="Holm's p")


def accuracies(name, data=None, size=None):
    "Mean and standard deviation over trainings in percent, of each head."
    heads = dict.fromkeys(r.spec.head for r in runs(name) if data in (None, r.spec.data.name))
    its = {h: 100 * np.array([*values(name, h, data, size).values()]) for h in heads}
    return pd.Series({h: f'{v.mean():.1f} ± {v.std(ddof=1):.1f}' if len(v) > 1 else f'{v.mean():.1f}' for h, v in its.items()})


def maps(name, a, b, measure, data=None):
    "The paired difference of a measure of maps, a share."
    table = pd.read_csv(HERE/'maps'/f'{name}.csv')
    if data: table = table[table.data == data]
    a, b = (table[table['head'] == h].set_index('seed')[measure].to_dict() for h in (a, b))
    return paired(a, b)
