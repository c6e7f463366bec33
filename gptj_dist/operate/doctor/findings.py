"""Findings about the nodes: versions, GPUs, limits, ports, links. Module `fit` checks whether the plan fits them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from gptj_dist.config import DEFAULT_APP_NAME, PipelineConfig
from gptj_dist.operate.doctor.cluster import Cluster, Finding, Node
from gptj_dist.operate.doctor.facts import PACKAGES
from gptj_dist.sizes import bytes_text

FEWEST_OPEN_FILES = 1024
"""Ray, Serve and ZeroMQ take a few hundred in a process, and Serve's proxy one more for each open stream."""

ENOUGH_OPEN_FILES = 4096
"""Below this Ray itself warns of connection errors."""

RAY_RAISES_OPEN_FILES_TO = 65536
"""What a Ray that is started here makes of the soft limit, if the hard limit lets it."""


def find_in_nodes(cluster: Cluster, config: PipelineConfig | None) -> list[Finding]:
    """All findings about the nodes.

    Args:
        config: what shall be served; None if that is not known.
    """
    asked = [*map(_describe, cluster.nodes), *_silent_nodes(cluster)]
    if not cluster.nodes:
        return asked
    return [
        *asked,
        *_versions(cluster),
        *_packages(cluster),
        *_gpus(cluster.nodes, config),
        *_compilers(cluster.nodes, config),
        *_open_files(cluster),
        *_shared_memory(cluster),
        *_host_names(cluster.nodes),
        *_links(cluster),
        *_address(cluster),
    ]


def _describe(node: Node) -> Finding:
    """A line for each node that answered; it judges nothing."""
    facts = node.facts
    parts = [f"Python {facts.versions['python']}"]
    parts += [f"{package} {facts.versions[package]}" for package in ("ray", "torch") if facts.versions[package]]
    parts += [f"built for CUDA {facts.torch_cuda}"] if facts.torch_cuda else []
    parts += [f"NVIDIA driver {facts.driver}"] if facts.driver else []
    num_cpus = node.resources.get("CPU", 0)
    parts += ["1 CPU" if num_cpus == 1 else f"{num_cpus:g} CPUs"]
    parts += [
        f"{'memory' if device.kind == 'cpu' else device.report.name} {bytes_text(device.free_bytes)} free of "
        f"{bytes_text(device.report.total_bytes)}"
        for device in facts.devices
    ]
    return Finding("ok", node.name, f"{facts.host} ({node.ip}): {', '.join(parts)}")


def _silent_nodes(cluster: Cluster) -> Iterable[Finding]:
    for node in cluster.silent:
        yield Finding(
            "failure",
            node.name,
            f"{node.ip} gave no answer: {node.reason}",
            "install the same gptj-dist there, in the environment that its Ray was started from, and look at that "
            "node's Ray logs",
        )


def _versions(cluster: Cluster) -> Iterable[Finding]:
    """Python, Ray and gptj-dist must agree; torch and the others should.

    A stage gets pickles from Ray and from gptj-dist, so those versions must be the same. Tensors travel as plain bytes:
    with different torches a pipeline works, but its numbers may depend on where a stage is placed.
    """
    yield from _python(cluster)
    for package in ("ray", "gptj-dist"):
        if places := _disagreement(cluster, package):
            yield Finding("failure", package, places, f"install the same {package} on all nodes, and restart their Ray")
    for package in PACKAGES:
        if package != "ray" and (places := _disagreement(cluster, package)):
            yield Finding("warning", package, places, f"install the same {package} on all nodes")


def _python(cluster: Cluster) -> Iterable[Finding]:
    if places := _disagreement(cluster, "python", num_parts=2):
        yield Finding("failure", "Python", places, "give all nodes the same Python: pickles do not pass between these")
    elif places := _disagreement(cluster, "python"):
        yield Finding("warning", "Python", places, "give all nodes the same Python: Ray may refuse to join these")


def _disagreement(cluster: Cluster, package: str, num_parts: int | None = None) -> str | None:
    """Which version is where, or None if there is only one; a missing package is another finding's.

    Args:
        num_parts: how much of `3.11.9` counts; None is all. A build's name, as in `2.13.0+cpu`, never counts.
    """
    places: dict[tuple[str, ...], list[str]] = defaultdict(list)
    all_versions = [(node.name, node.facts.versions) for node in cluster.nodes]
    if cluster.is_running:
        all_versions.append(("this process", cluster.versions_here))
    for name, versions in all_versions:
        if version := versions.get(package):
            places[tuple(version.partition("+")[0].split(".")[:num_parts])].append(f"{version} in {name}")
    if len(places) < 2:
        return None
    return "versions differ: " + ", ".join(text for texts in places.values() for text in texts)


def _packages(cluster: Cluster) -> Iterable[Finding]:
    is_complete = True
    for node in cluster.nodes:
        if missing := [package for package in PACKAGES if node.facts.versions.get(package) is None]:
            is_complete = False
            names = " ".join(missing)
            yield Finding("failure", "packages", f"{node.name} lacks {names}", f"there: pip install {names}")
        elif not node.facts.devices:
            is_complete = False
            yield Finding("failure", "torch", f"{node.name}: {node.facts.torch_error}", "there: install torch anew")
    if is_complete and not list(_versions(cluster)):
        agreement = " and agree on all nodes" if len(cluster.nodes) > 1 else ""
        yield Finding("ok", "packages", f"all {len(PACKAGES)} packages are installed{agreement}")


def _gpus(nodes: Sequence[Node], config: PipelineConfig | None) -> Iterable[Finding]:
    """GPUs that Ray gives out must be seen by torch, or stages that are sent to them fail."""
    wanted = {"auto"} if config is None else set(config.devices)
    if wanted == {"cpu"}:
        return
    if "cuda" in wanted and not any(node.resources.get("GPU") for node in nodes):
        cure = f"{_gpu_cure(nodes[0])}; or serve with --device cpu"
        yield Finding("failure", "GPU", "device is cuda, but Ray counts no GPU", cure)
    for node in nodes:
        counted, seen = node.resources.get("GPU", 0), len(node.facts.gpus)
        if counted > seen and node.facts.devices:
            yield Finding(
                "warning" if config is None else "failure",
                "GPU",
                f"Ray counts {counted:g} on {node.name}, torch {node.facts.versions['torch']} sees {seen}"
                + (f" ({node.facts.torch_error})" if node.facts.torch_error else ""),
                f"{_gpu_cure(node)}; or serve with --device cpu",
            )


def _gpu_cure(node: Node) -> str:
    if node.facts.torch_cuda is None:
        return f"install a CUDA build of torch on {node.name}"
    if node.facts.driver is None:
        return f"install the NVIDIA driver on {node.name}, or give its container the GPUs (docker run --gpus all)"
    return f"update the NVIDIA driver of {node.name} to one that knows CUDA {node.facts.torch_cuda}"


def _compilers(nodes: Sequence[Node], config: PipelineConfig | None) -> Iterable[Finding]:
    """Attention on a CPU is compiled where it runs; without a compiler torch's is taken."""
    wanted = {"auto"} if config is None else set(config.devices)
    if "cpu" not in wanted and ("auto" not in wanted or any(node.resources.get("GPU") for node in nodes)):
        return
    for node in nodes:
        if node.facts.compiler is None:
            yield Finding(
                "warning",
                "C compiler",
                f"{node.name} has none, so attention on its CPU takes torch, which is several times slower",
                f"install gcc on {node.name}, where its Ray finds it (apt-get install gcc), and start the stages anew",
            )


def _open_files(cluster: Cluster) -> Iterable[Finding]:
    limits = []
    for node in cluster.nodes:
        limit = node.facts.max_open_files
        if not cluster.is_running:
            limit = max(limit, min(node.facts.max_open_files_hard, RAY_RAISES_OPEN_FILES_TO))
        limits.append(limit)
        if limit < ENOUGH_OPEN_FILES:
            yield Finding(
                "failure" if limit < FEWEST_OPEN_FILES else "warning",
                "open files",
                f"a process on {node.name} may open {limit} files, and each stream of a client is one",
                "run `ulimit -n 65536` before Ray starts there (docker run --ulimit nofile=65536, LimitNOFILE in "
                "systemd)",
            )
    if min(limits) >= ENOUGH_OPEN_FILES:
        yield Finding("ok", "open files", f"a process may open {min(limits):,}")


def _shared_memory(cluster: Cluster) -> Iterable[Finding]:
    """Ray keeps its object store there or, more slowly, in /tmp; the stages' tensors do not go through it."""
    findings = [
        Finding(
            "warning",
            "/dev/shm",
            f"{node.name} has {bytes_text(room)} for Ray's object store of {bytes_text(wanted)}: Ray uses /tmp instead",
            f"docker run --shm-size={math.ceil(1.1 * wanted / 1e9)}gb, or in Kubernetes an emptyDir of medium Memory "
            "at /dev/shm",
        )
        for node, room, wanted in _object_stores(cluster)
        if room < wanted
    ]
    least = min(room for _, room, _ in _object_stores(cluster))
    return findings or [Finding("ok", "/dev/shm", f"{bytes_text(least)}, enough for Ray's object store")]


def _object_stores(cluster: Cluster) -> Iterable[tuple[Node, int, float]]:
    """Nodes, their /dev/shm and what of it Ray takes. Where Ray runs, it has taken that already."""
    for node in cluster.nodes:
        room = node.facts.shm_total_bytes if cluster.is_running else node.facts.shm_free_bytes
        yield node, room, node.resources.get("object_store_memory", 0.0)


def _host_names(nodes: Iterable[Node]) -> Iterable[Finding]:
    """Stages with one host name are taken to share one memory and its cores."""
    addresses: dict[str, set[str]] = defaultdict(set)
    for node in nodes:
        addresses[node.facts.host].add(node.ip)
    for host, ips in addresses.items():
        if len(ips) > 1:
            yield Finding(
                "warning",
                "host name",
                f"{' and '.join(sorted(ips))} call themselves {host}, and are taken for one machine",
                "give each machine a host name of its own, so that its memory and cores are counted by themselves",
            )


def _links(cluster: Cluster) -> Iterable[Finding]:
    for link in cluster.broken_links:
        yield Finding(
            "failure",
            "network",
            link,
            "open TCP ports 1024 to 65535 between the nodes: stages listen at ports that the system chooses",
        )
    if len(cluster.nodes) > 1 and not cluster.broken_links:
        yield Finding("ok", "network", "each node reaches the next at a port that the system chose")


def _address(cluster: Cluster) -> Iterable[Finding]:
    """Where HTTP would be served."""
    if cluster.applications is not None:
        if DEFAULT_APP_NAME in cluster.applications:
            yield Finding(
                "failure",
                "Serve",
                f"the cluster serves an application {DEFAULT_APP_NAME!r} already",
                "stop it first: Ctrl-C at its terminal, or `gptj-dist stop --address` if that is gone; or serve beside "
                "it, with another --name and --route-prefix",
            )
        yield Finding(
            "ok", "address", f"Serve runs already: its address, {cluster.serve_address}, counts, not --host and --port"
        )
        return
    errors = [f"{node.name} {node.facts.listen_error}" for node in cluster.nodes if node.facts.listen_error]
    yield from (Finding("failure", "address", error, "choose another --port, or another --host") for error in errors)
    if not errors:
        yield Finding("ok", "address", "free")
