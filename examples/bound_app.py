"""A bound application for `serve build`, which turns it into a config file: `serve build examples.bound_app:app`."""

from gptj_dist.serving.app import build

app = build({"model": "demo", "stages": 2, "device": "cpu", "cpus_per_stage": 0.4})
