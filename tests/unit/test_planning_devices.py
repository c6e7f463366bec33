"""Descriptions of devices: what they may say, and how a wrong one is refused."""

from __future__ import annotations

import pytest

from gptj_dist.errors import ConfigurationError
from gptj_dist.planning.devices import (
    GPU_BANDWIDTH_EFFICIENCY,
    GPU_FLOPS_EFFICIENCY,
    KNOWN_DEVICES,
    known_device,
    parse_devices,
)


def test_a_known_gpu_has_its_published_figures_times_the_stated_efficiency() -> None:
    h200 = known_device("h200")
    assert h200.memory_bytes == 141e9
    assert h200.bandwidth_bytes_s == pytest.approx(4.8e12 * GPU_BANDWIDTH_EFFICIENCY)
    assert h200.flops == pytest.approx(989e12 * GPU_FLOPS_EFFICIENCY)


def test_the_names_that_people_expect_are_known() -> None:
    assert {"h200", "a100-80", "l4", "t4", "rtx-3060", "cpu"} <= set(KNOWN_DEVICES)


def test_old_gpus_are_not_said_to_be_good_at_bfloat16() -> None:
    assert "bfloat16" not in known_device("t4").fast_dtypes
    assert "bfloat16" in known_device("l4").fast_dtypes


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("H200", "h200"),
        ("NVIDIA H100", "h100"),
        ("RTX 3060", "rtx-3060"),
        ("GeForce_RTX_4090", "rtx-4090"),
        ("Tesla T4", "t4"),
        ("A100-80GB", "a100-80"),
        ("a100", "a100-40"),
        ("CPU", "cpu"),
    ],
)
def test_case_spaces_and_the_makers_name_do_not_matter(name: str, known: str) -> None:
    assert known_device(name) == known_device(known)
    assert parse_devices({"devices": [{"name": name, "tflops": 9}]})[0].name == known


def test_names_and_counts_become_devices_in_their_order() -> None:
    devices = parse_devices({"devices": ["l4", {"name": "t4", "count": 2}, "cpu"]})
    assert [device.name for device in devices] == ["l4", "t4", "t4", "cpu"]
    assert devices[0] == known_device("l4")


def test_a_figure_that_is_given_replaces_the_known_one_and_is_taken_as_it_is() -> None:
    (device,) = parse_devices({"devices": [{"name": "t4", "bandwidth_gb_s": 250, "layer_overhead_us": 7}]})
    assert device.bandwidth_bytes_s == device.kv_bandwidth_bytes_s == 250e9
    assert device.layer_overhead_s == pytest.approx(7e-6)
    assert device.flops == known_device("t4").flops


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_device_of_ones_own_needs_a_kind_and_three_figures(kind: str) -> None:
    own = {"name": "mine", "kind": kind, "memory_gb": 8, "bandwidth_gb_s": 448, "tflops": 25}
    (device,) = parse_devices({"devices": [own]})
    assert (device.name, device.kind, device.memory_bytes) == ("mine", kind, 8e9)
    assert (device.bandwidth_bytes_s, device.flops) == (448e9, 25e12)
    assert 0 < device.float32_flops < device.flops


def test_the_link_is_for_all_devices_but_those_with_their_own() -> None:
    description = {"link_gb_s": 12.5, "link_latency_us": 20, "devices": ["l4", {"name": "t4", "link_gb_s": 0.125}]}
    l4, t4 = parse_devices(description)
    assert (l4.link_bytes_s, t4.link_bytes_s) == (12.5e9, 0.125e9)
    assert l4.link_latency_s == t4.link_latency_s == pytest.approx(20e-6)


def test_without_a_word_links_are_of_10_gbit() -> None:
    assert parse_devices({"devices": ["l4"]})[0].link_bytes_s == 1.25e9


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (None, "has a list named 'devices'"),
        (["l4"], "has a list named 'devices'"),
        ({"devices": "l4"}, "has a list named 'devices'"),
        ({"devices": []}, "'devices' is empty"),
        ({"devices": ["l4"], "link_gbs": 1}, "unknown setting 'link_gbs': did you mean 'link_gb_s'?"),
        ({"devices": ["l4"], "link_gb_s": 0}, r"link_gb_s must be a positive number, got 0"),
        ({"devices": [7]}, r"devices\[0\] must be a known name, or a mapping with a name"),
        ({"devices": ["l4", {"count": 2}]}, r"devices\[1\] must be a known name, or a mapping with a name"),
        ({"devices": ["a100-8"]}, "'a100-8': did you mean 'a100-80'"),
        ({"devices": ["zx81"]}, "'zx81': known are .*; or give its own: kind, memory_gb, bandwidth_gb_s, tflops"),
        ({"devices": [{"name": "t4", "memry_gb": 8}]}, r"devices\[0\] \(t4\): .*did you mean 'memory_gb'"),
        ({"devices": [{"name": "t4", "count": 0}]}, "count must be a whole number from 1 to 256, got 0"),
        ({"devices": [{"name": "t4", "count": True}]}, "count must be a whole number from 1 to 256, got True"),
        ({"devices": [{"name": "t4", "count": 10**9}]}, "count must be a whole number from 1 to 256, got 1000000000"),
        ({"devices": [{"name": "t4", "count": 200}] * 2}, "may describe 256 devices, got 400"),
        ({"devices": [{"name": "t4", "memory_gb": float("inf")}]}, "memory_gb must be a positive number, got inf"),
        ({"devices": [{"name": "t4", "tflops": -1}]}, "tflops must be a positive number, got -1"),
        ({"devices": [{"name": "t4", "memory_gb": "16"}]}, "memory_gb must be a positive number, got '16'"),
        ({"devices": [{"name": "t4", "memory_gb": float("nan")}]}, "memory_gb must be a positive number, got nan"),
        ({"devices": [{"name": "t4", "kind": "gpu"}]}, "kind must be cpu or cuda, got 'gpu'"),
        ({"devices": [{"name": "t4", "kind": "cpu"}]}, "t4 is of kind cuda, not cpu"),
        ({"devices": [{"name": "h20", "kind": "cuda", "memory_gb": 8, "tflops": 1}]}, "did you mean 'h200'"),
    ],
)
def test_a_wrong_description_is_refused_in_words(description: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse_devices(description)
