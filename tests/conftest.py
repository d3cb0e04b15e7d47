"""One thread: the tests' tensors are tiny, and threads that wait for each other cost more."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)
