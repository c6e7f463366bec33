"""What holds for all tests: Ray, where one is started, stays on loopback. It reads these variables when imported."""

import os

from gptj_dist.serving.launcher import LOCAL_RAY_ENVIRONMENT

os.environ.update(LOCAL_RAY_ENVIRONMENT)
os.environ["HF_HUB_OFFLINE"] = "1"
