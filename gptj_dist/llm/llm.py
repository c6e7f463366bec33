"""`LLM`: a model in this process that completes, chats and embeds."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack
from dataclasses import fields, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

from gptj_dist.answers.adapters import with_sources
from gptj_dist.answers.chat_defaults import ChatDefaults
from gptj_dist.answers.local import running_engine
from gptj_dist.answers.schema.base import check_fields
from gptj_dist.answers.schema.chat import Conversation, check_shown
from gptj_dist.checkpoint.adapter_formats import open_fitting
from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.config import SERVER_SETTINGS, PipelineConfig, refuse_unknown_keys
from gptj_dist.engine.stats import PlanRecord
from gptj_dist.errors import ConfigurationError, InvalidRequestError
from gptj_dist.llm.background import BackgroundLoop
from gptj_dist.llm.completer import Completer
from gptj_dist.llm.outputs import Output
from gptj_dist.llm.progress import metered
from gptj_dist.llm.prompts import Prompt, PromptInput, params_of_prompts, read_prompt, read_prompts
from gptj_dist.llm.tools import read_tools, with_calls, with_tools
from gptj_dist.params import NOT_SAMPLED, AdapterSource, Pooling, PoolingKind, SamplingParams
from gptj_dist.stages.local import start_local
from gptj_dist.stages.trace import TraceFile, TracePart
from gptj_dist.text.chat import ChatTemplate, load_chat_template
from gptj_dist.text.tokenizer import Tokenizer

ChatMessage = Mapping[str, Any]
"""A message in OpenAI's form: `role` and `content`."""


class LLM:
    """A GPT-J and its engine in this process. Threads may share it; a fork of the process may not.

    It closes when it is garbage, and when the process exits; `close`, or a `with` statement, closes it earlier.

    Args:
        model: `demo`, a directory in the Hugging Face layout, or a hub name.
        adapters: directories of LoRA adapters by name, for `SamplingParams.adapters`.
        settings: fields of `PipelineConfig`, such as `stages=2` or `dtype="float32"`, but for `SERVER_SETTINGS`.

    Attributes:
        pipeline: the loaded stages.
        tokenizer: of the model.
        defaults: values of `SamplingParams` from the checkpoint's generation config, where `params` is None.

    Raises:
        ConfigurationError: a setting is unknown, has no effect here, has the wrong type or is out of range, the
            checkpoint is broken, or an adapter does not fit it.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        **settings: Any,
    ) -> None:
        refuse_unknown_keys(settings, [field.name for field in fields(PipelineConfig)])
        for name in SERVER_SETTINGS:
            if name in settings:
                raise ConfigurationError(f"{name} is for servers: it has no effect in a process of its own")
        if isinstance(settings.get("layers"), list):
            settings["layers"] = tuple(settings["layers"])
        config = PipelineConfig(os.fspath(model) if isinstance(model, os.PathLike) else model, **settings)
        self.pipeline, self._executor = start_local(config)
        self._directory = resolve_model(config.model, self.pipeline.blueprint.config.revision)
        self.tokenizer = Tokenizer.load(self._directory)
        self.defaults: Mapping[str, Any] = dict(self.pipeline.blueprint.model.generation.defaults)
        self._loop = BackgroundLoop("gptj-dist-llm")
        running = AsyncExitStack()
        self._close = weakref.finalize(self, self._loop.close, running.aclose)
        self._engine = self._loop.run(running.enter_async_context(running_engine(self.pipeline, self._executor)))
        self._completer = Completer(self._engine, self.tokenizer)
        self._adapters: dict[str, AdapterSource] = {}
        for name, path in (adapters or {}).items():
            self.load_adapter(name, path)

    def load_adapter(self, name: str, path: str | os.PathLike[str]) -> None:
        """Loads an adapter, or replaces the one of that name, while prompts may be completed.

        Args:
            path: a directory in PEFT's layout.

        Raises:
            CheckpointError: it cannot be read, or does not fit the model.
        """
        source = open_fitting(Path(path).absolute(), self.pipeline.blueprint.model).source()
        self._executor.load_adapter(source)
        self._adapters[name] = source

    def unload_adapter(self, name: str) -> None:
        """Forgets an adapter; what is being completed keeps it. Raises KeyError if there is none of that name."""
        del self._adapters[name]

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[Output]:
        """Completes prompts, all at once.

        Args:
            prompts: a text, a list of token ids, `{"prompt": text}`, `{"prompt_token_ids": ids}`, or a list of these.
            params: for all prompts, or a list with one for each. None takes `defaults`.
            use_tqdm: show a progress bar on standard error, if that is a terminal; the name is vLLM's.

        Raises:
            InvalidRequestError: an argument has the wrong type, or a prompt does not fit; none is completed.
            NotReadyError: the LLM has been closed, or belongs to another process.
        """
        token_ids = self._encode_all(prompts)
        return self._complete(token_ids, self._params_of(params, token_ids, self.defaults), use_tqdm)

    def beam_search(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[Output]:
        """Completes prompts with the likeliest texts that a beam search finds, the best first.

        Args:
            prompts, use_tqdm: as for `generate`.
            params: as for `generate`; `n` is the number of texts, and of beams unless `best_of` is given.

        Raises:
            InvalidRequestError, NotReadyError: as for `generate`.
        """
        token_ids = self._encode_all(prompts)
        defaults = {name: value for name, value in self.defaults.items() if name not in NOT_SAMPLED}
        each = self._params_of(params, token_ids, defaults)
        return self._complete(token_ids, [replace(one, use_beam_search=True) for one in each], use_tqdm)

    def chat(
        self,
        messages: Sequence[ChatMessage] | Sequence[Sequence[ChatMessage]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
    ) -> list[Output]:
        """Answers conversations, all at once, by the chat template of the checkpoint.

        Args:
            messages: a conversation, or a list of conversations. A message is a dict with `role` and `content`, in
                OpenAI's form, such as `Completion.message`.
            params: for all conversations, or a list with one for each. None ends an answer where the template begins
                the user's next message, and after 512 tokens.
            use_tqdm: as for `generate`.
            chat_template: Jinja, in place of the checkpoint's.
            add_generation_prompt: end the prompt with the beginning of an answer.
            continue_final_message: continue the last message; needs `add_generation_prompt=False`.
            tools: functions that the model may call, in OpenAI's form. `Completion.tool_calls` has the calls.
            tool_choice: "none" does not show them to the model, "auto" leaves it to the model whether it calls one,
                "required", or `{"type": "function", "function": {"name": ...}}`, makes it call.
            parallel_tool_calls: whether an answer may have several calls.

        Raises:
            InvalidRequestError: as for `generate`, or there is no template, or it refuses a conversation, or tools.
            CheckpointError: the template is not valid Jinja.
            NotReadyError: as for `generate`.
        """
        if add_generation_prompt and continue_final_message:
            raise InvalidRequestError(
                "continue_final_message needs add_generation_prompt=False", "continue_final_message"
            )
        template, use = self._chat_template(chat_template), read_tools(tools, tool_choice, parallel_tool_calls)
        prompts = []
        for conversation in _conversations(messages):
            check_shown(conversation.messages, template)
            prompt = template.render(
                [message.for_template() for message in conversation.messages],
                use.variables(template),
                begins_answer=add_generation_prompt,
                continues_last=continue_final_message,
            )
            prompts.append(self._encode(prompt))
        defaults = self._chat_defaults(template) | ({"stop": ()} if use.must_call else {})  # calls end themselves
        form, each = ChatDefaults().form_of_calls(template), self._params_of(params, prompts, defaults)
        outputs = self._complete(prompts, with_tools(each, use, form, self.tokenizer.grammars), use_tqdm)
        return [with_calls(output, form) for output in outputs] if use.shown else outputs

    def embed(
        self, prompts: PromptInput | Sequence[PromptInput], pooling: PoolingKind = "mean", layer: int | None = None
    ) -> list[tuple[float, ...]]:
        """Embeddings of prompts, each `d_model` float32 numbers: hidden states of the model.

        Args:
            prompts: as for `generate`.
            pooling: the mean over the prompt's tokens, or the last token.
            layer: as for `Pooling`.

        Raises:
            InvalidRequestError: an argument has the wrong type, or a prompt or the layer does not fit.
            NotReadyError: as for `generate`.
        """
        params = SamplingParams(max_tokens=0, pooling=Pooling(pooling, layer))
        return self._loop.run(self._completer.embed_all(self._encode_all(prompts), params))

    def stream(self, prompt: PromptInput, params: SamplingParams | None = None) -> Iterator[str]:
        """Completes one prompt once. Yields its text as it comes; closing the iterator cancels.

        Args:
            prompt: one of the forms of `generate`.
            params: without `n`, log probabilities and pooling, which a stream of text has no place for.

        Raises:
            InvalidRequestError: an argument has the wrong type, or the prompt does not fit.
            NotReadyError: as for `generate`.
        """
        token_ids = self._encode(read_prompt(prompt))
        [params] = self._params_of(params, [token_ids], self.defaults)
        if params.n != 1 or params.logprobs is not None or params.prompt_logprobs is not None:
            raise InvalidRequestError(
                "stream yields the text of one completion: n must be 1, logprobs and prompt_logprobs must be None"
            )
        pieces: SimpleQueue[str | BaseException | None] = SimpleQueue()
        reading = self._read(pieces, self._loop.submit(self._completer.pour(token_ids, params, pieces)))
        next(reading)  # into its `try`: to close or drop the iterator cancels from now on
        return reading

    def write_trace(self, path: str | Path) -> None:
        """Writes when each stage computed, for the last few thousand steps, in the format of https://ui.perfetto.dev.

        Raises:
            ConfigurationError: the file cannot be written.
        """
        with TraceFile(Path(path)) as trace:
            layers = self.pipeline.blueprint.layers
            trace.append([TracePart("in one process", layers, self._loop.run(self._records()))])

    def close(self) -> None:
        """Ends the engine, its streams and its threads. A second call does nothing."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _complete(
        self, prompts: Sequence[list[int]], params: Sequence[SamplingParams], is_shown: object
    ) -> list[Output]:
        if not isinstance(is_shown, bool):
            raise InvalidRequestError("use_tqdm must be True or False", "use_tqdm")
        with metered(len(prompts), is_shown) as meter:
            return self._loop.run(self._completer.complete_all(prompts, params, meter))

    def _encode_all(self, prompts: object) -> list[list[int]]:
        return [self._encode(prompt) for prompt in read_prompts(prompts)]

    def _encode(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode_prompt(prompt, self.pipeline.blueprint.model.empty_prompt_ids)

    def _params_of(
        self, params: object, prompts: Sequence[list[int]], defaults: Mapping[str, Any]
    ) -> list[SamplingParams]:
        """The parameters of each prompt; the defaults, with no more tokens than fit, where there are none."""
        if params is not None:
            each = params_of_prompts(params, len(prompts))
            if any(settings.pooling is not None for settings in each):
                raise InvalidRequestError("pooling makes embeddings: call embed", "pooling")
            for grammar in {settings.structured_outputs for settings in each}:
                if grammar is not None:
                    self.tokenizer.grammars.check(grammar)
            return [with_sources(settings, self._adapters) for settings in each]
        if "max_tokens" not in defaults:
            return [SamplingParams(**defaults)] * len(prompts)
        limits = self.pipeline.limits()
        window = min(limits.max_model_len, limits.kv_tokens)
        rooms = [max(1, min(defaults["max_tokens"], window - len(token_ids))) for token_ids in prompts]
        return [SamplingParams(**{**defaults, "max_tokens": room}) for room in rooms]

    def _chat_defaults(self, template: ChatTemplate) -> dict[str, Any]:
        chat = ChatDefaults()
        return {"max_tokens": chat.max_tokens, **self.defaults, "stop": chat.stop_strings(template)}

    def _chat_template(self, source: object) -> ChatTemplate:
        if source is not None and not isinstance(source, str):
            raise InvalidRequestError("chat_template must be the text of a Jinja template", "chat_template")
        template = load_chat_template(self._directory, source)
        if template is None:
            raise InvalidRequestError(
                "the model has no chat template, as GPT-J has none: give chat_template, the text of a Jinja template"
            )
        return template

    def _read(self, pieces: SimpleQueue[str | BaseException | None], pouring: Future[None]) -> Iterator[str]:
        """Yields "", then the text in a queue until None; a method, so that the LLM lives as long as the iterator."""
        try:
            yield ""
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            pouring.cancel()

    async def _records(self) -> tuple[PlanRecord, ...]:
        return self._engine.stats.records()


def _conversations(messages: object) -> list[Conversation]:
    """Conversations in OpenAI's form, checked."""
    if not isinstance(messages, list | tuple) or not messages:
        raise InvalidRequestError("messages must be a list of messages, or a list of such lists", "messages")
    several = list(messages) if isinstance(messages[0], list | tuple) else [messages]
    return [check_fields({"messages": list(one) if isinstance(one, tuple) else one}, Conversation) for one in several]
