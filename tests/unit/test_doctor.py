"""`gptj-dist doctor`: what it finds in crafted facts, with which cure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from gptj_dist.config import DEFAULT_APP_NAME, LayerRange, ModelConfig, PipelineConfig
from gptj_dist.operate.doctor.cluster import Cluster, Finding, Node, SilentNode, this_machine
from gptj_dist.operate.doctor.facts import PACKAGES, DeviceFacts, ModelFacts, NodeFacts
from gptj_dist.operate.doctor.findings import find_in_nodes
from gptj_dist.operate.doctor.fit import find_in_plan
from gptj_dist.planning.cost import PROCESS_BYTES
from gptj_dist.stages.blueprint import Blueprint, DeviceReport
from gptj_dist.token_rules import TokenRules

GB = 10**9
VERSIONS: Mapping[str, str | None] = {
    **dict.fromkeys(PACKAGES, "1.0.0"),
    "python": "3.11.7",
    "gptj-dist": "0.1.0",
    "torch": "2.13.0+cpu",
}
GPTJ_6B = ModelConfig(
    vocab_size=50400, num_layers=28, d_model=4096, num_heads=16, rotary_dim=64, d_ff=16384, context_length=2048,
    eos_token_ids=(50256,), dtype="float16",
)  # fmt: skip
CONFIG = PipelineConfig("gptj", dtype="bfloat16", device="cpu", stages=2)


def cpu(host: str, free_gb: float) -> DeviceFacts:
    report = DeviceReport("cpu", f"{host}/cpu", 8, 64 * GB, ("float32", "bfloat16"))
    return DeviceFacts("cpu", report, int(free_gb * GB))


def gpu(host: str, index: int, free_gb: float = 16) -> DeviceFacts:
    report = DeviceReport("NVIDIA T4", f"{host}/GPU-{index}", 8, 16 * GB, ("float32", "float16"))
    return DeviceFacts("cuda", report, int(free_gb * GB))


def facts(host: str = "alpha", *, free_gb: float = 50, num_gpus: int = 0, **changes: Any) -> NodeFacts:
    """A healthy machine."""
    healthy = NodeFacts(
        host=host,
        versions=VERSIONS,
        torch_cuda=None,
        torch_error=None,
        driver=None,
        num_gpus=num_gpus,
        num_cpus=8,
        devices=(cpu(host, free_gb), *(gpu(host, i) for i in range(num_gpus))),
        compiler="/usr/bin/gcc",
        max_open_files=65536,
        max_open_files_hard=65536,
        shm_total_bytes=30 * GB,
        shm_free_bytes=30 * GB,
        hub_cache="/cache",
        hub_cache_free_bytes=100 * GB,
        listen_error=None,
        model=ModelFacts(config=GPTJ_6B),
    )
    return replace(healthy, **changes)


def cluster(*members: NodeFacts, cpus: float = 8, gpus: float | None = None, **changes: Any) -> Cluster:
    """A running cluster of these machines, each at an address of its own."""
    nodes = tuple(
        Node(
            f"node {i}",
            f"10.0.0.{i}",
            member,
            {"CPU": cpus, "GPU": len(member.gpus) if gpus is None else gpus, "object_store_memory": 10 * GB},
        )
        for i, member in enumerate(members, start=1)
    )
    free = {"CPU": cpus * len(nodes), "GPU": sum(node.resources["GPU"] for node in nodes)}
    return replace(Cluster(nodes, VERSIONS, is_running=True, free=free), **changes)


def plan(*layers: int, **settings: Any) -> Blueprint:
    """GPT-J-6B, cut as told."""
    stops = [sum(layers[: i + 1]) for i in range(len(layers))]
    ranges = [LayerRange(i, len(layers), stop - n, stop) for i, (n, stop) in enumerate(zip(layers, stops, strict=True))]
    config = replace(CONFIG, stages=len(layers), **settings)
    return Blueprint(config, GPTJ_6B, tuple(ranges), config.max_model_len or 2048, rules=TokenRules(50400))


def only(findings: Sequence[Finding], subject: str) -> Finding:
    """The one finding about the subject."""
    (finding,) = [finding for finding in findings if finding.subject == subject]
    return finding


def troubles(findings: Sequence[Finding]) -> list[str]:
    return [f"{finding.severity} {finding.subject}" for finding in findings if finding.severity != "ok"]


def without(package: str) -> Mapping[str, str | None]:
    return {**VERSIONS, package: None}


# Nodes


def test_healthy_nodes_are_all_described_and_nothing_is_wrong() -> None:
    healthy = cluster(facts("alpha"), facts("beta"))
    findings = [*find_in_nodes(healthy, CONFIG), *find_in_plan(healthy, plan(14, 14))]
    assert troubles(findings) == []
    assert all(finding.cure is None for finding in findings)
    assert "alpha (10.0.0.1): Python 3.11.7, ray 1.0.0, torch 2.13.0+cpu, 8 CPUs" in only(findings, "node 1").what
    assert "beta (10.0.0.2)" in only(findings, "node 2").what


def test_a_node_that_does_not_answer_is_a_failure_and_a_cluster_of_such_nodes_no_crash() -> None:
    silent = (SilentNode("node 1", "10.0.0.1", "No module named 'gptj_dist'"),)
    nobody = cluster(silent=silent)
    findings = find_in_nodes(nobody, CONFIG)
    assert troubles(findings) == ["failure node 1"]
    assert "No module named" in findings[0].what
    assert "install the same gptj-dist there" in (findings[0].cure or "")
    assert "failure placement" in troubles(find_in_plan(nobody, plan(14, 14)))


@pytest.mark.parametrize(
    ("subject", "package", "version", "severity"),
    [
        ("Python", "python", "3.12.1", "failure"),
        ("Python", "python", "3.11.9", "warning"),
        ("ray", "ray", "2.61.0", "failure"),
        ("gptj-dist", "gptj-dist", "0.2.0", "failure"),
        ("torch", "torch", "2.12.0", "warning"),
        ("msgspec", "msgspec", "9", "warning"),
    ],
)
def test_versions_that_differ_are_told_with_their_places(
    subject: str, package: str, version: str, severity: str
) -> None:
    other = facts("beta", versions={**VERSIONS, package: version})
    findings = find_in_nodes(cluster(facts("alpha"), other), CONFIG)
    assert troubles(findings) == [f"{severity} {subject}"]
    finding = only(findings, subject)
    assert f"{version} in node 2" in finding.what
    assert f"{VERSIONS[package]} in node 1" in finding.what
    assert "the same" in (finding.cure or "")


def test_this_process_must_agree_with_the_cluster() -> None:
    elsewhere = cluster(facts(), versions_here={**VERSIONS, "gptj-dist": "0.3.0"})
    finding = only(find_in_nodes(elsewhere, CONFIG), "gptj-dist")
    assert finding.severity == "failure"
    assert "0.3.0 in this process" in finding.what


def test_builds_of_one_torch_for_cpu_and_gpu_nodes_agree() -> None:
    other = facts("beta", versions={**VERSIONS, "torch": "2.13.0+cu130"})
    assert troubles(find_in_nodes(cluster(facts("alpha"), other), CONFIG)) == []


def test_a_missing_package_is_a_failure_with_the_command_that_installs_it() -> None:
    finding = only(find_in_nodes(cluster(facts(versions=without("msgspec"))), CONFIG), "packages")
    assert (finding.severity, finding.what) == ("failure", "node 1 lacks msgspec")
    assert "pip install msgspec" in (finding.cure or "")


def test_a_torch_that_cannot_be_imported_is_a_failure_and_ends_no_other_check() -> None:
    broken = cluster(facts(devices=(), torch_error="torch cannot be imported: libgomp.so.1"))
    findings = [*find_in_nodes(broken, CONFIG), *find_in_plan(broken, plan(28))]
    assert troubles(findings) == ["failure torch", "warning memory"]
    assert "libgomp" in only(findings, "torch").what


@pytest.mark.parametrize(
    ("changes", "cure"),
    [
        ({}, "install a CUDA build of torch"),
        ({"torch_cuda": "13.0"}, "docker run --gpus all"),
        ({"torch_cuda": "13.0", "driver": "535.1"}, "update the NVIDIA driver of node 1"),
    ],
)
def test_gpus_that_torch_does_not_see_fail_unless_the_device_is_the_cpu(changes: dict[str, Any], cure: str) -> None:
    unseen = cluster(facts(**changes), gpus=2)
    finding = only(find_in_nodes(unseen, replace(CONFIG, device="auto")), "GPU")
    assert finding.severity == "failure"
    assert "Ray counts 2 on node 1" in finding.what
    assert cure in (finding.cure or "")
    assert "--device cpu" in (finding.cure or "")
    assert troubles(find_in_nodes(unseen, CONFIG)) == []
    assert troubles(find_in_nodes(unseen, None)) == ["warning GPU"]


def test_a_gpu_that_breaks_says_torchs_own_words() -> None:
    broken = cluster(facts(torch_cuda="13.0", torch_error="CUDA error: device busy"), gpus=1)
    assert "device busy" in only(find_in_nodes(broken, replace(CONFIG, device="cuda")), "GPU").what


def test_cuda_without_any_gpu_is_a_failure() -> None:
    finding = only(find_in_nodes(cluster(facts()), replace(CONFIG, device="cuda")), "GPU")
    assert (finding.severity, finding.what) == ("failure", "device is cuda, but Ray counts no GPU")
    assert finding.cure


def test_a_node_without_a_compiler_is_a_warning_where_stages_are_on_cpus() -> None:
    bare = cluster(facts("alpha"), facts("beta", compiler=None))
    for config in (CONFIG, replace(CONFIG, device="auto"), None):
        finding = only(find_in_nodes(bare, config), "C compiler")
        assert (finding.severity, "node 2 has none" in finding.what) == ("warning", True)
        assert "install gcc on node 2" in (finding.cure or "")
    with_gpus = cluster(facts(compiler=None, num_gpus=1))
    for device in ("auto", "cuda"):
        assert troubles(find_in_nodes(with_gpus, replace(CONFIG, device=device))) == []


@pytest.mark.parametrize(("soft", "severity"), [(1023, "failure"), (1024, "warning"), (4095, "warning"), (4096, "ok")])
def test_few_open_files_on_a_cluster_are_told_with_the_command_that_allows_more(soft: int, severity: str) -> None:
    finding = only(find_in_nodes(cluster(facts(max_open_files=soft)), CONFIG), "open files")
    assert finding.severity == severity
    assert (finding.cure is None) == (severity == "ok")
    assert severity == "ok" or "ulimit -n 65536" in (finding.cure or "")


@pytest.mark.parametrize(("hard", "severity"), [(65536, "ok"), (2000, "warning")])
def test_a_ray_that_is_started_here_raises_the_soft_limit_itself(hard: int, severity: str) -> None:
    here = this_machine(facts(max_open_files=256, max_open_files_hard=hard))
    assert only(find_in_nodes(here, CONFIG), "open files").severity == severity


def test_a_small_dev_shm_is_a_warning_with_dockers_option() -> None:
    finding = only(find_in_nodes(cluster(facts(shm_total_bytes=64_000_000)), CONFIG), "/dev/shm")
    assert finding.severity == "warning"
    assert "--shm-size=11gb" in (finding.cure or "")
    here = this_machine(facts(free_gb=10, shm_free_bytes=64_000_000))
    assert "--shm-size=4gb" in (only(find_in_nodes(here, CONFIG), "/dev/shm").cure or "")


def test_two_machines_of_one_name_are_a_warning() -> None:
    finding = only(find_in_nodes(cluster(facts("same"), facts("same")), CONFIG), "host name")
    assert finding.severity == "warning"
    assert "10.0.0.1 and 10.0.0.2 call themselves same" in finding.what
    assert "host name of its own" in (finding.cure or "")


def test_nodes_that_do_not_reach_each_other_are_a_failure() -> None:
    apart = cluster(facts("alpha"), facts("beta"), broken_links=("node 1 cannot reach node 2",))
    finding = only(find_in_nodes(apart, CONFIG), "network")
    assert finding.severity == "failure"
    assert "open TCP ports" in (finding.cure or "")


def test_a_port_in_use_is_a_failure_unless_serve_runs_already_and_has_its_own() -> None:
    taken = facts(listen_error="cannot listen at 127.0.0.1:80: Permission denied")
    finding = only(find_in_nodes(cluster(taken), CONFIG), "address")
    assert finding.severity == "failure"
    assert "Permission denied" in finding.what
    assert "--port" in (finding.cure or "")
    served = cluster(taken, applications=("other",), serve_address="0.0.0.0:8000")
    finding = only(find_in_nodes(served, CONFIG), "address")
    assert finding.severity == "ok"
    assert "0.0.0.0:8000" in finding.what


def test_an_application_of_our_name_is_a_failure() -> None:
    served = cluster(facts(), applications=(DEFAULT_APP_NAME,), serve_address="127.0.0.1:8000")
    finding = only(find_in_nodes(served, CONFIG), "Serve")
    assert finding.severity == "failure"
    assert "gptj-dist stop --address" in (finding.cure or "")


# Plans


def test_a_model_that_a_node_lacks_or_has_differently_is_a_failure() -> None:
    lacking = facts("beta", model=ModelFacts(error="there is no directory /models/gptj"))
    finding = only(find_in_plan(cluster(facts("alpha"), lacking), plan(14, 14)), "model")
    assert (finding.severity, finding.what) == ("failure", "node 2: there is no directory /models/gptj")
    assert "on every node" in (finding.cure or "")
    other = facts("beta", model=ModelFacts(config=replace(GPTJ_6B, num_layers=12)))
    finding = only(find_in_plan(cluster(facts("alpha"), other), plan(14, 14)), "model")
    assert finding.severity == "failure"
    assert "node 2 is another model" in finding.what
    assert finding.cure


def test_stages_that_no_node_takes_are_a_failure_and_memory_is_said_to_be_unchecked() -> None:
    findings = find_in_plan(cluster(facts(), cpus=4), plan(14, 14, cpus_per_stage=3))
    assert troubles(findings) == ["failure placement", "warning memory"]
    assert "6.1 CPUs, each for 3 CPUs; the nodes have 4 CPUs" in only(findings, "placement").what
    assert "--cpus-per-stage" in (only(findings, "placement").cure or "")


def test_a_stage_larger_than_any_node_is_a_failure_even_if_the_cluster_has_enough() -> None:
    findings = find_in_plan(cluster(facts("alpha"), facts("beta"), cpus=4), plan(28, cpus_per_stage=6))
    assert only(findings, "placement").severity == "failure"


def test_a_busy_cluster_is_a_warning() -> None:
    finding = only(find_in_plan(cluster(facts(), free={"CPU": 1.0}), plan(14, 14)), "placement")
    assert finding.severity == "warning"
    assert "free are 1 CPU" in finding.what
    assert "gptj-dist nodes" in (finding.cure or "")


def test_weights_that_do_not_fit_are_a_failure_that_says_need_and_room() -> None:
    findings = find_in_plan(cluster(facts(free_gb=10)), plan(14, 14))
    assert troubles(findings) == ["failure memory"]
    finding = only(findings, "memory")
    # 12.1 GB of weights; a layer of 0.403 GB and 0.5 GB of working memory for each stage.
    assert "2 stages need 12.1 GB of weights in bfloat16 and 1.8 GB to work with; of 10.0 GB free" in finding.what
    assert finding.cure


def test_float32_weights_that_do_not_fit_are_told_of_the_smaller_type() -> None:
    finding = only(find_in_plan(cluster(facts(free_gb=20)), plan(14, 14, dtype="float32")), "memory")
    assert "24.2 GB" in finding.what
    assert "--dtype bfloat16" in (finding.cure or "")


def test_ray_packs_stages_onto_one_node_whatever_its_memory_until_cpus_spread_them() -> None:
    two = cluster(facts("alpha", free_gb=13), facts("beta", free_gb=13))
    packed = only(find_in_plan(two, plan(14, 14)), "memory")
    assert packed.severity == "failure"
    assert "--cpus-per-stage" in (packed.cure or "")
    spread = find_in_plan(two, plan(14, 14, cpus_per_stage=7))
    assert troubles(spread) == []
    assert "node 1, node 2" in only(spread, "placement").what


def test_nodes_on_one_machine_share_its_memory() -> None:
    findings = find_in_plan(cluster(facts(free_gb=14), facts(free_gb=14), cpus=1), plan(14, 14, cpus_per_stage=0.9))
    assert "node 1 and node 2" in only(findings, "memory").what
    assert only(findings, "memory").severity == "failure"


def test_stages_fill_one_gpu_after_the_other() -> None:
    two_gpus = cluster(facts(num_gpus=2))
    assert troubles(find_in_plan(two_gpus, plan(14, 14, device="cuda"))) == []
    one_gpu = find_in_plan(two_gpus, plan(14, 14, device="cuda", gpus_per_stage=0.5, dtype="float32"))
    assert "2 stages need 24.2 GB" in only(one_gpu, "memory").what
    assert "--gpus-per-stage 1" in (only(one_gpu, "memory").cure or "")


def test_memory_for_less_than_the_full_context_is_a_warning_and_for_no_token_a_failure() -> None:
    tight = 12.1 + 2 * 0.403 + 2 * PROCESS_BYTES["cpu"] / GB + 0.05 * 64
    # A token takes 0.46 MB of a CPU's cache in all layers; `auto` takes half of what is left.
    enough = find_in_plan(cluster(facts(free_gb=tight + 2.05)), plan(14, 14))
    assert troubles(enough) == []
    assert "1 request of the full context" in only(enough, "KV cache").what
    short = only(find_in_plan(cluster(facts(free_gb=tight + 1)), plan(14, 14)), "KV cache")
    assert short.severity == "warning"
    assert "less than one request of the full context of 2,048" in short.what
    assert "--max-model-len" in (short.cure or "")
    none = only(find_in_plan(cluster(facts(free_gb=tight + 0.01)), plan(14, 14)), "KV cache")
    assert none.severity == "failure"
    assert none.cure


def test_a_kv_cache_larger_than_the_memory_left_is_a_failure_in_servings_own_words() -> None:
    finding = only(find_in_plan(cluster(facts()), plan(14, 14, kv_cache_gb=1000)), "KV cache")
    assert finding.severity == "failure"
    assert "kv_cache_gb 1000 is room for" in finding.what
    assert "--kv-cache-gb" in (finding.cure or "")


def test_a_download_must_fit_the_disk_less_what_is_there_already() -> None:
    def disk(free_gb: float, cached_gb: float) -> Finding:
        hub = ModelFacts(cached_bytes=int(cached_gb * GB))
        machine = facts(model=hub, hub_cache_free_bytes=int(free_gb * GB))
        return only(find_in_plan(cluster(machine), plan(14, 14)), "disk")

    assert disk(20, 0).severity == "ok"
    assert "still has to download 12.1 GB to /cache" in disk(20, 0).what
    assert disk(5, 0).severity == "failure"
    assert "HF_HOME" in (disk(5, 0).cure or "")
    assert disk(5, 10).severity == "ok"
    assert "has the weights already" in disk(5, 13).what
