"""Files and settings: checkpoints, configurations, keys, Serve configs, tokenizers, chat templates."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from safetensors.torch import save_file

from gptj_dist.checkpoint.adapter_formats import open_fitting
from gptj_dist.checkpoint.index import read_model_config
from gptj_dist.cli.server.plan_devices import read_devices
from gptj_dist.config import CONFIG_NAME, GENERATION_CONFIG_NAME, PipelineConfig
from gptj_dist.errors import CheckpointError, ConfigurationError, InvalidRequestError
from gptj_dist.generation import unapplied_fields
from gptj_dist.serving.keys import read_keys
from gptj_dist.serving.settings import parse_settings
from gptj_dist.text.chat import ChatTemplate, load_chat_template
from gptj_dist.text.tokenizer import Tokenizer
from gptj_dist.text.tokenizer_info import tokenizer_info
from tests.adapters import model_config, write_control_vector, write_lora
from tests.fuzzing.models import Victim, write_tokenizers
from tests.fuzzing.strategies import Target, change, changed, damage, numbers, texts, to_json
from tests.fuzzing.worker import Watch, prepare, run_case

MAX_MESSAGE_CHARS = 5000


def _check_message(error: Exception) -> None:
    """An error is one line that a terminal can show."""
    text = str(error)
    assert text.isprintable(), repr(text)
    assert len(text) < MAX_MESSAGE_CHARS, text[:500]


@cache
def _directory() -> Path:
    """A directory in memory, until this process ends."""
    directory = tempfile.TemporaryDirectory(dir="/dev/shm", prefix="fuzz-")
    _kept.append(directory)
    return Path(directory.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []

# Checkpoints


@cache
def _victims() -> tuple[list[Victim], Watch]:
    root = _directory() / "models"  # other targets write beside it
    root.mkdir(exist_ok=True)
    return prepare(root)


def _check_checkpoint(number: int) -> None:
    """A damaged checkpoint is read, or an error."""
    victims, watch = _victims()
    run_case(victims, watch, 0, number)


# The model's configuration

_CONFIG = {
    "model_type": "gptj",
    "vocab_size": 100,
    "n_layer": 2,
    "n_embd": 16,
    "n_head": 2,
    "n_positions": 32,
    "rotary_dim": 4,
    "dtype": "float32",
    "eos_token_id": 7,
}
_CONFIG_NAMES = (
    *_CONFIG, "n_inner", "bos_token_id", "layer_norm_epsilon", "torch_dtype", "tie_word_embeddings",
    "activation_function", "hidden_size", "num_hidden_layers",
)  # fmt: skip
_GENERATION = {"temperature": 0.5, "eos_token_id": [7], "suppress_tokens": [3], "bad_words_ids": [[4], [5, 6]]}
_GENERATION_NAMES = (
    *_GENERATION, "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens", "begin_suppress_tokens",
    "do_sample", "num_beams", "max_length", "sequence_bias",
)  # fmt: skip
_FIELDS = numbers() | st.sampled_from(("float16", "torch.float64", [1], [[1]], [], True, None, "7", {"a": 1}))


def _check_config(case: tuple[bytes, bytes | None]) -> None:
    """Files are a configuration, or an error."""
    for name, content in zip((CONFIG_NAME, GENERATION_CONFIG_NAME), case, strict=True):
        (_directory() / name).unlink(missing_ok=True)
        if content is not None:
            (_directory() / name).write_bytes(content)
    try:
        model = read_model_config(_directory())
    except CheckpointError as error:
        _check_message(error)
        return
    assert model.head_dim * model.num_heads == model.d_model
    hash(model)
    if case[1] is not None:
        for line in unapplied_fields(json.loads(case[1])):
            assert line.isprintable()


# Settings of a server, keys and devices

_SETTINGS: Mapping[str, Any] = {"model": "demo", "stages": 2}
_SETTING_NAMES = (
    *_SETTINGS, *PipelineConfig.__dataclass_fields__, "served_model_name", "chat_template", "chat_max_tokens",
    "chat_stop", "tool_format", "api_keys", "cors_origins", "moderation", "moderation_timeout_s", "ingress_replicas",
    "log_format", "log_level", "log_prompts", "drain_s",
)  # fmt: skip


def _check_settings(args: bytes | dict[Any, Any]) -> None:
    """The `args` of a Serve config are settings, or an error."""
    try:
        fields = json.loads(args) if isinstance(args, bytes) else args
    except (ValueError, RecursionError):
        return
    try:
        parse_settings(fields)
    except ConfigurationError as error:
        _check_message(error)


_KEYS = f"keys:\n  - name: alice\n    sha256: {'a1' * 32}\n    requests_per_minute: 60\n"
_DEVICES = "devices:\n  - name: a\n    kind: cpu\n    count: 2\n    memory_gb: 20\n"
_YAML_LINES = st.sampled_from(
    (
        "keys: []", "keys:", "  - name: bob", f"    sha256: {'b2' * 32}", "    sha256: !!binary aGk=", "- a", "  - *x",
        "&x a: *x", "x: &x [*x]", "? [a, {b: c}]", "2001-99-99: 1", "a: 2001-02-30", "a: !!int x", "a: !!float .",
        "a: !!timestamp x", "a: 1:99:-1", "a: 0x_", "a: 0b", f"a: {'9' * 5000}", "[" * 2000, "{a: " * 900, "<<: *x",
        "!!python/object/apply:os.system [id]", "---", "...", "%YAML 9.9", "\t", "a: \"\\x00\\ud800\"", "? ", "=: =",
        "    tokens_per_minute: 1e9", "    tokens_per_minute: 0", '  - {name: "a\\nb", sha256: 1}', '"a\\nb": 1',
        "cpu", "- h100", "- {name: h100, count: 99999999}", "- {kind: gpu, memory_gb: .nan}", "devices: [a100, .inf]",
    )
)  # fmt: skip


@st.composite
def _yaml_files(draw: DrawFn, good: str) -> bytes:
    lines = good.splitlines()
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(lines)))
        lines[at : at + draw(st.integers(0, 1))] = [draw(_YAML_LINES)]
    text = "\n".join(lines) + "\n"
    return damage(draw, text.encode("utf-8", "surrogatepass"))


def _check_keys(content: bytes) -> None:
    """A file is keys, or an error."""
    path = _directory() / "keys.yaml"
    path.write_bytes(content)
    try:
        assert read_keys(path)
    except ConfigurationError as error:
        _check_message(error)


def _check_devices(content: bytes) -> None:
    """A file is devices, or an error."""
    path = _directory() / "devices.yaml"
    path.write_bytes(content)
    try:
        assert read_devices(path)
    except ConfigurationError as error:
        _check_message(error)


# Tokenizers

_TOKEN = {"content": "[X]", "lstrip": True, "special": True}
_TOKENIZER_FIELDS: Mapping[str, Any] = {
    "added_tokens_decoder": {"7": _TOKEN},
    "eos_token": "<|endoftext|>",
    "pad_token": "[PAD]",
    "chat_template": "{{ messages[0].content }}",
}
_TOKENIZER_NAMES = (
    *_TOKENIZER_FIELDS, "bos_token", "unk_token", "x_token", "extra_special_tokens", "additional_special_tokens",
    "tokenizer_class", "add_prefix_space", "add_bos_token", "add_eos_token", "split_special_tokens",
)  # fmt: skip
_TOKENIZER_VALUES: SearchStrategy[Any] = texts() | st.sampled_from(
    (
        _TOKEN, [_TOKEN], ["[A]", "[B]"], {"a_token": "[A]"}, {"7": _TOKEN, "8": "[Y]"}, {"-1": "a"}, {"9" * 5000: "a"},
        True, None, [{"name": "default", "template": "x"}], [{"x": 1}], [{"name": [], "template": 1}], {"7": 7}, 7,
    )
)  # fmt: skip


@cache
def _tokenizers() -> Sequence[Path]:
    whole, parts = _directory() / "whole tokenizer", _directory() / "parts of one"
    write_tokenizers(whole, parts)
    return whole, parts


def _check_tokenizer(case: tuple[int, bytes, bytes, bytes | None]) -> None:
    """Files are a tokenizer that encodes and decodes, and maybe a template, or an error."""
    which, config, special, template = case
    directory = _tokenizers()[which]
    (directory / "tokenizer_config.json").write_bytes(config)
    (directory / "special_tokens_map.json").write_bytes(special)
    if template is not None:
        (directory / "chat_template.jinja").write_bytes(template)
    try:
        tokenizer = Tokenizer.load(directory)
        tokenizer.decode(tokenizer.encode("abc [X]é\n", add_special_tokens=True))
        loaded = load_chat_template(directory)
        if loaded is not None:
            _render(loaded)
        json.dumps(tokenizer_info(directory, "", loaded)).encode()
    except CheckpointError as error:
        _check_message(error)
    finally:
        (directory / "chat_template.jinja").unlink(missing_ok=True)


# Chat templates. None takes long: a template may compute without end, as docs/security.md says.

_STATEMENTS = st.sampled_from(
    (
        "{% for m in messages %}", "{% endfor %}", "{% if m.role == 'user' %}", "{% else %}", "{% endif %}",
        "{% set x = [] %}", "{% set ns = namespace(a=1) %}", "{% macro f(a) %}", "{% endmacro %}", "{% break %}",
        "{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% extends x %}", "{% raw %}", "{% endraw %}",
        "{% block a %}", "{% endblock %}", "{% call f() %}", "{% endcall %}", "{% filter upper %}", "{% endfilter %}",
        "{% with a = 1 %}", "{% endwith %}", "{% generation %}", "{%", "{{", "#}", "{#", "{% for x in x recursive %}",
    )
)  # fmt: skip
_EXPRESSIONS = st.sampled_from(
    (
        "m.content", "messages[0].role", "messages[-9]", "messages.x.y", "bos_token", "add_generation_prompt", "f(f)",
        "f(1)", "self.a()", "loop(x)", "loop.index", "raise_exception('a')", "raise_exception(1, 2)",
        "1 / 0", "x.append(x)",
        "strftime_now('%Y')", "strftime_now('\\ud800')", "strftime_now(1)", "messages|tojson", "x|tojson", "x|length",
        "''.__class__.__mro__[1].__subclasses__()", "messages.__class__", "cycler.__init__.__globals__", "range(9**9)",
        "lipsum(n=1)", "joiner()()", "'%s%n'|format(1)", "'{0.__class__}'.format(x)", "'a'.center(-1)", "[1]|first.x",
        "x|attr('__class__')", "x is foo", "x|foo", "'\\ud800'", "'\\0\\x1b'", "messages.clear()", "x.pop()", "1|x",
        "dict(a=1)|items", "{}|min", "namespace()", "m|map(attribute='a.b')|list", "[[]]|sort",
        "messages|sum", "u" * 900,
        "(" * 120 + ")" * 120, "9" * 5000, "1e999|int", "-'a'", "not", "[x for x in y]", "m['\\u2028']", "''|int(1,99)",
        "x|groupby(1)", "'a'|indent(-5)", "'a'|truncate(-1)", "'a'|wordwrap(0)", "1.5|round(9999)", "'a'|batch(0)|list",
        "range(3)|random", "[1]|slice(0)|list", "'a'|urlize", "'x'|filesizeformat", "messages|xmlattr", "'%'|urlencode",
    )
)  # fmt: skip
_TEMPLATES = st.lists(_STATEMENTS | _EXPRESSIONS.map(lambda e: f"{{{{ {e} }}}}") | texts(), max_size=9).map("".join)
_GOOD_TEMPLATE = "{%% for m in messages %%}{{ m.role }}: {{ m.content }}%s{%% endfor %%}"


def _check_template(source: str) -> None:
    """A template is refused, or it makes a text of a conversation or refuses that."""
    try:
        template = ChatTemplate(source, {"bos_token": "<|endoftext|>"})
    except CheckpointError as error:
        _check_message(error)
        return
    _render(template)


def _render(template: ChatTemplate) -> None:
    messages = [{"role": role, "content": content} for role, content in (("user", "a"), ("assistant", "b\n"))]
    for continues in (False, True):
        with suppress(InvalidRequestError):
            template.render(messages, {}, begins_answer=not continues, continues_last=continues).encode()
    template.next_message_mark().encode()
    template.answer_end().encode()


@st.composite
def _tokenizer_files(draw: DrawFn) -> bytes:
    return damage(draw, to_json(change(draw, _TOKENIZER_FIELDS, _TOKENIZER_NAMES, _TOKENIZER_VALUES)))


# Adapters

_LORA: Mapping[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "alpha_pattern": {"q_proj": 4}}
_LORA_NAMES = (
    *_LORA, "rank_pattern", "use_rslora", "use_dora", "bias", "modules_to_save", "trainable_token_indices",
    "init_lora_weights", "new",
)  # fmt: skip


@cache
def _adapters() -> tuple[Path, dict[str, bytes]]:
    """A directory, and the sound files that are damaged in it."""
    directory = _directory() / "adapters"
    config = model_config("demo")
    lora = write_lora(directory, config, layers=(0,)) / "adapter_model.safetensors"
    data = {"adapter_model.safetensors": lora.read_bytes()}
    vector = write_control_vector(directory / "v.gguf", {1: torch.ones(config.d_model)})
    data["v.gguf"] = vector.read_bytes()
    edits: dict[str, Any] = {
        f"transformer.h.1.mlp.fc_out.weight.{side}": numpy.ones((4, 2), "f4") for side in ("left", "right")
    }
    numpy.savez(directory / "e.npz", **edits)
    save_file({"direction.1": torch.ones(3, config.d_model)}, directory / "d.safetensors")
    data["d.safetensors"] = (directory / "d.safetensors").read_bytes()
    data["e.npz"] = (directory / "e.npz").read_bytes()
    return directory, data


@st.composite
def _adapter_files(draw: DrawFn) -> tuple[str, bytes, bytes]:
    name = draw(st.sampled_from(("adapter_model.safetensors", "v.gguf", "e.npz", "d.safetensors")))
    config = draw(changed(_LORA, _LORA_NAMES, _FIELDS).map(to_json))
    return name, damage(draw, _adapters()[1][name]), config


def _check_adapter(case: tuple[str, bytes, bytes]) -> None:
    """Files are an adapter, or an error."""
    name, data, config = case
    directory, _ = _adapters()
    (directory / name).write_bytes(data)
    (directory / "adapter_config.json").write_bytes(config)
    try:
        open_fitting(directory if name.startswith("adapter") else directory / name, model_config("demo"))
    except CheckpointError as error:
        _check_message(error)


TARGETS = (
    Target("adapters", _adapter_files(), _check_adapter, 6),
    Target("checkpoints", st.integers(0, 2**62), _check_checkpoint, 12),
    Target(
        "configurations",
        st.tuples(
            changed(_CONFIG, _CONFIG_NAMES, _FIELDS).map(to_json),
            st.none() | changed(_GENERATION, _GENERATION_NAMES, _FIELDS).map(to_json),
        ),
        _check_config,
        6,
    ),
    Target(
        "settings",
        changed(_SETTINGS, _SETTING_NAMES, _FIELDS | texts()).map(to_json)
        | st.dictionaries(st.none() | st.integers() | texts() | st.booleans(), texts(), max_size=2),
        _check_settings,
        6,
    ),
    Target("keys", _yaml_files(_KEYS), _check_keys, 5),
    Target("devices", _yaml_files(_DEVICES), _check_devices, 2),
    Target(
        "tokenizers",
        st.tuples(
            st.integers(0, 1),
            _tokenizer_files(),
            _tokenizer_files(),
            st.none() | _TEMPLATES.map(lambda text: text.encode("utf-8", "surrogatepass")),
        ),
        _check_tokenizer,
        6,
    ),
    Target("templates", _TEMPLATES | _TEMPLATES.map(lambda part: _GOOD_TEMPLATE % part), _check_template, 10),
)
