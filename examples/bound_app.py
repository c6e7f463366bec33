"""An application for `serve build examples.bound_app:app`, which prints a config file for `serve deploy`."""

from gptj_dist.serving.app import build

app = build({"model": "demo", "stages": 2, "device": "cpu", "cpus_per_stage": 0.4})
