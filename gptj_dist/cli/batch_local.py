"""Has a batch's requests answered by a model in this process, by the code that a server answers them with."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from gptj_dist.cli.batch_files import Answer, BatchRequest, JsonObject, respond
from gptj_dist.config import PipelineConfig
from gptj_dist.errors import ConfigurationError, GPTJDistError, NotReadyError, StageFailedError
from gptj_dist.serving.errors import error_response
from gptj_dist.serving.local import serve_in_process
from gptj_dist.serving.schema.base import parse_body
from gptj_dist.serving.schema.chat import ChatRequest
from gptj_dist.serving.schema.completions import CompletionRequest
from gptj_dist.serving.schema.tokens import EmbeddingRequest
from gptj_dist.serving.settings import AppConfig, read_template
from gptj_dist.serving.texts import TextService


class LocalAnswerer:
    """Answers requests one by one; those that are asked at the same time share micro-batches."""

    def __init__(self, texts: TextService) -> None:
        self._texts = texts

    async def answer(self, request: BatchRequest) -> Answer:
        """What a server would answer.

        Raises:
            StageFailedError: the model failed.
            ConfigurationError: nothing is served at the request's url.
        """
        request_id = uuid.uuid4().hex
        try:
            return respond(request, 200, await self._answer(request, request_id), request_id)
        except (ConfigurationError, NotReadyError, StageFailedError):
            raise
        except GPTJDistError as error:
            return respond(request, *error_response(error), request_id)

    async def _answer(self, request: BatchRequest, request_id: str) -> JsonObject:
        body = json.dumps(request.body).encode()
        match request.url:
            case "/v1/completions":
                return await (await self._texts.complete(parse_body(body, CompletionRequest), request_id)).whole()
            case "/v1/chat/completions":
                return await (await self._texts.chat(parse_body(body, ChatRequest), request_id)).whole()
            case "/v1/embeddings":
                return await (await self._texts.embed(parse_body(body, EmbeddingRequest), request_id)).whole()
        raise ConfigurationError(f"{request.url} is not served")


@asynccontextmanager
async def answering_here(
    config: PipelineConfig, names: tuple[str, ...], chat_template: Path | None
) -> AsyncIterator[LocalAnswerer]:
    """A model that answers while the context lasts.

    Args:
        names: what requests may call it.

    Raises:
        ConfigurationError: the settings, the template or the checkpoint will not do.
    """
    template = None if chat_template is None else read_template(chat_template)
    async with serve_in_process(AppConfig(config, served_model_names=names, chat_template=template)) as texts:
        yield LocalAnswerer(texts)
