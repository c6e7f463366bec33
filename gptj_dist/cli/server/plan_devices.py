"""`gptj-dist plan --devices`: the best pipeline over devices from a file or a cluster, and what it would do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.checkpoint.index import read_model_config
from gptj_dist.config import ModelConfig, PipelineConfig
from gptj_dist.errors import ConfigurationError, one_line
from gptj_dist.operate.tables import layers_text, open_table
from gptj_dist.planning.cost import weight_bytes
from gptj_dist.planning.devices import (
    GPU_BANDWIDTH_EFFICIENCY,
    GPU_FLOPS_EFFICIENCY,
    KNOWN_DEVICES,
    DeviceSpec,
    gpus_of_node,
    known_device,
    parse_devices,
)
from gptj_dist.planning.forecast import (
    PlannedStage,
    Workload,
    decode_tokens_per_s,
    first_token_s,
    group_size,
    limiting_stage,
    mixed_step,
    mixed_tokens_per_s,
    num_kv_tokens,
    num_running,
)
from gptj_dist.planning.partition import PROMPT_TOKENS_PER_OUTPUT_TOKEN
from gptj_dist.planning.search import NUM_REQUESTS, best_pipeline, gains_of_one_more, raised_bits, with_bits
from gptj_dist.quantization import AUTO, BITS_OF, NONE, weights_text
from gptj_dist.sizes import bytes_text
from gptj_dist.stages.blueprint import DeviceReport, choose_dtype, quantized_model, quantized_name
from gptj_dist.yaml_files import read_yaml

CLUSTER = ("cluster", "ray")
MEASURED = "measured"
REQUEST_COUNTS = (1, 8, 32, 64)
PROMPT_TOKENS = 512


def print_best_pipeline(config: PipelineConfig, devices: str, address: str | None) -> None:
    """Finds the best pipeline and prints it with its predicted speed.

    Args:
        devices: a YAML file, `cluster`, or `measured` for a cluster whose CPUs are measured first.
        address: of the cluster; None finds the one that runs on this machine.

    Raises:
        ConfigurationError: the description or the settings are wrong, no cluster answers, or the model does not fit.
    """
    if devices.lower() == MEASURED:
        _print_measured_plan(config, address)
        return
    specs = _ask_cluster(address) if devices.lower() in CLUSTER else read_devices(Path(devices))
    model = read_model_config(resolve_model(config.model, config.revision))
    workload, pipeline = _plan(config, model, specs)
    console = Console(markup=False, emoji=False)
    console.print(_stage_table(workload, pipeline))
    console.print(_speed_table(workload, pipeline))
    for line in _remarks(workload, pipeline, specs, config):
        console.print(line, highlight=False, soft_wrap=line.startswith("gptj-dist"))


def _print_measured_plan(config: PipelineConfig, address: str | None) -> None:
    """What `serve --plan auto` would do on a cluster, and the command that does the same without measuring again."""
    from gptj_dist.operate.launch.cluster import AUTO as RUNNING
    from gptj_dist.operate.launch.cluster import connected

    with connected(address or RUNNING):
        from gptj_dist.operate.cluster.store import measured_links
        from gptj_dist.serving.auto_plan import plan_on_cluster

        plan = plan_on_cluster(config, measured_links())
    console = Console(markup=False, emoji=False)
    console.print(_stage_table(plan.workload, plan.pipeline.stages))
    console.print(_speed_table(plan.workload, plan.pipeline.stages))
    for line in [*plan.lines, *_assumptions(plan.workload, [])]:
        console.print(line, highlight=False, soft_wrap=True)
    chosen = plan.config
    layers, nodes = ",".join(map(str, chosen.layers or ())), ",".join(chosen.stage_nodes or ())
    bits = _bits_option(plan.workload, plan.pipeline.stages)
    console.print(
        f"gptj-dist serve {config.model} --layers {layers} --device {chosen.device} --stage-nodes {nodes} "
        f"--dtype {chosen.dtype}{bits}",
        highlight=False,
        soft_wrap=True,
    )


def workload_of(config: PipelineConfig, devices: str, address: str | None) -> tuple[Workload, Sequence[DeviceSpec]]:
    """What is served, and the devices. With `--quantize auto`, as if all devices made one pipeline.

    Raises:
        ConfigurationError: as `print_best_pipeline`.
    """
    specs = _ask_cluster(address) if devices.lower() in CLUSTER else read_devices(Path(devices))
    model = read_model_config(resolve_model(config.model, config.revision))
    workload, _ = _plan(config, model, specs)
    return _of_least_bits(workload), specs


def read_devices(path: Path) -> tuple[DeviceSpec, ...]:
    """The devices of a YAML file. Raises ConfigurationError if it cannot be read, or describes none."""
    return parse_devices(_read(path))


def _read(path: Path) -> object:
    try:
        return read_yaml(path)
    except OSError as error:
        hint = "" if path.suffix or "/" in str(path) else "; it takes a YAML file or 'cluster'"
        raise ConfigurationError(f"--devices: {path} cannot be read: {error.strerror}{hint}") from error
    except ValueError as error:
        raise ConfigurationError(f"--devices: {path} is not YAML: {one_line(error)}") from error


def _ask_cluster(address: str | None) -> tuple[DeviceSpec, ...]:
    """The GPUs of a running Ray cluster, or if it has none, a CPU device for each node.

    Raises:
        ConfigurationError: no cluster answers, or it has a GPU without known figures.
    """
    from gptj_dist.operate.launch.cluster import AUTO, connected

    with connected(address or AUTO):
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return devices_of_nodes(nodes)


def devices_of_nodes(nodes: Sequence[Mapping[str, float]]) -> tuple[DeviceSpec, ...]:
    """The devices of a cluster by the resources that Ray reports of its nodes.

    Raises:
        ConfigurationError: a GPU's type is not reported, or has no known figures.
    """
    gpus = [gpu for node in nodes for gpu in gpus_of_node(node)]
    if gpus:
        return tuple(gpus)
    cpus = [replace(known_device("cpu"), memory_bytes=node.get("memory", 0.0)) for node in nodes if node.get("CPU")]
    if not cpus:
        raise ConfigurationError("--devices cluster: the cluster has neither a GPU nor a CPU")
    return tuple(cpus)


def _plan(
    config: PipelineConfig, model: ModelConfig, specs: Sequence[DeviceSpec]
) -> tuple[Workload, Sequence[PlannedStage]]:
    """What is served, and the best pipeline for it. With `auto`, weights have as many bits as there is room for.

    Raises:
        ConfigurationError: the settings name bits of stages, or the model does not fit.
    """
    if config.quantize != AUTO or model.quantization is not None:
        if config.quantize not in (None, AUTO, NONE, *BITS_OF):
            raise ConfigurationError("--devices chooses the stages: give --quantize int8, int4 or auto")
        wanted = model if config.quantize in (None, AUTO) else quantized_model(model, config, [model.num_layers])
        workload = _workload(config, wanted, specs)
        return workload, best_pipeline(workload, specs)
    for bits in (None, "int8"):
        with suppress(ConfigurationError):
            return _plan(replace(config, quantize=bits), model, specs)
    workload, pipeline = _plan(replace(config, quantize="int4"), model, specs)
    bits_of = raised_bits(workload, pipeline)
    return with_bits(workload, bits_of, [stage.layers.num_layers for stage in pipeline]), pipeline


def _workload(config: PipelineConfig, model: ModelConfig, specs: Sequence[DeviceSpec]) -> Workload:
    max_model_len = config.max_model_len or model.context_length
    if max_model_len > model.context_length:
        raise ConfigurationError(f"max_model_len {max_model_len} exceeds the model's context of {model.context_length}")
    reports = [
        DeviceReport(spec.name, f"{spec.name}/{i}", 1, int(spec.memory_bytes), spec.fast_dtypes)
        for i, spec in enumerate(specs)
    ]
    return Workload(model, choose_dtype(config, model, reports), max_model_len)


def _stage_table(workload: Workload, pipeline: Sequence[PlannedStage]) -> Table:
    running = num_running(workload, pipeline, NUM_REQUESTS)
    step = mixed_step(workload, group_size(running, len(pipeline)))
    table = open_table("stage", "layers", "device", numbers=("weights", "KV tokens", "ms a step"))
    for stage in pipeline:
        table.add_row(
            str(stage.layers.stage),
            layers_text(stage.layers),
            f"{stage.device.name}, {weights_text(quantized_name(workload.model, stage.layers), workload.dtype)}",
            bytes_text(weight_bytes(workload.model, stage.layers, workload.dtype)),
            f"{stage.num_kv_tokens(workload):,}",
            _ms(stage.step_s(workload, step)),
        )
    return table


def _speed_table(workload: Workload, pipeline: Sequence[PlannedStage]) -> Table:
    table = open_table(numbers=("predicted tokens/s at", "run at once", "decode alone", "with prompts"))
    for count in REQUEST_COUNTS:
        table.add_row(
            f"{count} request{'s' * (count > 1)}",
            str(num_running(workload, pipeline, count)),
            f"{decode_tokens_per_s(workload, pipeline, count):,.1f}",
            f"{mixed_tokens_per_s(workload, pipeline, count):,.1f}",
        )
    return table


def _remarks(
    workload: Workload, pipeline: Sequence[PlannedStage], specs: Sequence[DeviceSpec], config: PipelineConfig
) -> list[str]:
    limiting = pipeline[limiting_stage(workload, pipeline, NUM_REQUESTS)]
    num_prompt_tokens = min(PROMPT_TOKENS, workload.max_model_len)
    gains = [f"{name} {gain:.2f} x" for name, gain in gains_of_one_more(_of_least_bits(workload), specs).items()]
    unused = Counter(specs) - Counter(stage.device for stage in pipeline)
    lines = [
        f"First token of {num_prompt_tokens} prompt tokens, idle: "
        f"{_ms(first_token_s(workload, pipeline, num_prompt_tokens))} ms. "
        f"KV cache: {num_kv_tokens(workload, pipeline):,} tokens, the least of all stages.",
        f"Stage {limiting.layers.stage} ({limiting.device.name}) limits the speed.",
        f"One more device would make it: {', '.join(gains)}.",
    ]
    if unused:
        names = ", ".join(f"{count} {device.name}" for device, count in unused.items())
        lines.append(f"Left out, as they would only slow it: {names}.")
    quantization = workload.model.quantization
    if quantization is not None and not quantization.is_stored:
        lines.append(
            "Weights of fewer bits change what the model says. On the demo int8 raises the perplexity by 0.02 %, "
            f"int4 by 1 %; `gptj-dist drift {config.model} --text FILE` measures it."
        )
    return [*lines, *_assumptions(workload, specs), *_how_to_serve(workload, pipeline, config)]


def _assumptions(workload: Workload, specs: Sequence[DeviceSpec]) -> list[str]:
    lines = [
        f"Assumed: the cut is best for {NUM_REQUESTS} requests, {PROMPT_TOKENS_PER_OUTPUT_TOKEN} prompt tokens for "
        f"each output token, {workload.context_tokens} tokens of context; HTTP and coordinator cost nothing."
    ]
    if any(spec.kind == "cuda" and spec.name in KNOWN_DEVICES for spec in specs):
        lines.append(
            f"GPUs of known name: {GPU_BANDWIDTH_EFFICIENCY:.0%} of the published bandwidth, "
            f"{GPU_FLOPS_EFFICIENCY:.0%} of the FLOP/s, 5 us a kernel launch. Not measured."
        )
    if any(spec.kind == "cpu" for spec in specs):
        lines.append("A 'cpu' is 2 cores of an AMD EPYC with AVX-512 BF16, unless its figures were given.")
    return lines


def _how_to_serve(workload: Workload, pipeline: Sequence[PlannedStage], config: PipelineConfig) -> list[str]:
    layers = ",".join(str(stage.layers.num_layers) for stage in pipeline)
    lines = [
        f"gptj-dist serve {config.model} --layers {layers} --dtype {workload.dtype}{_bits_option(workload, pipeline)}"
    ]
    if len({stage.device for stage in pipeline}) > 1:
        lines.insert(
            0, "The devices differ: name their nodes in this order, by address or label, with --stage-nodes. Then:"
        )
    return lines


def _of_least_bits(workload: Workload) -> Workload:
    """The same with the least bits of its layers in all of them, so that it can be cut anew."""
    quantization = workload.model.quantization
    if quantization is None or quantization.is_stored:
        return workload
    return with_bits(workload, [min(bits for bits in quantization.layer_bits if bits is not None)])


def _bits_option(workload: Workload, pipeline: Sequence[PlannedStage]) -> str:
    """The option of `serve` for the bits of the stages' weights."""
    quantization = workload.model.quantization
    if quantization is None or quantization.is_stored:
        return ""
    names = [quantized_name(workload.model, stage.layers) for stage in pipeline]
    if len(set(names)) == 1:
        return f" --quantize {names[0]}"
    return f" --quantize {','.join(f'{stage}:{name}' for stage, name in enumerate(names))}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g}" if seconds < 1 else f"{seconds * 1e3:,.0f}"
