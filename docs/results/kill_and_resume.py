"""Kill a run at random moments, make it again, and compare it with one that was left alone.

    python docs/results/kill_and_resume.py [KILLS [PROCESSES]]
    python docs/results/kill_and_resume.py cost

Each row of the table is a run of its own: killed by SIGKILL after so many seconds, made again by the same call.
`after` is the epoch that it went on after, 0 where it began anew; `equal` says whether its `history.csv` equals that
of the run that was left alone, but for the columns of seconds, and its weights to the last bit. All libraries are
loaded once, and the runs are forks of this process, so that the moments fall into the training, not into Python's
start. The recipe has what is hard to go on with: repeated pictures, steps of several batches, random changes of
pictures, mixing, stochastic depth, bf16.

`cost` measures what a checkpoint costs, and which share of the time that is at the default.
"""
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

warnings.filterwarnings('ignore')
import pandas as pd
import skimage.data
import torch
from PIL import Image
from attnpool.data.digits import digits_dls
from attnpool.recipe import recipe_learner
from attnpool.runs.checkpoint import Checkpoint
from attnpool.runs.spec import make_spec
from attnpool.runs.train import RunLog, run

RECIPE = dict(recipe='paper-small', arch='patchconvnet_tiny', head='paper', epochs=6, size=24, bs=16, micro_bs=4,
              repeats=3, lr=3e-3, drop_path=.1, augment='blog', precision='bf16')


def photos(folder):
    "Crops of two photos, which come with scikit-image: a folder of each."
    for name in ('chelsea', 'coffee'):
        photo, rng = Image.fromarray(getattr(skimage.data, name)()), random.Random(0)
        (here := Path(folder, 'photos', name)).mkdir(parents=True)
        for i in range(30):
            x, y = rng.randrange(photo.width - 60), rng.randrange(photo.height - 60)
            photo.crop((x, y, x + 60, y + 60)).resize((32, 32)).save(here/f'{i}.png')
    return Path(folder, 'photos')


def forked(spec, out, processes, killed_after=None):
    "Make the run in processes of its own; its seconds, and the epochs that it went on after."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    started, children, said = time.time(), [], out.with_suffix('.said')
    said.touch()
    for rank in range(processes):
        if child := os.fork():
            children.append(child)
            continue
        try:
            if processes > 1:
                os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                                   MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
            run(spec, out, 'cpu', checkpoint_seconds=0, on_checkpoint=lambda text, done: said.write_text(str(done)))
            os._exit(0)
        except BaseException: traceback.print_exc()
        finally: os._exit(1)
    if killed_after is not None:
        time.sleep(killed_after)
        for child in children: os.kill(child, signal.SIGKILL)
    ends = [os.waitpid(child, 0)[1] for child in children]
    assert killed_after is not None or not any(ends), 'the run failed'
    return time.time() - started, int(said.read_text() or 0)


def left(spec, out):
    "What a run left that has to be equal."
    history = pd.read_csv(out/spec.name/'history.csv', dtype=str).drop(columns=['seconds', 'train_seconds'])
    return history.to_csv(), (out/spec.name/'weights.safetensors').read_bytes()


def kill(kills=20, processes=1):
    "The table of kills."
    moments = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        spec = make_spec(photos(folder), **RECIPE)
        seconds, _ = forked(spec, alone := Path(folder, 'alone'), processes)
        whole, equal = left(spec, alone), 0
        print(f'{processes} process{"es" * (processes > 1)}, left alone: {seconds:.1f} s\nkill  at s  after  equal')
        for i in range(kills):
            at, out = moments.uniform(0, seconds), Path(folder, str(i))
            forked(spec, out, processes, at)
            _, after = forked(spec, out, processes)
            equal += (same := left(spec, out) == whole)
            print(f'{i + 1:4}  {at:4.1f}  {after:5}  {same}', flush=True)
    print(f'{equal} of {kills} equal')
    return equal == kills


def cost():
    "What a checkpoint costs, and which share of the time that is where the next one is due after 60 seconds."
    print('network            weights  file MB  seconds  share')
    for arch, size in (('xeca_resnext_tiny', 40), ('xeca_resnext50s', 64), ('patchconvnet_s60', 64)):
        with tempfile.TemporaryDirectory() as folder:
            spec, seconds = make_spec('digits', 'avg', arch=arch, size=size, opt='adam', lr=1e-3), []
            Path(folder).joinpath('run').mkdir()
            checkpoint = Checkpoint(Path(folder, 'run'), spec, torch.device('cpu'), 0)
            class Timed(RunLog):
                def after_epoch(self):
                    start = time.perf_counter()
                    super().after_epoch()
                    seconds.append(time.perf_counter() - start)
            learn = recipe_learner(digits_dls(size, 8, 'cpu', n_train=8, n_valid=8), arch, 'avg', epochs=3, lr=1e-3,
                                   cbs=Timed(Path(folder, 'history.csv'), checkpoint=checkpoint))
            with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
            n, took = sum(p.numel() for p in learn.model.parameters()), sorted(seconds)[1]
            size, share = checkpoint.path.stat().st_size / 1e6, took / (took + max(60, 100 * took))
            print(f'{arch:<18} {n:8,} {size:8.1f} {took:8.2f} {share:6.2%}', flush=True)


if __name__ == '__main__':
    if sys.argv[1:] == ['cost']: cost()
    else: sys.exit(not kill(*map(int, sys.argv[1:])))
