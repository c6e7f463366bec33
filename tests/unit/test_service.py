"""What requests become, short of HTTP: answers of a source whose tokens are known."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gptj_dist.answers.answer import Answer, best
from gptj_dist.answers.chat_defaults import ChatDefaults
from gptj_dist.answers.completion import TextDelta
from gptj_dist.answers.error_responses import UnknownModelError
from gptj_dist.answers.moderation import ContentRefusedError, Moderation, Role
from gptj_dist.answers.resumable import ResumableStream
from gptj_dist.answers.schema.base import Body, parse_body
from gptj_dist.answers.schema.chat import ChatRequest
from gptj_dist.answers.schema.completions import CompletionRequest
from gptj_dist.answers.schema.tokens import DetokenizeRequest, TokenizeRequest
from gptj_dist.answers.served_model import ServedModel
from gptj_dist.answers.service import AnswerService
from gptj_dist.checkpoint.hub import resolve_model
from gptj_dist.config import PipelineConfig
from gptj_dist.engine.limits import EngineLimits
from gptj_dist.engine.mailbox import Delta
from gptj_dist.engine.record import RequestRecord
from gptj_dist.engine.request import FinishReason
from gptj_dist.errors import GPTJDistError, InvalidRequestError, NotReadyError, StageFailedError, TimeoutReachedError
from gptj_dist.params import AdapterChoice, AdapterSource, SamplingParams, TokenLogprobs
from gptj_dist.text.chat import ChatTemplate
from gptj_dist.text.tokenizer import Tokenizer
from gptj_dist.text.vocabulary import write_tokenizer
from gptj_dist.token_rules import TokenRules

TOKENIZER = Tokenizer.load(resolve_model("demo"))
TEXT = " a new world of"
TOKENS = tuple(TOKENIZER.encode(TEXT))
EOS = 50256
LIMITS = EngineLimits(rules=TokenRules(50400), max_model_len=64, kv_tokens=1024, num_layers=28)
TEMPLATE = ChatTemplate(
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    {},
)


def logprobs_of(token_ids: Sequence[int], number: int | None) -> tuple[TokenLogprobs, ...]:
    """Made up, but told apart by their tokens."""
    if number is None:
        return ()
    top = ((11, -0.5), (12, -1.5))
    return tuple(TokenLogprobs(token_id, -token_id / 1000, 3, top[:number]) for token_id in token_ids)


@dataclass(slots=True)
class Script:
    """A source that gives every choice the same tokens, one at a time.

    Args:
        error: raised after `num_before_error` tokens.
        is_stuck: no token ever comes.
    """

    error: Exception | None = None
    num_before_error: int = 0
    is_stuck: bool = False
    num_cached_tokens: int = 0
    num_drafted: int = 0
    asked: list[tuple[tuple[int, ...], SamplingParams]] = field(default_factory=list)
    log_ids: list[str] = field(default_factory=list)
    num_open: int = 0

    def limits(self) -> EngineLimits:
        return LIMITS

    def streams(self, records: Sequence[RequestRecord]) -> list[AsyncGenerator[Delta, None]]:
        self.log_ids.append(str(records[0].log_id))
        self.asked.append((records[0].prompt_ids, records[0].params))
        return [self._stream(record.prompt_ids, record.params) for record in records]

    async def _stream(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[Delta, None]:
        self.num_open += 1
        try:
            if self.is_stuck:
                await asyncio.Event().wait()
            for number, token_id in enumerate(TOKENS):
                if self.error is not None and number == self.num_before_error:
                    raise self.error
                is_last = number == len(TOKENS) - 1
                yield Delta(
                    (token_id,),
                    FinishReason.LENGTH if is_last else None,
                    logprobs_of([token_id], params.logprobs),
                    logprobs_of(prompt_ids[1:], params.prompt_logprobs) if number == 0 else (),
                    num_cached_tokens=self.num_cached_tokens if number == 0 else 0,
                    num_drafted=number < self.num_drafted,
                )
        finally:
            self.num_open -= 1


def service(script: Script, moderation: Moderation | None = None) -> AnswerService:
    return AnswerService(ServedModel(("demo", "alias"), TOKENIZER, (EOS,), TEMPLATE), script, moderation)


def complete(script: Script, moderation: Moderation | None = None, **fields: Any) -> dict[str, Any]:
    """The body of a response that is not streamed."""
    request = parse_body(json.dumps({"prompt": "Once upon"} | fields).encode(), CompletionRequest)

    async def run() -> dict[str, Any]:
        return await (await service(script, moderation).complete(request, "7")).whole()

    return asyncio.run(run())


def chat(script: Script, **fields: Any) -> dict[str, Any]:
    async def run() -> dict[str, Any]:
        return await (await service(script).chat(chat_request(**fields), "7")).whole()

    return asyncio.run(run())


def chat_request(**fields: Any) -> ChatRequest:
    given = {"messages": [{"role": "user", "content": "Hello"}]} | fields
    return parse_body(json.dumps(given).encode(), ChatRequest)


def events(
    script: Script, moderation: Moderation | None = None, kind: type[Body] = CompletionRequest, **fields: Any
) -> list[Any]:
    """The events of a stream, parsed but for a last `[DONE]`."""

    async def run() -> list[bytes]:
        texts = service(script, moderation)
        if kind is ChatRequest:
            answer = await texts.chat(chat_request(stream=True, **fields), "7")
        else:
            body = json.dumps({"prompt": "Once upon", "stream": True} | fields).encode()
            answer = await texts.complete(parse_body(body, CompletionRequest), "7")
        return [frame async for frame in answer.events()]

    frames = [frame.removeprefix(b"data: ") for frame in b"".join(asyncio.run(run())).split(b"\n\n")[:-1]]
    return [frame.decode() if frame == b"[DONE]" else json.loads(frame) for frame in frames]


class TestDefaultsOfTheCheckpoint:
    """Where a request is silent; `Script` keeps the parameters that it was asked for."""

    DEFAULTS: ClassVar = {"temperature": 0.5, "top_k": 7, "repetition_penalty": 1.2, "max_tokens": 40}

    def _params(self, defaults: dict[str, float], kind: str = "completions", **fields: Any) -> SamplingParams:
        script = Script()
        texts = AnswerService(ServedModel(("demo",), TOKENIZER, (EOS,), TEMPLATE, defaults=defaults), script)

        async def run() -> None:
            if kind == "chat":
                await (await texts.chat(chat_request(**fields), "7")).whole()
            else:
                body = json.dumps({"prompt": "Once upon"} | fields).encode()
                await (await texts.complete(parse_body(body, CompletionRequest), "7")).whole()

        asyncio.run(run())
        return script.asked[0][1]

    @pytest.mark.parametrize("kind", ["completions", "chat"])
    def test_a_silent_request_has_them_and_one_that_speaks_has_its_own(self, kind: str) -> None:
        silent = self._params(self.DEFAULTS, kind)
        assert (silent.temperature, silent.top_k, silent.repetition_penalty, silent.max_tokens) == (0.5, 7, 1.2, 40)
        asked = self._params(self.DEFAULTS, kind, temperature=1.0, top_k=0, repetition_penalty=1.0, max_tokens=3)
        assert (asked.temperature, asked.top_k, asked.repetition_penalty, asked.max_tokens) == (1.0, 0, 1.0, 3)
        assert self._params(self.DEFAULTS, kind, temperature=None).temperature == 0.5

    def test_without_any_a_completion_has_sixteen_tokens(self) -> None:
        assert self._params({}) == self._params({}, temperature=1.0, max_tokens=16)

    @pytest.mark.parametrize("kind", ["completions", "chat"])
    def test_a_default_of_more_tokens_than_fit_is_cut_to_what_fits(self, kind: str) -> None:
        params = self._params({"max_tokens": 5000}, kind)
        assert 40 < params.max_tokens < LIMITS.max_model_len


class TestTokensThatTheCheckpointAdds:
    """A tokenizer whose `tokenizer_config.json` asks for a first token."""

    @pytest.fixture
    def model(self, tmp_path: Path) -> ServedModel:
        write_tokenizer(tmp_path, 300)
        config = {"add_bos_token": True, "bos_token": "<|endoftext|>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return ServedModel(("demo",), Tokenizer.load(tmp_path), (299,), TEMPLATE)

    def _answer(self, answering: Coroutine[Any, Any, Answer]) -> None:
        async def run() -> None:
            await (await answering).whole()

        asyncio.run(run())

    @pytest.mark.parametrize(("given", "is_added"), [({}, True), ({"add_special_tokens": False}, False)])
    def test_a_prompt_begins_with_it_unless_the_request_says_no(
        self, model: ServedModel, given: dict[str, bool], is_added: bool
    ) -> None:
        script = Script()
        request = parse_body(json.dumps({"prompt": "One"} | given).encode(), CompletionRequest)
        self._answer(AnswerService(model, script).complete(request, "7"))
        assert (script.asked[0][0][0] == 299) == is_added

    @pytest.mark.parametrize(("given", "is_added"), [({}, False), ({"add_special_tokens": True}, True)])
    def test_a_conversation_begins_with_it_if_the_request_says_so(
        self, model: ServedModel, given: dict[str, bool], is_added: bool
    ) -> None:
        script = Script()
        self._answer(AnswerService(model, script).chat(chat_request(**given), "7"))
        assert (script.asked[0][0][0] == 299) == is_added

    @pytest.mark.parametrize(("given", "is_added"), [({}, True), ({"add_special_tokens": False}, False)])
    def test_tokenize_shows_it(self, model: ServedModel, given: dict[str, bool], is_added: bool) -> None:
        request = parse_body(json.dumps({"prompt": "One"} | given).encode(), TokenizeRequest)
        body = asyncio.run(AnswerService(model, Script()).tokenize(request))
        assert (body["tokens"][0] == 299) == is_added


class TestCompletions:
    def test_a_response_is_openais(self) -> None:
        body = complete(Script(), n=2)
        completion = Completion.model_validate(body)
        assert completion.model_dump(exclude_unset=True) == body
        assert (completion.id, completion.model) == ("cmpl-7", "demo")
        assert [choice.text for choice in completion.choices] == [TEXT, TEXT]
        assert completion.usage is not None
        assert completion.usage.total_tokens == 2 * len(TOKENS) + len(TOKENIZER.encode("Once upon"))

    def test_a_stream_has_the_text_in_pieces_and_ends(self) -> None:
        *chunks, done = events(Script())
        assert done == "[DONE]"
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(TOKENS) - 1) + ["length"]
        assert all("usage" not in chunk for chunk in chunks)

    def test_usage_comes_last_and_is_null_before(self) -> None:
        *chunks, last, done = events(Script(), stream_options={"include_usage": True})
        assert done == "[DONE]"
        assert [chunk["usage"] for chunk in chunks] == [None] * len(TOKENS)
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == len(TOKENS)

    def test_usage_says_how_many_tokens_of_prompts_were_cached(self) -> None:
        assert complete(Script())["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        script = Script(num_cached_tokens=16)
        assert complete(script, prompt=["Once upon", "a time"])["usage"]["prompt_tokens_details"]["cached_tokens"] == 32
        *_, last, _ = events(script, stream_options={"include_usage": True})
        assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}
        chunk, *_ = events(script, stream_options={"continuous_usage_stats": True})
        assert chunk["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}

    def test_metrics_say_how_many_tokens_were_drafted(self) -> None:
        script = Script(num_drafted=3)
        assert complete(Script())["metrics"] == {"drafted_tokens": 0}
        assert complete(script, n=2)["metrics"] == {"drafted_tokens": 6}
        *chunks, last, _ = events(script, stream_options={"include_usage": True})
        assert last["metrics"] == {"drafted_tokens": 3}
        assert not any("metrics" in chunk for chunk in chunks)
        cut = complete(Script(num_drafted=99), stop=[TEXT[4:8]])
        assert cut["metrics"]["drafted_tokens"] == cut["usage"]["completion_tokens"] < len(TOKENS)

    @pytest.mark.parametrize("include_usage", [True, False])
    @pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
    def test_usage_so_far_is_in_every_chunk_if_wanted(self, kind: type[Body], include_usage: bool) -> None:
        options = {"continuous_usage_stats": True, "include_usage": include_usage}
        *chunks, done = events(Script(), kind=kind, stream_options=options, n=2, max_tokens=8)
        last = chunks.pop() if include_usage else {"choices": []}
        assert last["choices"] == []
        for index in (0, 1):
            usages = [chunk["usage"] for chunk in chunks if chunk["choices"][0]["index"] == index]
            assert [usage["completion_tokens"] for usage in usages] == list(range(1, len(TOKENS) + 1))
            assert all(usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] for usage in usages)
            assert {usage["prompt_tokens"] for usage in usages} == {chunks[0]["usage"]["prompt_tokens"]}
        if include_usage:
            assert last["usage"]["completion_tokens"] == 2 * len(TOKENS)
            assert last["usage"]["prompt_tokens"] == chunks[0]["usage"]["prompt_tokens"]
        assert done == "[DONE]"

    def test_the_logprobs_of_the_prompt_come_with_the_first_piece_though_it_has_no_text(self) -> None:
        stop = TEXT[:6] + "!"  # text that may be the beginning of it is held back
        first, *rest = events(Script(), prompt_logprobs=1, stop=stop)[:-1]
        assert first["choices"][0]["text"] == ""
        assert len(first["choices"][0]["prompt_logprobs"]) == len(TOKENIZER.encode("Once upon"))
        assert all("prompt_logprobs" not in chunk["choices"][0] for chunk in rest)

    def test_an_alias_is_served_and_another_model_is_not(self) -> None:
        assert complete(Script(), model="alias")["model"] == "demo"
        with pytest.raises(UnknownModelError, match="'demo' and 'alias' is"):
            complete(Script(), model="gpt-4")

    def test_more_choices_than_can_be_made_are_refused(self) -> None:
        with pytest.raises(InvalidRequestError, match="at most 1024"):
            complete(Script(), prompt=["x"] * 9, n=128)

    def test_an_error_under_way_is_the_last_event_and_nothing_says_that_all_is_done(self) -> None:
        *chunks, last = events(Script(StageFailedError("stage 1 died"), num_before_error=2))
        assert len(chunks) == 2
        assert last["error"]["code"] == "stage_failed"

    def test_an_error_before_the_first_token_is_raised(self) -> None:
        with pytest.raises(NotReadyError):
            events(Script(NotReadyError("not yet")))

    def test_an_error_before_the_first_event_is_raised_though_tokens_have_come(self) -> None:
        held_back = TEXT[:6] + "!"
        with pytest.raises(StageFailedError):
            events(Script(StageFailedError("stage 1 died"), num_before_error=1), stop=held_back)

    def test_of_several_completions_one_that_the_moderator_refused_is_never_the_best(self) -> None:
        refused = TextDelta("", (), FinishReason.CONTENT_FILTER)
        unlikely = TextDelta("x", (1,), FinishReason.LENGTH, (TokenLogprobs(1, -9.0, 9, ()),))
        assert best([refused, unlikely], 1) == [unlikely]


class TestTimeouts:
    def test_a_request_that_is_not_done_in_time_is_given_up_and_frees_what_it_has(self) -> None:
        script = Script(is_stuck=True)
        with pytest.raises(TimeoutReachedError, match=r"0\.01 seconds") as raised:
            complete(script, timeout_s=0.01, n=3)
        assert raised.value.param == "timeout_s"
        assert script.num_open == 0

    def test_one_that_is_done_in_time_notices_nothing(self) -> None:
        assert complete(Script(), timeout_s=60)["choices"][0]["text"] == TEXT

    @pytest.mark.parametrize("timeout_s", [0, -1, 86_401, "1"])
    def test_a_time_that_cannot_be_is_refused(self, timeout_s: object) -> None:
        with pytest.raises(InvalidRequestError, match="timeout_s"):
            complete(Script(), timeout_s=timeout_s)


class TestChat:
    def test_a_response_is_openais(self) -> None:
        body = chat(Script(), n=2, max_tokens=8, logprobs=True, top_logprobs=1)
        completion = ChatCompletion.model_validate(body)
        assert (completion.id, completion.object) == ("chatcmpl-7", "chat.completion")
        assert [choice.message.content for choice in completion.choices] == [TEXT, TEXT]
        logprobs = completion.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert [token.logprob for token in logprobs.content] == [-token_id / 1000 for token_id in TOKENS]
        assert bytes(logprobs.content[0].bytes or []).decode() == TOKENIZER.token_text(TOKENS[0])
        assert [len(token.top_logprobs) for token in logprobs.content] == [1] * len(TOKENS)

    def test_a_stream_is_openais(self) -> None:
        *chunks, done = events(Script(), kind=ChatRequest, max_tokens=8)
        parsed = [ChatCompletionChunk.model_validate(chunk) for chunk in chunks]
        assert done == "[DONE]"
        assert [chunk.choices[0].delta.role for chunk in parsed] == ["assistant"] + [None] * (len(TOKENS) - 1)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in parsed) == TEXT
        assert parsed[-1].choices[0].finish_reason == "length"

    @pytest.mark.parametrize(
        ("fields", "prompt"),
        [
            ({}, "user: Hello\nassistant:"),
            ({"add_generation_prompt": False}, "user: Hello\n"),
            ({"continue_final_message": True}, "user: Hello"),
            ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}, "user: Hi\nassistant:"),
        ],
    )
    def test_the_template_makes_the_prompt(self, fields: dict[str, Any], prompt: str) -> None:
        script = Script()
        chat(script, max_tokens=8, **fields)
        assert TOKENIZER.decode(script.asked[0][0]) == prompt

    @staticmethod
    def asked(defaults: ChatDefaults, **fields: Any) -> tuple[tuple[int, ...], SamplingParams]:
        """The prompt and the parameters that a conversation comes to, at a server with such defaults."""
        script = Script()
        texts = AnswerService(ServedModel(("demo",), TOKENIZER, (EOS,), TEMPLATE, defaults), script)

        async def run() -> None:
            await (await texts.chat(chat_request(**fields), "7")).whole()

        asyncio.run(run())
        [asked] = script.asked
        return asked

    def test_without_a_limit_an_answer_ends_at_the_servers_or_where_the_window_does(self) -> None:
        assert self.asked(ChatDefaults(max_tokens=9))[1].max_tokens == 9
        prompt_ids, params = self.asked(ChatDefaults(max_tokens=10_000))
        assert len(prompt_ids) + params.max_tokens == LIMITS.max_model_len
        assert self.asked(ChatDefaults(max_tokens=9), min_tokens=12)[1].max_tokens == 12
        assert self.asked(ChatDefaults(max_tokens=9), max_tokens=20)[1].max_tokens == 20
        assert self.asked(ChatDefaults(max_tokens=9), max_completion_tokens=20)[1].max_tokens == 20

    def test_without_stop_strings_an_answer_ends_where_the_user_would_speak(self) -> None:
        assert self.asked(ChatDefaults())[1].stop == ("\nuser:",)
        assert self.asked(ChatDefaults(), stop=None)[1].stop == ("\nuser:",)
        assert self.asked(ChatDefaults(stop=("###", "\n\n")))[1].stop == ("###", "\n\n")
        assert self.asked(ChatDefaults(stop=()))[1].stop == ()
        assert self.asked(ChatDefaults(), stop="x")[1].stop == ("x",)
        assert self.asked(ChatDefaults(), stop=[])[1].stop == ()

    def test_a_cut_prompt_leaves_room_for_an_answer_of_no_stated_length(self) -> None:
        long = {"messages": [{"role": "user", "content": "word " * 200}], "truncate_prompt_tokens": -1}
        prompt_ids, params = self.asked(ChatDefaults(max_tokens=9), **long)
        assert (len(prompt_ids), params.max_tokens) == (LIMITS.max_model_len - 9, 9)

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"messages": [{"role": "user", "content": "word " * 200}]}, "messages"),
            ({"max_tokens": 64}, "max_tokens"),
            ({"max_completion_tokens": 64}, "max_completion_tokens"),
            ({"max_tokens": 10**4000}, "max_tokens"),
        ],
    )
    def test_what_does_not_fit_is_named_as_it_was_sent(self, fields: dict[str, Any], param: str) -> None:
        with pytest.raises(InvalidRequestError) as raised:
            self.asked(ChatDefaults(), **fields)
        assert raised.value.param == param
        assert len(str(raised.value)) < 200
        assert param in str(raised.value) or param == "messages"

    def test_a_model_without_a_template_says_how_to_give_one(self) -> None:
        texts = AnswerService(ServedModel(("demo",), TOKENIZER, (EOS,)), Script())
        with pytest.raises(InvalidRequestError, match="--chat-template FILE"):
            asyncio.run(texts.chat(chat_request(), "7"))

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"messages": []}, "messages"),
            ({"messages": [{"role": "user"}]}, "messages.0.content"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
                "messages.0.content.0.image_url",
            ),
            ({"max_tokens": 0}, "max_tokens"),
            ({"max_completion_tokens": 0}, "max_completion_tokens"),
            ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
            ({"top_logprobs": 1}, "top_logprobs"),
            ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
            ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
            ({"tools": [{}]}, "tools.0.type"),
            ({"n": 0}, "n"),
        ],
    )
    def test_what_cannot_be_is_refused_by_name(self, fields: dict[str, Any], param: str) -> None:
        with pytest.raises(InvalidRequestError) as raised:
            chat_request(**fields)
        assert raised.value.param == param


class TestModelCard:
    def test_it_has_the_context_window_under_every_name(self) -> None:
        model = ServedModel(("demo", "alias"), TOKENIZER, (EOS,), max_model_len=64)
        texts = AnswerService(model, Script())
        for name in model.names:
            card = texts.model_card(name)
            assert (card["id"], card["object"], card["max_model_len"]) == (name, "model", 64)
        with pytest.raises(UnknownModelError):
            texts.model_card("gpt-4")

    @pytest.mark.parametrize(
        ("names", "told"),
        [("b a", "of adapters 'a', 'b'"), ("g f e d c b a", "of adapters 'a', 'b', 'c', 'd', 'e' and 2 more")],
    )
    def test_where_it_is_unknown_the_adapters_that_there_are_are_named(self, names: str, told: str) -> None:
        loaded = dict.fromkeys(names.split(), AdapterSource("/x", "1"))
        texts = AnswerService(ServedModel(("demo",), TOKENIZER, (EOS,)), Script(), adapters=loaded)
        with pytest.raises(UnknownModelError) as raised:
            texts.model_card("gpt-4")
        assert str(raised.value) == f"model 'gpt-4' is not served here; 'demo' is, and {told}"

    def test_it_is_that_of_the_settings_or_of_the_model(self) -> None:
        for setting, expected in ((None, 1024), (256, 256)):
            config = PipelineConfig("demo", max_model_len=setting)
            assert ServedModel.load(config, ("demo",), None).max_model_len == expected


class TestTelling:
    """What is told of a request: how its completions ended, and what the log says."""

    @staticmethod
    def ends(script: Script, moderation: Moderation | None = None, num_read: int = 100, **fields: Any) -> list[str]:
        """How the completions of a stream ended of which so many events were read."""
        ends: list[str] = []

        async def run() -> None:
            texts = AnswerService(ServedModel(("demo",), TOKENIZER, (EOS,)), script, moderation, ends.append)
            request = parse_body(json.dumps({"prompt": "x", "stream": True} | fields).encode(), CompletionRequest)
            async with aclosing((await texts.complete(request, "7")).events()) as stream:
                for _ in range(num_read):
                    if await anext(stream, None) is None:
                        return

        with suppress(StageFailedError):
            asyncio.run(run())
        return ends

    def test_every_completion_ends_once_for_the_reason_that_its_client_is_told(self) -> None:
        assert self.ends(Script(), n=2) == ["length", "length"]
        assert self.ends(Script(), stop=[TEXT[1]]) == ["stop"]
        assert self.ends(Script(), Moderation(lambda _, role: "no" if role == "output" else None)) == ["content_filter"]

    def test_a_client_that_goes_aborts_and_a_failure_is_an_error(self) -> None:
        assert self.ends(Script(), num_read=1, n=3) == ["abort"] * 3
        failing = Script(error=StageFailedError("stage 1 died"), num_before_error=1)
        assert self.ends(failing, n=2) == ["error", "error"]
        assert self.ends(Script(error=StageFailedError("stage 1 died"))) == ["error"]

    @pytest.mark.parametrize("logs_prompts", [False, True])
    def test_the_log_has_the_requests_id_and_its_prompt_only_if_it_shall(
        self, caplog: pytest.LogCaptureFixture, logs_prompts: bool
    ) -> None:
        caplog.set_level(logging.INFO, logger="gptj_dist")
        script = Script()
        texts = AnswerService(ServedModel(("demo",), TOKENIZER, (EOS,)), script, logs_prompts=logs_prompts)
        request = parse_body(b'{"prompt": "very secret", "n": 2, "user": "u"}', CompletionRequest)

        async def run() -> None:
            await (await texts.complete(request, "req-9")).whole()

        asyncio.run(run())
        (record,) = caplog.records
        told = vars(record)["values"]
        num_tokens = len(TOKENIZER.encode("very secret"))
        prompts = {"prompts": ["very secret"]} if logs_prompts else {}
        assert record.getMessage() == "request accepted"
        assert told == {"request_id": "req-9", "choices": 2, "prompt_tokens": num_tokens, "user": "u"} | prompts
        assert script.log_ids == ["req-9"]


class TestModeration:
    @staticmethod
    def moderation(*refused: str) -> tuple[Moderation, list[tuple[str, Role]]]:
        """Refuses texts that hold a word; and a list of what it was asked."""
        asked: list[tuple[str, Role]] = []

        async def moderate(text: str, role: Role) -> str | None:
            asked.append((text, role))
            return next((f"it says {word}" for word in refused if word in text), None)

        return Moderation(moderate), asked

    def test_a_prompt_that_does_not_pass_is_refused_before_anything_is_computed(self) -> None:
        script = Script()
        with pytest.raises(ContentRefusedError, match="it says upon"):
            complete(script, self.moderation("upon")[0])
        assert not script.asked

    def test_an_answer_is_asked_about_as_it_grows(self) -> None:
        moderation, asked = self.moderation()
        assert complete(Script(), moderation)["choices"][0]["text"] == TEXT
        outputs = [text for text, role in asked if role == "output"]
        assert outputs[-1] == TEXT
        assert len(outputs) == len(TOKENS)

    def test_a_stream_ends_before_the_text_that_does_not_pass(self) -> None:
        script = Script()
        *chunks, done = events(script, self.moderation("world")[0])
        assert done == "[DONE]"
        assert "world" not in "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert chunks[-1]["choices"][0]["finish_reason"] == "content_filter"
        assert script.num_open == 0

    def test_a_refused_answer_has_the_log_probabilities_of_its_prompt(self) -> None:
        [choice] = complete(Script(), self.moderation("a")[0], prompt="Once", echo=True, logprobs=1)["choices"]
        assert choice["finish_reason"] == "content_filter"
        num_tokens = len(TOKENIZER.encode("Once"))
        assert {name: len(values) for name, values in choice["logprobs"].items()} == dict.fromkeys(
            ("tokens", "token_logprobs", "top_logprobs", "text_offset"), num_tokens
        )

    def test_a_moderator_need_not_be_async(self) -> None:
        assert complete(Script(), Moderation(lambda _text, _role: None))["choices"][0]["text"] == TEXT

    def test_a_moderator_that_fails_lets_nothing_pass(self) -> None:
        def fail(_text: str, _role: Role) -> None:
            raise ValueError("out of order")

        script = Script()
        with pytest.raises(ValueError, match="out of order"):
            complete(script, Moderation(fail))
        assert not script.asked


class TestTokens:
    @staticmethod
    def tokenize(**fields: Any) -> dict[str, Any]:
        request = parse_body(json.dumps(fields).encode(), TokenizeRequest)
        return asyncio.run(service(Script()).tokenize(request))

    def test_a_text_comes_back(self) -> None:
        body = self.tokenize(prompt=TEXT, return_token_strs=True)
        assert body == {
            "count": len(TOKENS),
            "max_model_len": 64,
            "tokens": list(TOKENS),
            "token_strs": [TOKENIZER.token_text(token_id) for token_id in TOKENS],
        }
        request = parse_body(json.dumps({"tokens": body["tokens"]}).encode(), DetokenizeRequest)
        assert asyncio.run(service(Script()).detokenize(request)) == {"prompt": TEXT}

    def test_a_conversation_is_tokenized_as_it_would_be_continued(self) -> None:
        body = self.tokenize(messages=[{"role": "user", "content": "Hello"}])
        assert TOKENIZER.decode(body["tokens"]) == "user: Hello\nassistant:"

    @pytest.mark.parametrize("fields", [{}, {"prompt": "x", "messages": [{"role": "user", "content": "y"}]}])
    def test_one_of_the_two_is_wanted(self, fields: dict[str, Any]) -> None:
        with pytest.raises(InvalidRequestError, match="either"):
            self.tokenize(**fields)

    def test_a_token_outside_the_vocabulary_is_refused(self) -> None:
        request = parse_body(b'{"tokens": [50400]}', DetokenizeRequest)
        with pytest.raises(GPTJDistError, match="50400"):
            asyncio.run(service(Script()).detokenize(request))


def test_a_resumed_stream_keeps_the_adapters_that_it_began_with() -> None:
    """Even if they have been replaced or unloaded since."""
    old, new = AdapterSource("/poet", "1"), AdapterSource("/poet", "2")
    body = parse_body(b'{"prompt": "Call", "max_tokens": 3, "model": "poet", "stream": true}', CompletionRequest)

    async def streamed(texts: AnswerService) -> bytes:
        answer = await texts.complete(body, "id", ResumableStream(0, 0, adapters={"poet": old}))
        async with aclosing(answer.events()) as events:
            return b"".join([event async for event in events])

    for loaded in ({"poet": new}, dict[str, AdapterSource]()):
        script = Script()
        texts = AnswerService(ServedModel(("demo",), TOKENIZER, (EOS,)), script, adapters=loaded)
        assert texts.adapters_of(body) == tuple(loaded.items())
        assert b'"model":"poet"' in asyncio.run(streamed(texts))
        [(_, params)] = script.asked
        assert params.adapters == (AdapterChoice("poet", source=old),)
