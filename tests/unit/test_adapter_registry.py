"""The list of adapters is the same in all ingresses and pipelines, whoever changes it, comes late or is replaced.

Replies of replicas come from objects in this process; Ray is not there.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptj_dist.answers.error_responses import UnknownModelError
from gptj_dist.config import PipelineConfig
from gptj_dist.errors import CheckpointError, InvalidRequestError
from gptj_dist.params import AdapterSource
from gptj_dist.serving import adapter_registry
from gptj_dist.serving.adapter_registry import AdapterRegistry
from gptj_dist.serving.adapters import MAX_UNLOADED, AdapterChange, AdapterList, GivenAdapters
from gptj_dist.serving.broadcast import Replies
from gptj_dist.serving.pipeline import Pipeline
from tests.adapters import model_config, write_lora
from tests.unit.test_metrics import pipeline as status_of

CONFIG = PipelineConfig("demo")


class Replica(Pipeline):
    """A pipeline whose stages read all adapters but those of `unreadable`."""

    def __init__(self, given: GivenAdapters = (), unreadable: Sequence[str] = ()) -> None:
        self._adapters = AdapterList(given)
        self._reading = set()
        self.read: list[AdapterSource] = []

        async def load_adapter(source: AdapterSource) -> None:
            if Path(source.path).name in unreadable:
                raise CheckpointError("stage 1 cannot read it")
            self.read.append(source)

        self._group: Any = SimpleNamespace(load_adapter=load_adapter)

    def __del__(self) -> None:  # type: ignore[override]
        """Nothing was started."""


class Site:
    """Ingresses and pipelines that reach each other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_ingresses: int = 2, num_pipelines: int = 2) -> None:
        monkeypatch.setattr(adapter_registry, "ask_all", self._ask_all)
        self.pipelines = [Replica() for _ in range(num_pipelines)]
        self.ingresses: list[AdapterRegistry] = []
        for _ in range(num_ingresses):
            self.add_ingress()

    def add_ingress(self, directory: Path | None = None) -> AdapterRegistry:
        groups: tuple[Any, Any] = ("pipelines", "ingresses")
        name = f"ingress {len(self.ingresses)}"
        own = None if directory is None else str(directory)
        ingress = AdapterRegistry(name, (), CONFIG, ("demo",), *groups, lambda: None, own)
        self.ingresses.append(ingress)
        return ingress

    async def look(self, ingress: AdapterRegistry) -> None:
        """As every second."""
        ingress.meet([replace(status_of("p"), adapter_digest=one._adapters.digest) for one in self.pipelines])
        if ingress._meeting is not None:
            await ingress._meeting

    def names(self) -> list[str]:
        """Of the list, which is the same everywhere."""
        lists = [one._adapters for one in self.pipelines] + [one._list for one in self.ingresses]
        assert len({one.digest for one in lists}) == 1
        assert all(one.sources == lists[0].sources for one in lists)
        return sorted(lists[0].sources)

    async def _ask_all(self, group: Any, kind: type, method: str, *arguments: Any, timeout_s: float = 0) -> Any:
        del timeout_s

        async def ask(replica: Any) -> Any:
            await asyncio.sleep(0)
            if isinstance(replica, AdapterRegistry):
                replica.take(*arguments)
                return arguments[0]
            return await getattr(replica, method)(*arguments)

        replicas = self.pipelines if group == "pipelines" else self.ingresses
        given = tuple(await asyncio.gather(*map(ask, replicas)))
        assert all(isinstance(reply, kind) for reply in given)
        return Replies(given, 0)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def lora(path: Path, seed: int = 0) -> str:
    return str(write_lora(path, model_config("demo"), layers=(0,), seed=seed))


def test_changes_at_two_ingresses_at_the_same_time_are_all_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scenario() -> None:
        site = Site(monkeypatch)
        one, other = site.ingresses
        await asyncio.gather(one.load("a", lora(tmp_path / "a"), False), other.load("b", lora(tmp_path / "b"), False))
        assert site.names() == ["a", "b"]
        await asyncio.gather(one.unload("a"), other.load("c", lora(tmp_path / "c"), False), one.unload("b"))
        assert site.names() == ["c"]
        again = lora(tmp_path / "d", seed=4)
        ends = await asyncio.gather(one.unload("c"), other.load("c", again, True), return_exceptions=True)
        site.names()
        assert [end for end in ends if not isinstance(end, InvalidRequestError | None)] == []
        with pytest.raises(UnknownModelError):
            await one.unload("a")

    run(scenario())


def test_lists_that_know_the_same_changes_are_equal() -> None:
    sources = [AdapterSource(f"/{number}", "v") for number in range(3)]
    given = (("given", sources[0]), ("a", sources[0]))
    changes = [
        ("a", AdapterChange(1, "x", sources[1])),
        ("a", AdapterChange(1, "y", None)),
        ("a", AdapterChange(2, "x", sources[2])),
        ("b", AdapterChange(2, "y", sources[1])),
        ("b", AdapterChange(2, "z", None)),
    ]
    digests = set()
    for order in permutations(changes):
        one = AdapterList(given)
        for name, change in order:
            one.merge({name: change})
        assert one.sources == {"given": sources[0], "a": sources[2]}
        digests.add(one.digest)
    assert len(digests) == 1


def test_of_unloaded_names_the_last_ones_are_remembered() -> None:
    one = AdapterList()
    for number in range(MAX_UNLOADED + 5):
        one.change(f"name {number}", None, "x")
    assert len(one.changes) == MAX_UNLOADED
    assert one.change("name 0", None, "x").number == MAX_UNLOADED + 6


def test_a_pipeline_that_comes_later_reads_the_adapters_and_tells_them_to_the_next_ingress(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scenario() -> None:
        site = Site(monkeypatch, 1, 1)
        [ingress] = site.ingresses
        await ingress.load("a", lora(tmp_path / "a"), False)
        await ingress.load("b", lora(tmp_path / "b"), False)
        await ingress.unload("b")
        given = (("b", AdapterSource("/given", "v")),)
        site.pipelines = [late := Replica(given)]  # Serve has replaced the first one
        await site.look(ingress)
        await asyncio.gather(*late._reading)
        assert late.read == [ingress.sources["a"]]
        site.ingresses.clear()
        await site.add_ingress().exchange()
        assert site.names() == ["a"]

    run(scenario())


def test_what_a_stage_cannot_read_is_in_no_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def scenario() -> None:
        site = Site(monkeypatch)
        site.pipelines[1] = Replica(unreadable=("a",))
        with pytest.raises(InvalidRequestError, match="stage 1 cannot read it"):
            await site.ingresses[0].load("a", lora(tmp_path / "a"), False)
        assert site.names() == []

    run(scenario())


def test_files_in_the_directory_are_loaded_replaced_and_unloaded_when_requests_name_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def scenario() -> None:
        directory = tmp_path / "adapters"
        elsewhere = lora(tmp_path / "elsewhere", seed=9)
        lora(directory / "a", seed=1)
        site = Site(monkeypatch, 0)
        one, other = site.add_ingress(directory), site.add_ingress(directory)
        await asyncio.gather(*(one.find(["a", None, "demo", "../elsewhere", "none"]) for _ in range(3)))
        assert site.names() == ["a"]
        [first] = dict.fromkeys(site.pipelines[0].read)
        await other.find(["a"])
        assert other.sources == {"a": first}
        lora(directory / "a", seed=2)
        await one.find(["a"])
        assert one.sources["a"].version != first.version
        (directory / "a" / "adapter_config.json").write_text("{")
        with pytest.raises(InvalidRequestError, match="adapter_config"):
            await other.find(["a"])
        assert site.names() == ["a"]
        lora(directory / "odd\nname")
        with pytest.raises(InvalidRequestError, match="printable"):
            await one.find(["odd\nname"])
        shutil.rmtree(directory / "a")
        await other.find(["a"])
        assert site.names() == []
        await one.load("a", elsewhere, False)
        await one.find(["a"])
        assert one.sources["a"].path == elsewhere

    run(scenario())
