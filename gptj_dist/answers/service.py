"""What the endpoints promise, short of HTTP: requests to answers, texts to tokens. Knows no Ray."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeAlias

from gptj_dist.answers.answer import Answer, Form
from gptj_dist.answers.chat_defaults import ChatDefaults
from gptj_dist.answers.choices import ChoicesForm, Head
from gptj_dist.answers.completion import TextDelta, stream_text
from gptj_dist.answers.deadline import Deadline
from gptj_dist.answers.embedding import EmbeddingAnswer
from gptj_dist.answers.error_responses import UnknownModelError
from gptj_dist.answers.moderation import Moderation
from gptj_dist.answers.responses import ResponseForm
from gptj_dist.answers.schema.base import naming
from gptj_dist.answers.schema.chat import ChatRequest, Message
from gptj_dist.answers.schema.completions import CompletionRequest
from gptj_dist.answers.schema.embeddings import EmbeddingRequest
from gptj_dist.answers.schema.responses import ResponsesRequest
from gptj_dist.answers.schema.sampling import SamplingFields
from gptj_dist.answers.schema.tokens import DetokenizeRequest, TokenizeRequest
from gptj_dist.answers.source import TokenSource
from gptj_dist.answers.writers import ChatWriter, CompletionWriter
from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.checkpoint.index import read_model_config
from gptj_dist.config import PipelineConfig
from gptj_dist.engine.mailbox import Delta
from gptj_dist.errors import InvalidRequestError
from gptj_dist.json_types import JsonObject
from gptj_dist.logs import values
from gptj_dist.params import SamplingParams
from gptj_dist.text.chat import ChatTemplate, load_chat_template
from gptj_dist.text.tokenizer import Tokenizer
from gptj_dist.text.tokenizer_info import tokenizer_info

logger = logging.getLogger(__name__)

MAX_CHOICES = 1024
MAX_USER_CHARS = 200
"""Of the request's `user` in the log."""

EncodedPrompt: TypeAlias = tuple[str, list[int]]
"""Its text, and its tokens."""

NO_TEMPLATE = (
    "the model has no chat template, as GPT-J has none: start the server with --chat-template FILE, "
    "or use /v1/completions"
)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What is known of the model in front of it.

    Args:
        names: what clients call it; the first is what answers say.
        chat: for conversations whose requests leave it out.
        max_model_len: the most tokens of prompt and output together, as far as it is known while the model loads.
        tokenizer_info: what `GET /tokenizer_info` returns.
    """

    names: tuple[str, ...]
    tokenizer: Tokenizer
    eos_token_id: int
    chat_template: ChatTemplate | None = None
    chat: ChatDefaults = ChatDefaults()  # noqa: RUF009  # frozen
    max_model_len: int | None = None
    tokenizer_info: JsonObject = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        config: PipelineConfig,
        names: tuple[str, ...],
        chat_template: str | None,
        chat: ChatDefaults = ChatDefaults(),  # noqa: B008  # frozen
    ) -> Self:
        """Reads it from the model's files, which have been fetched.

        Args:
            names: what clients call it.
            chat_template: Jinja, in place of the checkpoint's.
            chat: for conversations whose requests leave it out.

        Raises:
            CheckpointError: one of them is broken.
        """
        directory = resolve_model(config.model, config.revision)
        model = read_model_config(directory)
        tokenizer, template = Tokenizer.load(directory), load_chat_template(directory, chat_template)
        return cls(
            names=names,
            tokenizer=tokenizer,
            eos_token_id=model.eos_token_id,
            chat_template=template,
            chat=chat,
            max_model_len=config.max_model_len or model.context_length,
            tokenizer_info=tokenizer_info(directory, tokenizer.token_text(model.eos_token_id), template),
        )


class AnswerService:
    """Understands requests for text.

    Args:
        moderation: checks prompts and answers, if there is one.
        on_end: as of `Answer`.
        logs_prompts: whether the log shows prompts.
    """

    def __init__(
        self,
        model: ServedModel,
        source: TokenSource,
        moderation: Moderation | None = None,
        on_end: Callable[[str], None] = lambda _: None,
        logs_prompts: bool = False,
    ) -> None:
        self._model = model
        self._source = source
        self._moderation = moderation
        self._on_end = on_end
        self._logs_prompts = logs_prompts
        self._created = int(time.time())
        self._chat_stop = () if model.chat_template is None else model.chat.stop_strings(model.chat_template)

    async def complete(self, request: CompletionRequest, request_id: str) -> Answer:
        """The answer to a request for completions.

        Raises:
            GPTJDistError: it cannot be served.
        """
        deadline = Deadline(request.timeout_s)
        self.check_model(request.model)
        params = request.sampling_params(self._bad_words(request.bad_words))
        prompts = [
            self._cut(self.encode(prompt), prompt, request.truncate_prompt_tokens, request.max_tokens)
            for prompt in request.prompts()
        ]
        num_choices = len(prompts) * request.num_sampled
        if num_choices > MAX_CHOICES:
            raise InvalidRequestError(f"{num_choices} completions in one request, at most {MAX_CHOICES} are made", "n")
        writers = [
            CompletionWriter(i * request.n + choice, request, prompt, prompt_ids, self._model.tokenizer)
            for i, (prompt, prompt_ids) in enumerate(prompts)
            for choice in range(request.n)
        ]
        head = Head(f"cmpl-{request_id}", int(time.time()), self._model.names[0], "text_completion", "text_completion")
        form = ChoicesForm(request, head, writers, sum(len(prompt_ids) for _, prompt_ids in prompts))
        return await self._answer(request, request_id, form, prompts, params, deadline)

    async def chat(self, request: ChatRequest, request_id: str) -> Answer:
        """The answer to a conversation.

        Raises:
            GPTJDistError: it cannot be served.
        """
        deadline = Deadline(request.timeout_s)
        self.check_model(request.model)
        text = self.render(
            request.messages,
            request.chat_template_kwargs,
            begins_answer=not request.continue_final_message and request.add_generation_prompt is not False,
            continues_last=request.continue_final_message,
        )
        room = request.most_tokens or min(self._model.chat.max_tokens, self._source.limits().max_model_len // 2)
        text, prompt_ids = self._cut(self.encode(text), text, request.truncate_prompt_tokens, room)
        max_tokens = request.most_tokens or self._answer_tokens(request.min_tokens, len(prompt_ids))
        params = request.sampling_params(max_tokens, self._bad_words(request.bad_words), self._chat_stop)
        writers = [ChatWriter(choice, request, prompt_ids, self._model.tokenizer) for choice in range(request.n)]
        kinds = ("chat.completion", "chat.completion.chunk")
        head = Head(f"chatcmpl-{request_id}", int(time.time()), self._model.names[0], *kinds)
        form = ChoicesForm(request, head, writers, len(prompt_ids))
        return await self._answer(request, request_id, form, [(text, prompt_ids)], params, deadline)

    async def respond(self, request: ResponsesRequest, request_id: str) -> Answer:
        """The answer to a request for a response.

        Raises:
            GPTJDistError: it cannot be served.
        """
        deadline = Deadline(request.timeout_s)
        self.check_model(request.model)
        if isinstance(request.input, str) and request.instructions is None and self._model.chat_template is None:
            text = request.input
        else:
            text = self.render(request.messages(), {}, begins_answer=True)
        prompt_ids = self.encode(text)
        max_tokens = request.max_output_tokens or self._answer_tokens(request.min_tokens, len(prompt_ids))
        params = request.sampling_params(max_tokens, self._bad_words(request.bad_words), self._chat_stop)
        form = ResponseForm(request, request_id, self._model.names[0], self._model.tokenizer, len(prompt_ids))
        return await self._answer(request, request_id, form, [(text, prompt_ids)], params, deadline)

    async def embed(self, request: EmbeddingRequest, request_id: str) -> EmbeddingAnswer:
        """The answer to a request for embeddings.

        Raises:
            GPTJDistError: it cannot be served.
        """
        self.check_model(request.model)
        params = request.sampling_params()
        prompts = [self._cut(self.encode(prompt), prompt, None, 0) for prompt in request.prompts()]
        if len(prompts) > MAX_CHOICES:
            raise InvalidRequestError(f"{len(prompts)} inputs in one request, at most {MAX_CHOICES} are taken", "input")
        num_prompt_tokens = await self._accept(request, request_id, prompts, params)

        def open_streams() -> list[AsyncGenerator[Delta, None]]:
            return [self._source.streams(prompt_ids, params, 1, request_id)[0] for _, prompt_ids in prompts]

        return EmbeddingAnswer(request, self._model.names[0], open_streams, num_prompt_tokens)

    def tokenize(self, request: TokenizeRequest) -> JsonObject:
        """The tokens of a text or a conversation. Raises InvalidRequestError."""
        self.check_model(request.model)
        if request.messages is not None:
            text = self.render(
                request.messages, request.chat_template_kwargs, begins_answer=request.add_generation_prompt
            )
        else:
            text = request.prompt or ""
        token_ids = self._model.tokenizer.encode(text)
        body: JsonObject = {
            "count": len(token_ids),
            "max_model_len": self._source.limits().max_model_len,
            "tokens": token_ids,
        }
        if request.return_token_strs:
            body["token_strs"] = [self._model.tokenizer.token_text(token_id) for token_id in token_ids]
        return body

    def detokenize(self, request: DetokenizeRequest) -> JsonObject:
        """The text of tokens. Raises InvalidRequestError."""
        self.check_model(request.model)
        self._source.limits().check_vocabulary("tokens", request.tokens)
        return {"prompt": self._text_of(request.tokens)}

    def tokenizer_info(self) -> JsonObject:
        """The tokenizer's settings."""
        return self._model.tokenizer_info

    def model_card(self, name: str) -> JsonObject:
        """The model as `GET /v1/models` describes it, under one of its names. Raises UnknownModelError."""
        self.check_model(name)
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "gptj-dist",
            "max_model_len": self._model.max_model_len,
        }

    def check_model(self, name: str | None) -> None:
        """Raises UnknownModelError if the model is not served here."""
        if name is not None and name not in self._model.names:
            served = " and ".join(map(repr, self._model.names))
            raise UnknownModelError(f"model {name!r:.200} is not served here; {served} is", "model")

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt's token ids."""
        return self._model.tokenizer.encode_prompt(prompt, self._model.eos_token_id)

    def render(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        *,
        begins_answer: bool,
        continues_last: bool = False,
    ) -> str:
        """The text that a conversation is to the model. Raises InvalidRequestError."""
        if self._model.chat_template is None:
            raise InvalidRequestError(NO_TEMPLATE)
        return self._model.chat_template.render(
            [message.for_template() for message in messages],
            variables,
            begins_answer=begins_answer,
            continues_last=continues_last,
        )

    def _answer_tokens(self, min_tokens: int, num_prompt_tokens: int) -> int:
        """The most tokens of an answer whose request does not say."""
        limits = self._source.limits()
        num_left = min(limits.max_model_len, limits.kv_tokens) - num_prompt_tokens
        return max(1, min(num_left, max(self._model.chat.max_tokens, min_tokens)))

    def _cut(self, token_ids: list[int], prompt: str | list[int], most: int | None, max_tokens: int) -> EncodedPrompt:
        """A prompt's text and token ids, cut to the last `most` tokens; -1 leaves room for `max_tokens`."""
        if most == -1:
            most = max(1, self._source.limits().max_model_len - max_tokens)
        if most is not None and len(token_ids) > most:
            token_ids = token_ids[-most:]
            return self._text_of(token_ids), token_ids
        return prompt if isinstance(prompt, str) else self._text_of(token_ids), token_ids

    def _text_of(self, token_ids: Sequence[int]) -> str:
        """The text of tokens; a special one is its name, which is that token when the text is encoded again."""
        return b"".join(map(self._model.tokenizer.token_or_special_bytes, token_ids)).decode("utf-8", "replace")

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The tokens of words, at the beginning of a text and within it."""
        texts = [text for word in words for text in (word.strip(), f" {word.strip()}")]
        return tuple(tuple(self._model.tokenizer.encode(text)) for text in texts)

    async def _answer(
        self,
        request: SamplingFields,
        request_id: str,
        form: Form,
        prompts: Sequence[EncodedPrompt],
        params: SamplingParams,
        deadline: Deadline,
    ) -> Answer:
        num_prompt_tokens = await deadline.bound(self._accept(request, request_id, prompts, params))

        def open_streams() -> list[AsyncGenerator[TextDelta, None]]:
            return [
                self._watched(stream_text(tokens, self._model.tokenizer, params))
                for _, prompt_ids in prompts
                for tokens in self._source.streams(prompt_ids, params, request.num_sampled, request_id)
            ]

        most_tokens = len(prompts) * request.num_sampled * params.max_tokens
        return Answer(request, form, open_streams, num_prompt_tokens, most_tokens, deadline, self._on_end)

    async def _accept(
        self,
        request: SamplingFields | EmbeddingRequest,
        request_id: str,
        prompts: Sequence[EncodedPrompt],
        params: SamplingParams,
    ) -> int:
        """Checks prompts against limits and moderation, and logs them. Returns the number of their tokens.

        Raises:
            InvalidRequestError, NotReadyError: they cannot be served.
        """
        limits, user = self._source.limits(), request.user
        for text, prompt_ids in prompts:
            with naming(request):
                limits.check(prompt_ids, params)
                if self._moderation is not None:
                    await self._moderation.check_prompt(text)
        num_tokens = sum(len(prompt_ids) for _, prompt_ids in prompts)
        logger.info(
            "request accepted",
            extra=values(
                request_id=request_id,
                choices=len(prompts) * params.n,
                prompt_tokens=num_tokens,
                user=None if user is None else user[:MAX_USER_CHARS],
                prompts=[text for text, _ in prompts] if self._logs_prompts else None,
            ),
        )
        return num_tokens

    def _watched(self, stream: AsyncGenerator[TextDelta, None]) -> AsyncGenerator[TextDelta, None]:
        return stream if self._moderation is None else self._moderation.watch(stream)
