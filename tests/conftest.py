"""One thread per worker: the tests run in as many workers as there are cores."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for commands that tests start

import torch

torch.set_num_threads(1)
