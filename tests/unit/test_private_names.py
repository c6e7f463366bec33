"""Private parts of other packages that this one uses: each is listed here and exists in the versions installed."""

from __future__ import annotations

import ast
import importlib
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.sources import PACKAGE, syntax_trees

PYPROJECT = PACKAGE.parent / "pyproject.toml"

PRIVATE_NAMES = {
    "torch._C._has_mkldnn": "model/linear.py: whether oneDNN is there",
    "torch.ops.mkldnn._is_mkldnn_bf16_supported": "model/linear.py: whether oneDNN multiplies bfloat16",
    "torch.ops.mkldnn._reorder_linear_weight": "model/linear.py: packs a weight",
    "torch.ops.mkldnn._linear_pointwise.default._op": "model/linear.py: multiplies by a packed weight",
    "torch.ops.mkldnn._linear_pointwise.binary._op": "model/linear.py: the same with a residual",
    "ray.serve._private.replica.add_port_to_grpc_server": "serving/loopback.py: keeps a replica's port off other nodes",
    "ray.serve.handle.DeploymentBroadcastResponse._fetch_replica_results_async": "serving/broadcast.py: replies",
    "ray.serve.context._get_global_client": "operate/launch/cluster.py: whether Serve runs in this process",
    "ray._private.node.Node.start_api_server": "operate/launch/local_ray.py: starts a process that is not needed",
    "ray._private.node.Node.start_log_monitor": "operate/launch/local_ray.py: the same",
    "ray._private.node.Node.start_monitor": "operate/launch/local_ray.py: the same",
    "ray._private.node.Node": "operate/cluster/ray_node.py: Ray's processes of a node",
    "ray._private.node.Node.__new__": "operate/cluster/ray_node.py: one that does not start knows its logs, too",
    "ray._private.node.Node.__init__": "operate/cluster/ray_node.py: the same",
    "ray._private.parameter.RayParams": "operate/cluster/ray_node.py: their settings",
    "ray._private.state.GlobalState": "operate/cluster/overview.py: which actor is on which node, without joining",
    "ray._raylet.GcsClient": "operate/cluster/store.py, stages/departures.py: nodes, and the key-value store",
    "ray._raylet.GcsClientOptions.create": "operate/cluster/overview.py: the address of the GCS",
    "ray._private.worker._global_node": "operate/launch/local_ray.py: the local Ray of this process",
    "huggingface_hub.utils._http": "checkpoint/hub.py: the logger of its advice",
}


def resolve(name: str) -> Any:
    """The object of a dotted name. Raises ImportError or AttributeError if there is none."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_each_private_name_exists(name: str) -> None:
    package = name.partition(".")[0]
    try:
        resolve(name)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{package} {version(package)} has no {name}, which is used in {PRIVATE_NAMES[name]} ({error})")


def test_a_name_that_is_gone_is_noticed() -> None:
    for name in ("torch._C._no_such_name", "ray.serve._private.no_such_module.name", "no_such_package._name"):
        with pytest.raises((ImportError, AttributeError)):
            resolve(name)


def test_every_private_name_in_the_package_is_listed() -> None:
    used = {name for _, tree in syntax_trees() for name in private_names(tree)}
    prefixes = {name for name in used if any(other.startswith(f"{name}.") for other in used)}
    assert used - prefixes <= PRIVATE_NAMES.keys()


def test_the_search_finds_every_way_to_a_private_name() -> None:
    source = "import torch, ray.x._y as z\nfrom ray import _a\ntorch.b._c.d\nz.e()\nself._f\ntorch.__version__\n_g = 1"
    assert private_names(ast.parse(source)) == {"ray.x._y", "ray._a", "torch.b._c.d", "torch.b._c", "ray.x._y.e"}


def private_names(tree: ast.Module) -> set[str]:
    """Dotted names of other packages with a part that begins with one underscore."""
    full_names = dict(imported_names(tree))
    found = set(full_names.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (dotted := dotted_name(node)):
            root, _, rest = dotted.partition(".")
            if root in full_names:
                found.add(f"{full_names[root]}.{rest}")
    return {name for name in found if is_private(name)}


def imported_names(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Local names of what a module imports from other packages, and their full names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.asname, alias.name) if alias.asname else (alias.name.partition(".")[0],) * 2
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("gptj_dist"):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def dotted_name(node: ast.expr) -> str:
    """The text of a chain of attributes of a name; empty for any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted_name(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def is_private(name: str) -> bool:
    package, *parts = name.split(".")
    is_others = package != "gptj_dist" and package not in sys.stdlib_module_names
    return is_others and any(part.startswith("_") and not part.startswith("__") for part in parts)


@pytest.mark.parametrize("package", ["ray", "torch"])
def test_packages_whose_private_parts_are_used_have_upper_bounds(package: str) -> None:
    lines = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    (requirement,) = (parsed for parsed in map(Requirement, lines) if parsed.name == package)
    assert any(specifier.operator == "<" for specifier in requirement.specifier)
    assert requirement.specifier.contains(version(package).partition("+")[0])
