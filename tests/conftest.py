import atexit
import os
import shutil
import tempfile
import warnings

import pytest
import torch

warnings.filterwarnings("ignore", category=FutureWarning)

os.environ["ATTNPOOL_CACHE"] = tempfile.mkdtemp(prefix="attnpool-")   # not the user's own; processes that tests start have it too
atexit.register(shutil.rmtree, os.environ["ATTNPOOL_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available(): return
    for item in items:
        if "cuda" in item.keywords: item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


@pytest.fixture(scope="session")
def dls():
    "Few small pictures, quick to train on."
    from attnpool.data.digits import digits_dls
    return digits_dls(size=64, bs=16, n_train=48, n_valid=16)
