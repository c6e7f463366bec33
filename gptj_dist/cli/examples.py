"""Command lines to copy, with which `gptj-dist COMMAND --help` ends."""

from __future__ import annotations

from collections.abc import Mapping

EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "serve": (
        "gptj-dist serve demo --stages 2",
        "gptj-dist serve EleutherAI/gpt-j-6b --revision float16 --layers 8,7,7,6",
        "gptj-dist serve demo --host 0.0.0.0 --port 80 --api-keys keys.yaml",
    ),
    "stop": ("gptj-dist stop", "gptj-dist stop --address 10.0.0.7:6379 --name gptj"),
    "status": ("gptj-dist status", "gptj-dist status --url 10.0.0.7:8000 --json"),
    "top": ("gptj-dist top", "gptj-dist top --once --url 10.0.0.7:8000"),
    "repartition": ("gptj-dist repartition --layers 8,7,7,6 --api-key KEY",),
    "plan": (
        "gptj-dist plan demo --stages 4",
        "gptj-dist plan EleutherAI/gpt-j-6b --devices devices.yaml",
        "gptj-dist plan EleutherAI/gpt-j-6b --devices devices.yaml --rate 8",
        "gptj-dist plan demo --check",
    ),
    "key": ("gptj-dist key", "gptj-dist key --name alice --tokens-per-minute 20000"),
    "doctor": ("gptj-dist doctor", "gptj-dist doctor demo --stages 2 --port 8080"),
    "up": ("gptj-dist up", "gptj-dist up --interface eth1 --discover", "gptj-dist up --interface lo --cpus 1"),
    "join": (
        "gptj-dist join 18000-1RRXD-NMV4F-2RYM5-YC755",
        "gptj-dist join --discover DD6S3-RP7N1-FK0XM",
    ),
    "nodes": ("gptj-dist nodes", "gptj-dist nodes --address 10.0.0.7:6379 --json"),
    "leave": ("gptj-dist leave",),
    "complete": (
        'gptj-dist complete "The state of the Union is" --max-tokens 40 --seed 1',
        "head -c 2000 speech.txt | gptj-dist complete --temperature 0 > rest.txt",
        'gptj-dist complete "Once" -n 3 --json',
    ),
    "chat": (
        "gptj-dist chat",
        'gptj-dist chat --system "You answer in one sentence." --temperature 0.7',
        'gptj-dist chat --message "What is a whale?"',
    ),
    "batch": (
        "gptj-dist batch requests.jsonl answers.jsonl",
        "gptj-dist batch requests.jsonl answers.jsonl --url 10.0.0.7:8000",
        "gptj-dist batch requests.jsonl answers.jsonl --model demo --stages 2",
    ),
    "generate": ('gptj-dist generate demo --prompt "Call me Ishmael." --seed 3 --stages 2',),
    "download": (
        "gptj-dist download EleutherAI/gpt-j-6b --revision float16",
        "gptj-dist download EleutherAI/gpt-j-6b --stages 4 --stage 2",
    ),
    "inspect": ("gptj-dist inspect demo", "gptj-dist inspect EleutherAI/gpt-j-6b"),
    "convert": (
        "gptj-dist convert EleutherAI/gpt-j-6b gptj-layers --dtype bfloat16",
        "gptj-dist convert EleutherAI/gpt-j-6b gptj-int4 --quantize int4",
        "gptj-dist convert edited-gptj fact.safetensors --delta EleutherAI/gpt-j-6b",
    ),
    "verify": ("gptj-dist verify gptj-layers", 'gptj-dist verify demo --prompt "Call me Ishmael." --tolerance 1e-5'),
    "adapter": ("gptj-dist adapter inspect adapters/poet", "gptj-dist adapter check adapters/poet --model demo"),
    "drift": ("gptj-dist drift demo", "gptj-dist drift gptj-layers --quantize int4 --text speech.txt"),
    "synth": ("gptj-dist synth tiny random-gptj", "gptj-dist synth 6b /tmp/gptj-6b --shard-gb 2"),
}
"""By the command's name."""
