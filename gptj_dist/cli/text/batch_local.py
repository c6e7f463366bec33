"""Answers a batch's requests with a model in this process, using the same code as a server."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from gptj_dist.answers.answer import Answer
from gptj_dist.answers.chat_defaults import ChatDefaults
from gptj_dist.answers.embedding import EmbeddingAnswer
from gptj_dist.answers.error_responses import error_response
from gptj_dist.answers.local import serve_in_process
from gptj_dist.answers.schema.base import parse_body
from gptj_dist.answers.schema.chat import ChatRequest
from gptj_dist.answers.schema.completions import CompletionRequest
from gptj_dist.answers.schema.embeddings import EmbeddingRequest
from gptj_dist.answers.schema.responses import ResponsesRequest
from gptj_dist.answers.service import AnswerService
from gptj_dist.checkpoint.hub import model_name
from gptj_dist.cli.text.batch_answers import BatchAnswer, respond
from gptj_dist.cli.text.batch_requests import BatchRequest
from gptj_dist.config import PipelineConfig
from gptj_dist.errors import GPTJDistError, NotReadyError, StageFailedError
from gptj_dist.json_types import JsonObject
from gptj_dist.text.chat import read_template


class LocalAnswerer:
    """Answers requests one by one; those that are asked at the same time share micro-batches."""

    def __init__(self, texts: AnswerService) -> None:
        self._texts = texts

    async def answer(self, request: BatchRequest) -> BatchAnswer:
        """The answer that a server would give.

        Raises:
            NotReadyError, StageFailedError: the model failed.
        """
        request_id = uuid.uuid4().hex
        try:
            return respond(request, 200, await self._answer(request, request_id), request_id)
        except (NotReadyError, StageFailedError):
            raise
        except GPTJDistError as error:
            return respond(request, *error_response(error), request_id)

    async def _answer(self, request: BatchRequest, request_id: str) -> JsonObject:
        body = json.dumps(request.body).encode()
        answer: Answer | EmbeddingAnswer
        match request.url:
            case "/v1/completions":
                answer = await self._texts.complete(parse_body(body, CompletionRequest), request_id)
            case "/v1/chat/completions":
                answer = await self._texts.chat(parse_body(body, ChatRequest), request_id)
            case "/v1/responses":
                answer = await self._texts.respond(parse_body(body, ResponsesRequest), request_id)
            case "/v1/embeddings":
                answer = await self._texts.embed(parse_body(body, EmbeddingRequest), request_id)
        return await answer.whole()


@asynccontextmanager
async def answering_here(
    config: PipelineConfig,
    names: tuple[str, ...],
    chat_template: Path | None,
    chat: ChatDefaults = ChatDefaults(),  # noqa: B008  # frozen
) -> AsyncIterator[LocalAnswerer]:
    """A model that answers while the context lasts.

    Args:
        names: what requests may call it; none takes its own name.
        chat: for conversations whose requests leave it out.

    Raises:
        ConfigurationError: the settings, the template or the checkpoint are invalid.
    """
    print(f"Loading {config.model} ...", file=sys.stderr)
    template = None if chat_template is None else read_template(chat_template)
    async with serve_in_process(config, names or (model_name(config.model),), template, chat) as texts:
        yield LocalAnswerer(texts)
