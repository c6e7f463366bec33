"""The layering of `docs/architecture.md`, read off the imports; what must stay light loads neither torch nor Ray."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.sources import PACKAGE, syntax_trees

ROOT_UNIT = "gptj_dist"

LEVELS = [
    {ROOT_UNIT, "errors", "config", "params", "sizes", "json_types", "chunking", "logs", "file_kinds", "field_types"}
    | {"garbage", "generation", "token_rules", "yaml_files", "quantization", "placement", "model_config", "interfaces"}
    | {"own_directory"},
    {"planning", "engine", "text", "model", "checkpoint"},
    {"stages"},
    {"answers"},
    {"llm"},
    {"serving"},
    {"operate"},
    {"cli"},
    {"__main__"},
]
"""Units, that is, modules and packages right below `gptj_dist`. Imports go to lower levels only."""

LEVEL_OF = {unit: level for level, units in enumerate(LEVELS) for unit in units}
UNITS_THAT_SHARE_THEIR_LEVEL = LEVELS[0]
UNIT_OF_ROOT_NAME = {"LLM": "llm", "Completion": "llm"} | dict.fromkeys(
    ("SamplingParams", "AdapterChoice", "Grammar"), "params"
)

STDLIB_ONLY: set[str] = set()
THIRD_PARTY_OF = {
    **dict.fromkeys(
        (LEVELS[0] - {ROOT_UNIT}) | {"engine", "planning"},
        STDLIB_ONLY,
    ),
    "yaml_files": {"yaml"},
    "text": {"tokenizers", "jinja2", "llguidance"},
    "model": {"torch", "triton"},
    "checkpoint": {"torch", "huggingface_hub"},
    "answers": {"pydantic", "pydantic_core"},
}
RAY_MODULES = {"stages.actor", "stages.actor_classes", "stages.calls", "stages.departures", "stages.group"}
RAY_MODULES |= {"stages.on_node", "stages.peer_files", "stages.ray_errors", "stages.relocation"}
RAY_UNITS = {"serving", "operate", "cli"}


@dataclass(frozen=True, slots=True)
class Import:
    """One import statement's target.

    Args:
        module: who imports, without the leading `gptj_dist.`; the root module is `gptj_dist`.
        target: the full name of what is imported, such as `torch.nn` or `gptj_dist.errors.CheckpointError`.
        is_lazy: within a function.
    """

    module: str
    target: str
    is_lazy: bool

    @property
    def unit(self) -> str:
        return self.module.partition(".")[0]

    @property
    def top_level(self) -> str:
        return self.target.partition(".")[0]

    @property
    def target_unit(self) -> str:
        """The unit of `gptj_dist` that is imported."""
        name = [*self.target.split("."), ""][1]
        return UNIT_OF_ROOT_NAME.get(name, name if name in LEVEL_OF else ROOT_UNIT)

    def __str__(self) -> str:
        return f"{self.module} imports {self.target}"


def modules() -> Iterator[tuple[str, ast.Module]]:
    """All modules of the package, by their names below it."""
    for path, tree in syntax_trees():
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__") or ROOT_UNIT, tree


def imports_of(module: str, node: ast.AST, is_lazy: bool = False) -> Iterator[Import]:
    """All imports within a node, those in functions and under `TYPE_CHECKING` included."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(module, alias.name, is_lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module} has a relative import"
            yield from (Import(module, f"{child.module}.{alias.name}", is_lazy) for alias in child.names)
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports_of(module, child, is_lazy or is_function)


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return [imported for name, tree in modules() for imported in imports_of(name, tree)]


def may_import(unit: str, target: str) -> bool:
    if unit == ROOT_UNIT:  # the package's face: everything but `params` it imports lazily
        return target in {"params", "llm"}
    is_neighbour = {unit, target} <= UNITS_THAT_SHARE_THEIR_LEVEL and LEVEL_OF[unit] == LEVEL_OF[target]
    return target == unit or LEVEL_OF[target] < LEVEL_OF[unit] or is_neighbour


def may_import_ray(imported: Import) -> bool:
    is_allowed = imported.module in RAY_MODULES or imported.unit in RAY_UNITS
    return is_allowed and (imported.is_lazy or imported.unit != "cli")


def test_every_unit_has_a_level(imports: list[Import]) -> None:
    assert {imported.unit for imported in imports} <= set(LEVEL_OF)


def test_imports_within_the_package_only_go_down(imports: list[Import]) -> None:
    inner = [imported for imported in imports if imported.top_level == "gptj_dist"]
    assert len(inner) > 50
    assert [str(imported) for imported in inner if not may_import(imported.unit, imported.target_unit)] == []


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle of imports; empty where there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for target in sorted(graph.get(module, ())):
            if circle := visit(target, [*path, module]):
                return circle
        done.add(module)
        return []

    return next((circle for module in sorted(graph) if (circle := visit(module, []))), [])


def module_graph(imports: list[Import]) -> dict[str, set[str]]:
    """Which modules of the package each module imports, lazily or under `TYPE_CHECKING` too."""
    names = {name for name, _ in modules()} - {ROOT_UNIT}
    graph: dict[str, set[str]] = {name: set() for name in names}
    for imported in imports:
        target = imported.target.removeprefix("gptj_dist.")
        found = target if target in names else target.rpartition(".")[0]
        if imported.top_level == "gptj_dist" and imported.module in names and found in names - {imported.module}:
            graph[imported.module].add(found)
    return graph


def test_no_circle_of_imports_exists_between_modules(imports: list[Import]) -> None:
    graph = module_graph(imports)
    assert sum(map(len, graph.values())) > 300
    assert cycle_in(graph) == []


def test_a_circle_would_be_found() -> None:
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def test_other_packages_import_the_public_modules_of_a_package_and_no_others(imports: list[Import]) -> None:
    """A package's `__all__` names its public modules."""
    names = {name for name, _ in modules()}
    used: dict[str, set[str]] = {}
    for imported in imports:
        target = imported.target.removeprefix("gptj_dist.")
        package, _, name = (target if target in names else target.rpartition(".")[0]).rpartition(".")
        if imported.top_level == "gptj_dist" and package and not imported.module.startswith(package):
            used.setdefault(package, set()).add(name)
    assert len(used) > 10
    for package, found in used.items():
        face = importlib.import_module(f"gptj_dist.{package}")
        assert found <= set(face.__all__), package
        there = {name.rpartition(".")[2] for name in names if name.rpartition(".")[0] == package}
        assert set(face.__all__) <= there | set(vars(face)), package


def test_serving_never_imports_operate(imports: list[Import]) -> None:
    below = [str(imported) for imported in imports if imported.unit == "serving" and imported.target_unit == "operate"]
    assert below == []


def may_import_transformers(imported: Import) -> bool:
    """The oracle of `gptj-dist verify`: optional, so loaded where it is wanted and nowhere else."""
    return imported.module == "operate.verification" and imported.is_lazy


def test_ray_is_imported_only_where_actors_are_and_transformers_only_as_the_oracle(imports: list[Import]) -> None:
    ray = [imported for imported in imports if imported.top_level == "ray"]
    assert [str(imported) for imported in ray if not may_import_ray(imported)] == []
    transformers = [imported for imported in imports if imported.top_level == "transformers"]
    assert [str(imported) for imported in transformers if not may_import_transformers(imported)] == []


def test_light_units_import_no_third_party_package_but_their_own(imports: list[Import]) -> None:
    outer = [
        imported
        for imported in imports
        if imported.top_level not in sys.stdlib_module_names and imported.top_level != "gptj_dist"
    ]
    assert [
        str(imported)
        for imported in outer
        if imported.unit in THIRD_PARTY_OF and imported.top_level not in THIRD_PARTY_OF[imported.unit]
    ] == []


@pytest.mark.parametrize(
    "names",
    [
        "gptj_dist",
        "gptj_dist.engine.scheduler, gptj_dist.engine.async_engine",
        "gptj_dist.answers.completion",
        "gptj_dist.cli",
    ],
)
def test_importing_what_must_be_light_loads_neither_torch_nor_ray(names: str) -> None:
    code = f"import sys, {names}; print([name for name in ('torch', 'ray', 'transformers') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_coordinators_and_ingresses_do_without_torch() -> None:
    """Importing it takes seconds of each start, and memory of each process. Spares and stages import it themselves."""
    code = "import sys, gptj_dist.serving.app; sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_launcher_imports_no_ray_before_it_has_set_rays_environment() -> None:
    code = "import sys, gptj_dist.cli.server.serve, gptj_dist.operate.launch.run; sys.exit('ray' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_stages_can_be_loaded_without_triton() -> None:
    """A CPU build of torch has none."""
    code = "import sys; sys.modules['triton'] = None; import gptj_dist.stages.runner"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_no_public_module_class_or_function_lacks_a_docstring() -> None:
    undocumented = [
        f"{name}:{getattr(node, 'name', 'module')}"
        for name, tree in modules()
        for node in [tree, *tree.body]
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and not getattr(node, "name", "").startswith("_")
        and not ast.get_docstring(node)
    ]
    assert undocumented == []
