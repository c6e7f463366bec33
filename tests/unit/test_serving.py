"""The parts of serving that need no Ray: settings, merged streams, tables, the command line's own checks."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from gptj_dist.answers.chat_defaults import ChatDefaults
from gptj_dist.answers.merge import merge
from gptj_dist.config import LayerRange
from gptj_dist.errors import ConfigurationError, StageFailedError
from gptj_dist.operate.tables import layers_text
from gptj_dist.serving.settings import parse_settings
from gptj_dist.sizes import bytes_text

TIMEOUT_S = 20


def test_settings_are_those_of_the_pipeline_and_the_models_name() -> None:
    config = parse_settings({"model": "demo", "layers": [20, 8], "kv_cache_gb": "auto", "served_model_name": "x"})
    assert config.pipeline.layers == (20, 8)
    assert config.pipeline.kv_cache_gb is None
    assert config.model_names == ("x",)
    assert parse_settings({"model": "demo"}).model_names == ("demo",)
    assert parse_settings({"model": "demo"}).pipeline.generation_config == "auto"
    assert parse_settings({"model": "demo", "generation_config": "none"}).pipeline.generation_config == "none"
    with pytest.raises(ConfigurationError, match="generation_config"):
        parse_settings({"model": "demo", "generation_config": "vllm"})


def test_a_directory_is_called_by_its_last_part_and_a_hub_model_by_its_whole_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "x" / "my-gptj"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    monkeypatch.chdir(directory)
    for model in (str(directory), f"{directory}/", "../my-gptj", "."):
        assert parse_settings({"model": model}).model_names == ("my-gptj",)
    assert parse_settings({"model": "EleutherAI/gpt-j-6b"}).model_names == ("EleutherAI/gpt-j-6b",)
    assert parse_settings({"model": str(directory), "served_model_name": ["a", "b"]}).model_names == ("a", "b")


def test_defaults_of_chats_are_settings() -> None:
    assert parse_settings({"model": "demo"}).chat == ChatDefaults(512, None)
    given = {"model": "demo", "chat_max_tokens": 64, "chat_stop": "###"}
    assert parse_settings(given).chat == ChatDefaults(64, ("###",))
    assert parse_settings({"model": "demo", "chat_stop": []}).chat.stop == ()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"model": "demo", "stagse": 2}, "unknown setting 'stagse': did you mean 'stages'?"),
        ({"model": "demo", "stages": "two"}, "stages"),
        ({"model": "demo", "stages": 0}, "stages must be at least 1"),
        ({"model": "demo", "device": "tpu"}, "device"),
        ({"model": "demo", "served_model_name": 5}, "served_model_name: Input should be a valid list, got 5"),
        ({"model": "demo", "log_format": "xml"}, "log_format: Input should be 'text' or 'json', got 'xml'"),
        ({"model": "demo", "log_prompts": "yes"}, "log_prompts: Input should be a valid boolean"),
        ({"model": "demo", "chat_max_tokens": 0}, "chat_max_tokens must be at least 1"),
        ({"model": "demo", "chat_stop": [""]}, "chat_stop must not hold an empty string"),
        ({"model": "demo", "chat_stop": ["x"] * 17}, "chat_stop takes at most 16"),
        ({"stages": 2}, "model"),
        ({None: 2}, "unknown setting None"),
        ({"model": "demo", "chat_template": "a\0"}, "the chat template a cannot be read: embedded null byte"),
        ({"model": "demo", "api_keys": "a\0"}, "a cannot be read as a file of keys: embedded null byte"),
        ({"model": "demo", "chat_max_tokens": "x" * 9999}, "got 'xxxxxxxxxxxx...xxxxxxxxxxxxx'"),
    ],
    ids=range(15),
)
def test_settings_that_cannot_work_are_refused_by_name(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message.replace("?", r"\?")):
        parse_settings(args)


async def count(first: int, stop: int, closed: list[int], fails: bool = False) -> AsyncGenerator[int, None]:
    try:
        for number in range(first, stop):
            await asyncio.sleep(0)
            yield number
        if fails:
            raise ValueError("broken")
    finally:
        closed.append(first)


def test_merged_streams_keep_their_own_order_and_all_arrive() -> None:
    closed: list[int] = []

    async def run() -> list[tuple[int, int]]:
        return [item async for item in merge([count(0, 5, closed), count(10, 13, closed), count(20, 20, closed)])]

    items = asyncio.run(run())
    assert [number for index, number in items if index == 0] == [0, 1, 2, 3, 4]
    assert [number for index, number in items if index == 1] == [10, 11, 12]
    assert sorted(closed) == [0, 10, 20]


@pytest.mark.parametrize("num_streams", [1, 3])
def test_closing_merged_streams_closes_each(num_streams: int) -> None:
    closed: list[int] = []

    async def run() -> None:
        merged = merge([count(100 * i, 100 * i + 50, closed) for i in range(num_streams)])
        for _ in range(num_streams + 1):
            await anext(merged)
        await merged.aclose()

    asyncio.run(run())
    assert sorted(closed) == [100 * i for i in range(num_streams)]


def test_while_a_merged_stream_is_not_read_little_is_read_of_its_parts() -> None:
    read: list[int] = []

    async def numbers() -> AsyncGenerator[int, None]:
        for number in range(1000):
            read.append(number)
            yield number

    async def run() -> None:
        merged = merge([numbers() for _ in range(4)])
        await anext(merged)
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(read) <= 1 + 2 * 4
        assert len([item async for item in merged]) == 4 * 1000 - 1

    asyncio.run(run())


def test_the_first_error_of_merged_streams_ends_all() -> None:
    closed: list[int] = []

    async def run() -> None:
        async for _ in merge([count(0, 1, closed, fails=True), count(100, 10_000, closed)]):
            pass

    with pytest.raises(ValueError, match="broken"):
        asyncio.run(run())
    assert sorted(closed) == [0, 100]


def test_a_merged_stream_that_is_cancelled_from_within_ends_all_with_an_error() -> None:
    async def cancelled() -> AsyncGenerator[int, None]:
        yield 1
        raise asyncio.CancelledError

    async def run() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            async for _ in merge([cancelled(), count(100, 110, [])]):
                pass

    with pytest.raises(StageFailedError, match="was cancelled"):
        asyncio.run(run())


def test_tables_are_in_words_for_people() -> None:
    assert layers_text(LayerRange(0, 2, 0, 15)) == "embed + 0-14 (15)"
    assert layers_text(LayerRange(1, 2, 14, 28)) == "14-27 (14) + head"
    assert layers_text(LayerRange(0, 1, 0, 28)) == "embed + 0-27 (28) + head"
    assert [bytes_text(n) for n in (5, 12_345, 13_200_000, 12_101_765_568)] == ["5 B", "12.3 kB", "13.2 MB", "12.1 GB"]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "gptj_dist", *arguments], capture_output=True, text=True, check=False)


def test_a_bad_sampling_value_is_one_line_and_exit_code_2() -> None:
    result = command("generate", "demo", "--prompt", "x", "--temperature", "-1")
    assert result.returncode == 2
    assert result.stderr == "gptj-dist: temperature must be from 0 to 100, got -1.0\n"


def test_a_log_format_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    result = command("serve", "demo", "--log-format", "xml")
    assert result.returncode == 2
    assert "'xml' is not one of 'text', 'json'" in result.stderr


def test_plan_tells_the_reason_and_obeys_layers() -> None:
    result = command("plan", "demo", "--layers", "20,8", "--kv-cache-gb", "0.1")
    assert result.returncode == 0
    assert "embed + 0-19 (20)" in result.stdout
    assert "lm_head counts as" in result.stdout
    assert "The layers were given" in result.stdout


def test_help_loads_neither_torch_nor_ray() -> None:
    code = "import sys, gptj_dist.cli; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_address_where_no_ray_answers_is_said_at_once() -> None:
    result = command("serve", "demo", "--address", "127.0.0.1:1")
    assert result.returncode == 2
    assert result.stderr.startswith("gptj-dist: no Ray answers at 127.0.0.1:1")
