"""Checks of the fields that choose adapters, and of those that load them."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from gptj_dist.answers.schema.adapters import LoadAdapterRequest, UnloadAdapterRequest
from gptj_dist.answers.schema.completions import CompletionRequest
from gptj_dist.answers.schema.sampling import AdapterField, SamplingFields
from tests.adapters import ALL_TARGETS, model_config, write_lora
from tests.http.fields import Face, check, complete, ids
from tests.http.keys import bearer

POET = {"name": "poet"}


def completion(face: Face) -> Face:
    return Face(face.server, CompletionRequest)


def load(face: Face, **fields: Any) -> httpx.Response:
    return face.server.client.post("/v1/load_lora_adapter", json=fields)


def unload(face: Face, **fields: Any) -> httpx.Response:
    return face.server.client.post("/v1/unload_lora_adapter", json=fields)


def new_lora(seed: int) -> str:
    return str(write_lora(Path(tempfile.mkdtemp()), model_config("demo"), ALL_TARGETS, seed=seed, size=0.5))


@check(SamplingFields)
def of_adapters(face: Face) -> None:
    assert ids(face, adapters=[POET]) == ids(face, model="poet") != ids(face)
    assert complete(face, model="poet")["model"] == "poet"
    assert ids(face, model="lazy") == ids(face, adapters=[{"name": "lazy"}]) != ids(face)
    assert face.post(model="odd").status_code == 400
    assert face.post(model="../lazy").status_code == 404
    refused = face.post(adapters=[{"name": "nobody"}])
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "adapters"


@check(AdapterField)
def of_name(face: Face) -> None:
    assert ids(completion(face), adapters=[POET]) != ids(completion(face))


@check(AdapterField)
def of_strength(face: Face) -> None:
    assert ids(completion(face), adapters=[POET | {"strength": 0}]) == ids(completion(face))


@check(LoadAdapterRequest)
def of_lora_name(face: Face) -> None:
    answer = load(face, lora_name="pirate", lora_path=new_lora(2))
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'pirate' added successfully.")
    [card] = [card for card in face.server.client.get("/v1/models").json()["data"] if card["id"] == "pirate"]
    assert card["parent"] == "demo"
    assert Path(card["root"]).is_dir()
    assert ids(completion(face), model="pirate") not in (ids(completion(face)), ids(completion(face), model="poet"))
    assert unload(face, lora_name="pirate").status_code == 200
    guest = httpx.post(f"{face.server.base}/v1/load_lora_adapter", json={}, headers=bearer("guest"))
    assert guest.status_code == 403


@check(LoadAdapterRequest)
def of_lora_path(face: Face) -> None:
    path = write_lora(Path(tempfile.mkdtemp()), replace(model_config("demo"), d_model=8))
    refused = load(face, lora_name="misfit", lora_path=str(path))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "lora_path"
    assert "h.0.attn.q_proj A is [4, 8], not [4, 128]" in refused.json()["error"]["message"]


@check(LoadAdapterRequest)
def of_load_inplace(face: Face) -> None:
    assert load(face, lora_name="changing", lora_path=new_lora(3)).status_code == 200
    before = ids(completion(face), model="changing")
    assert load(face, lora_name="changing", lora_path=new_lora(4)).status_code == 400
    assert load(face, lora_name="changing", lora_path=new_lora(4), load_inplace=True).status_code == 200
    assert ids(completion(face), model="changing") != before


@check(UnloadAdapterRequest)
def of_lora_name_(face: Face) -> None:
    assert load(face, lora_name="brief", lora_path=new_lora(5)).status_code == 200
    answer = unload(face, lora_name="brief", lora_int_id=3)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'brief' removed successfully.")
    assert completion(face).post(model="brief").status_code == 404
    assert unload(face, lora_name="brief").status_code == 404
