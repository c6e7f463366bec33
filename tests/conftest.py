"""What holds for all tests: a Ray that is started stays on loopback, and without a GPU Triton interprets its kernels.
Both read these variables when they are imported.
"""

import os

import torch

from gptj_dist.operate.launcher import LOCAL_RAY_ENVIRONMENT

os.environ.update(LOCAL_RAY_ENVIRONMENT)
os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
