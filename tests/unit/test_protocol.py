"""The completions protocol: what is refused and with which `param`, what responses look like, what errors become."""

from __future__ import annotations

import inspect
import json
import pickle
from collections.abc import Callable
from typing import Annotated, Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessage
from pydantic import ConfigDict, TypeAdapter, ValidationError

from gptj_dist.answers.error_responses import (
    BodyTooLargeError,
    UnknownModelError,
    error_response,
    response_headers,
    retry_after_s,
)
from gptj_dist.answers.moderation import ContentRefusedError
from gptj_dist.answers.schema.base import Body, parse_body
from gptj_dist.answers.schema.chat import ChatRequest, Message
from gptj_dist.answers.schema.completions import CompletionRequest
from gptj_dist.answers.schema.content import TextPart
from gptj_dist.answers.schema.embeddings import EmbeddingRequest
from gptj_dist.answers.schema.sampling import SAME_IN_PARAMS, ChoiceFields, StreamOptions
from gptj_dist.answers.schema.tokens import DetokenizeRequest
from gptj_dist.answers.sse import SSE_DONE, sse_frame
from gptj_dist.errors import (
    AuthenticationError,
    CheckpointError,
    InvalidRequestError,
    NotPermittedError,
    NotReadyError,
    RequestTooLongError,
    StageFailedError,
    TimeoutReachedError,
    TooManyRequestsError,
)
from gptj_dist.params import SamplingParams
from tests.settings import FIELD_NAMES, changed

UNSERVED = {
    name: value for name, value in CompletionRequest.unserved.items() if name not in CompletionRequest.model_fields
}
STRICT = ConfigDict(strict=True)
NEUTRAL: tuple[object, ...] = (None, False, 0, 0.0, "", [], {})
ANYTHING = (*NEUTRAL, True, "x", 7, [1], {"a": {"b": None}})


def parse_completion(body: bytes) -> CompletionRequest:
    return parse_body(body, CompletionRequest)


def parse(**fields: Any) -> CompletionRequest:
    return parse_completion(json.dumps({"prompt": "x", **fields}).encode())


def accepts(adapter: TypeAdapter[Any], value: object) -> bool:
    try:
        adapter.validate_python(value)
    except ValidationError:
        return False
    return True


def refusal(**fields: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as raised:
        parse(**fields)
    assert "\n" not in str(raised.value)
    return raised.value


class TestRequests:
    def test_a_prompt_is_enough(self) -> None:
        request = parse_completion(b'{"prompt": "Once"}')
        assert request.prompts() == ["Once"]
        assert request.sampling_params() == SamplingParams()
        assert (request.model, request.user, request.stream) == (None, None, False)

    def test_every_sampling_field_takes_effect(self) -> None:
        fields: dict[str, Any] = {
            "max_tokens": 9,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 40,
            "min_p": 0.1,
            "seed": -7,
            "n": 3,
            "min_tokens": 2,
            "ignore_eos": True,
            "logprobs": 4,
            "prompt_logprobs": 5,
            "presence_penalty": 0.1,
            "frequency_penalty": -0.2,
            "repetition_penalty": 1.3,
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
        }
        lists: dict[str, Any] = {"stop": ["a", "b"], "stop_token_ids": [3, 4], "allowed_token_ids": [3, 5]}
        params = parse(**fields, **lists, logit_bias={"7": -1.5}).sampling_params(bad_words=((1, 2),))
        tuples: dict[str, Any] = {name: tuple(value) for name, value in lists.items()}
        assert params == SamplingParams(**fields, **tuples, logit_bias=((7, -1.5),), bad_words=((1, 2),))

    def test_echo_asks_for_the_logprobs_of_the_prompt_too(self) -> None:
        assert parse(echo=True, logprobs=3).sampling_params().prompt_logprobs == 3
        assert parse(echo=True, logprobs=3, prompt_logprobs=5).sampling_params().prompt_logprobs == 5
        assert parse(echo=True).sampling_params().prompt_logprobs is None

    def test_choosing_the_best_needs_logprobs(self) -> None:
        assert parse(n=1, best_of=2).sampling_params().logprobs == 0
        assert parse(n=1, best_of=2, logprobs=4).sampling_params().logprobs == 4
        assert parse(n=2, best_of=2).sampling_params().logprobs is None

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"logit_bias": {"x": 1}}, "logit_bias"),
            ({"logit_bias": {"-1": 1}}, "logit_bias"),
            ({"logit_bias": {"1": 101}}, "logit_bias"),
            ({"logit_bias": {"1": "2"}}, "logit_bias.1"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"n": 3, "best_of": 2}, "best_of"),
            ({"best_of": 129}, "best_of"),
            ({"best_of": 2, "stream": True}, "best_of"),
            ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
            ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
            ({"bad_words": ["a", " "]}, "bad_words"),
            ({"allowed_token_ids": []}, "allowed_token_ids"),
            ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
            ({"logprobs": 21}, "logprobs"),
            ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ],
    )
    def test_values_that_cannot_be_are_refused(self, fields: dict[str, Any], param: str) -> None:
        assert refusal(**fields).param == param

    def test_no_tokens_are_fine_where_the_prompt_is_asked_about(self) -> None:
        assert parse(max_tokens=0, echo=True).sampling_params().max_tokens == 0
        assert parse(max_tokens=0, prompt_logprobs=0).sampling_params().max_tokens == 0

    def test_a_null_is_the_default(self) -> None:
        optional = dict.fromkeys(set(CompletionRequest.model_fields) - {"prompt"})
        assert parse(**optional) == parse()
        assert parse(stream=True, stream_options={"include_usage": None}).stream_options == StreamOptions()

    def test_whole_numbers_are_numbers(self) -> None:
        assert parse(temperature=0, top_p=1).sampling_params().is_greedy

    @pytest.mark.parametrize("body", [CompletionRequest, ChatRequest, EmbeddingRequest, DetokenizeRequest])
    def test_every_whole_number_may_be_written_with_a_decimal_point(self, body: type[Body]) -> None:
        """JSON does not distinguish 16.0 from 16."""
        for name, field in body.model_fields.items():
            kind: Any = Annotated[field.annotation, "the field", *field.metadata]
            of_field: TypeAdapter[Any] = TypeAdapter(kind, config=STRICT)
            forms = [form for form in ("16", "[16]", "[[16]]") if accepts(of_field, json.loads(form))]
            if "integer" in json.dumps(of_field.json_schema()):
                assert forms, name
                for form in forms:
                    assert repr(of_field.validate_python(json.loads(form.replace("16", "16.0")))) == form, name

    def test_neither_true_nor_a_string_nor_a_fraction_is_an_integer(self) -> None:
        for value in (True, "16", 16.5, 1e300, [16]):
            assert refusal(max_tokens=value).param == "max_tokens"
        for value in (True, "16", 16.5, -1, -1.0):
            assert refusal(stop_token_ids=[value]).param == "stop_token_ids.0"

    def test_every_sampling_parameter_can_be_set_by_a_request(self) -> None:
        """Embeddings set `pooling`; all others are fields of completions."""
        assert set(FIELD_NAMES) - CompletionRequest.model_fields.keys() == {"pooling"}

    @pytest.mark.parametrize("name", sorted(SAME_IN_PARAMS))
    def test_a_field_of_sampling_params_goes_into_them_by_its_name(self, name: str) -> None:
        assert parse(**changed(name)).sampling_params() == SamplingParams(**changed(name))

    def test_a_field_that_is_left_out_has_the_default_of_sampling_params(self) -> None:
        defaults = SamplingParams()
        for name in SAME_IN_PARAMS:
            declared = ChoiceFields.model_fields[name].default
            assert (tuple(declared) if isinstance(declared, list) else declared) == getattr(defaults, name)

    @pytest.mark.parametrize(("stop", "expected"), [("\n", ("\n",)), (["a", "b"], ("a", "b")), ([], ()), (None, ())])
    def test_stop_is_a_string_or_a_list(self, stop: object, expected: tuple[str, ...]) -> None:
        assert parse(stop=stop).sampling_params().stop == expected

    @pytest.mark.parametrize(
        ("prompt", "expected"),
        [
            ("text", ["text"]),
            ("", [""]),
            (["a", "b"], ["a", "b"]),
            ([1, 2, 3], [[1, 2, 3]]),
            ([[1], [2, 3]], [[1], [2, 3]]),
        ],
    )
    def test_a_prompt_has_four_forms(self, prompt: object, expected: object) -> None:
        assert parse(prompt=prompt).prompts() == expected


class TestRefusals:
    @pytest.mark.parametrize(
        "prompt",
        [[], [[]], [[1], []], [-1], [[1], [-2]], ["a", 1], [1, "a"], [1, [2]], [1.5], [True], [None], 7, {}, True],
    )
    def test_a_bad_prompt_is_explained_in_one_sentence(self, prompt: object) -> None:
        error = refusal(prompt=prompt)
        assert error.param == "prompt"
        assert str(error).startswith("prompt must be a string, a list of strings, a list of token ids")

    @pytest.mark.parametrize("body", [b"{}", b'{"prompt": null}'])
    def test_a_missing_prompt_is_named(self, body: bytes) -> None:
        with pytest.raises(InvalidRequestError, match="prompt is required") as raised:
            parse_completion(body)
        assert raised.value.param == "prompt"

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("model", 1),
            ("max_tokens", "16"),
            ("max_tokens", True),
            ("max_tokens", 16.5),
            ("max_tokens", 0),
            ("temperature", "1"),
            ("temperature", True),
            ("temperature", -0.1),
            ("temperature", 10**400),
            ("top_p", -0.1),
            ("top_p", 1.1),
            ("top_p", []),
            ("top_k", -2),
            ("top_k", 1.5),
            ("min_p", -1),
            ("seed", 2**64),
            ("seed", "a"),
            ("n", 0),
            ("n", 10**6),
            ("stop", 5),
            ("stop", ["a", 1]),
            ("stop", [""]),
            ("stop", ""),
            ("stop", ["a"] * 17),
            ("stream", "true"),
            ("stream", 1),
            ("stream_options", True),
            ("stream_options", {"include_usage": True}),
            ("user", 3),
            ("ignore_eos", 0),
            ("min_tokens", 17),
            ("min_tokens", -1),
        ],
    )
    def test_a_bad_value_is_refused_by_the_name_of_its_field(self, field: str, value: object) -> None:
        error = refusal(**{field: value})
        assert error.param == field
        assert field in str(error)

    @pytest.mark.parametrize(
        ("options", "param"),
        [
            ({"include_usage": "yes"}, "stream_options.include_usage"),
            ({"include_usages": True}, "stream_options.include_usages"),
            ({"continuous_usage_stats": 1}, "stream_options.continuous_usage_stats"),
        ],
    )
    def test_a_bad_option_is_refused_by_its_dotted_name(self, options: object, param: str) -> None:
        error = refusal(stream=True, stream_options=options)
        assert error.param == param
        assert param in str(error)

    def test_an_unknown_field_is_refused_with_the_nearest_name(self) -> None:
        error = refusal(temprature=1)
        assert error.param == "temprature"
        assert "did you mean 'temperature'?" in str(error)
        assert "mean" not in str(refusal(zzzzzz=1))

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"prompt=x",
            b"\xff\xfe",
            b"[]",
            b'"prompt"',
            b"null",
            b'{"prompt": "\\ud800"}',
            b'{"prompt": "x", "temperature": NaN}',
            b'{"prompt": "x", "top_p": Infinity}',
            b'{"prompt": ' + b"[" * 100_000,
            b'{"prompt": "x", "n": 1' + b"0" * 5000 + b"}",
        ],
    )
    def test_a_body_that_is_not_a_json_object_has_no_param(self, body: bytes) -> None:
        with pytest.raises(InvalidRequestError, match="the body") as raised:
            parse_completion(body)
        assert raised.value.param is None

    def test_a_number_too_large_for_a_float_is_refused(self) -> None:
        with pytest.raises(InvalidRequestError, match="finite") as raised:
            parse_completion(b'{"prompt": "x", "temperature": 1e999}')
        assert raised.value.param == "temperature"

    def test_messages_stay_short_however_long_the_input(self) -> None:
        assert len(str(refusal(prompt=["a"] * 1000 + [1]))) < 300
        assert len(str(refusal(user=["a" * 10_000]))) < 300
        for long in (
            refusal(**{"x" * 10_000: 1}),
            refusal(user={"x" * 10_000: ["y" * 10_000] * 9}),
            refusal(n=10**4000),
        ):
            assert len(str(long)) <= 300
            assert len(long.param or "") <= 200


class TestFieldsWithoutEffect:
    @pytest.mark.parametrize(("field", "default"), UNSERVED.items())
    def test_neutral_values_are_accepted_and_change_nothing(self, field: str, default: object) -> None:
        for value in (*NEUTRAL, default):
            assert parse(**{field: value}) == parse()

    @pytest.mark.parametrize("field", UNSERVED)
    @pytest.mark.parametrize("value", ["other", [7], {"7": 1}, 7, True, [None]])
    def test_other_values_are_refused_by_name(self, field: str, value: object) -> None:
        error = refusal(**{field: value})
        assert error.param == field
        assert f"{field} is not supported" in str(error)

    def test_a_neutral_number_is_neutral_however_it_is_written(self) -> None:
        assert parse(length_penalty=1.0) == parse()

    @pytest.mark.parametrize("field", sorted(CompletionRequest.hints))
    def test_a_hint_is_accepted_with_any_value_and_changes_nothing(self, field: str) -> None:
        for value in ANYTHING:
            assert parse(**{field: value}) == parse()

    def test_a_hint_among_the_options_of_a_stream_changes_nothing(self) -> None:
        for value in ANYTHING:
            assert parse(stream=True, stream_options={"include_obfuscation": value}) == parse(
                stream=True, stream_options={}
            )

    def test_no_hint_is_also_served_or_unserved(self) -> None:
        for body in (CompletionRequest, ChatRequest, EmbeddingRequest, Message, TextPart, StreamOptions):
            assert not body.hints & {*body.model_fields, *body.unserved}

    @pytest.mark.parametrize(
        ("method", "body"),
        [
            (openai.resources.Completions.create, CompletionRequest),
            (openai.resources.chat.Completions.create, ChatRequest),
            (openai.resources.Embeddings.create, EmbeddingRequest),
        ],
    )
    def test_every_field_of_openais_client_is_known(self, method: Callable[..., object], body: type[Body]) -> None:
        of_the_client = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
        fields = set(inspect.signature(method).parameters) - of_the_client
        assert fields - {*body.model_fields, *body.hints, *body.unserved} == set()


class TestMessages:
    """What came from a server goes back in."""

    @staticmethod
    def read(*messages: dict[str, Any], **fields: Any) -> ChatRequest:
        return parse_body(json.dumps({"messages": messages, **fields}).encode(), ChatRequest)

    @classmethod
    def refusal(cls, *messages: dict[str, Any], **fields: Any) -> InvalidRequestError:
        with pytest.raises(InvalidRequestError) as raised:
            cls.read(*messages, **fields)
        return raised.value

    def test_a_dumped_message_of_openais_client_is_accepted(self) -> None:
        message = ChatCompletionMessage(role="assistant", content="hi", annotations=[]).model_dump()
        assert {"refusal", "audio", "function_call", "tool_calls"} <= message.keys()
        assert self.read(message) == self.read({"role": "assistant", "content": "hi"})

    def test_a_message_of_gradios_history_is_accepted(self) -> None:
        metadata = {"title": None, "id": 3, "parent_id": None, "duration": 0.1, "status": "done", "log": None}
        for options in (None, [], [{"label": "a", "value": "b"}]):
            message = {"role": "user", "content": "hi", "metadata": metadata, "options": options}
            assert self.read(message) == self.read({"role": "user", "content": "hi"})

    @pytest.mark.parametrize("absent", [{}, {"content": None}, {"content": ""}, {"content": []}])
    def test_an_assistants_message_may_have_no_content(self, absent: dict[str, Any]) -> None:
        message = {"role": "assistant", "tool_calls": [], "name": None, **absent}
        assert self.read(message).messages[0].for_template() == {"role": "assistant", "content": ""}

    @pytest.mark.parametrize("role", ["user", "system", "tool"])
    def test_another_message_must_have_content(self, role: str) -> None:
        error = self.refusal({"role": "assistant"}, {"role": role, "content": None})
        assert (error.param, str(error)) == ("messages.1.content", "messages.1.content is required")

    def test_parts_of_text_are_joined_whatever_else_clients_put_in_them(self) -> None:
        parts = [
            {"type": "text", "text": "Hel", "cache_control": {"type": "ephemeral"}, "image_url": None},
            {"type": "text", "text": "lo", "annotations": []},
        ]
        assert self.read({"role": "user", "content": parts}).messages[0].for_template()["content"] == "Hello"

    @pytest.mark.parametrize(
        ("message", "param"),
        [
            ({"role": "user", "content": 5}, "messages.0.content"),
            ({"role": "user", "content": ["hi"]}, "messages.0.content.0"),
            ({"role": "user", "content": [{"type": "text"}]}, "messages.0.content.0.text"),
            ({"role": "user", "content": [{"type": "text", "text": 5}]}, "messages.0.content.0.text"),
            ({"role": "user", "content": [{"type": "image", "text": "x"}]}, "messages.0.content.0.type"),
            (
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
                "messages.0.content.0.image_url",
            ),
            (
                {
                    "role": "user",
                    "content": "hi",
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
                },
                "messages.0.tool_calls",
            ),
            ({"role": "user", "content": "hi", "refusal": "no"}, "messages.0.refusal"),
            ({"role": "user", "content": "hi", "contents": "x"}, "messages.0.contents"),
            ({"content": "hi"}, "messages.0.role"),
        ],
    )
    def test_what_is_wrong_with_a_message_is_named_by_its_place(self, message: dict[str, Any], param: str) -> None:
        error = self.refusal(message)
        assert error.param == param
        assert str(error).startswith(param)

    def test_where_there_are_no_tools_none_is_chosen(self) -> None:
        hello = {"role": "user", "content": "hi"}
        assert self.read(hello, tools=[], tool_choice="auto", parallel_tool_calls=True)
        assert self.read(hello, tools=None, tool_choice=None)
        for choice in ("required", {"type": "function", "function": {"name": "f"}}):
            assert self.refusal(hello, tool_choice=choice).param == "tool_choice"

    def test_the_prompts_logprobs_are_not_asked_of_a_chat_in_vain(self) -> None:
        assert self.refusal({"role": "user", "content": "hi"}, prompt_logprobs=0).param == "prompt_logprobs"


class TestResponses:
    def test_a_frame_is_one_line_for_any_reader(self) -> None:
        payload = {"text": "a\n\r\x85\u2028\u2029\x1c👩"}
        frame = sse_frame(payload)
        assert frame.endswith(b"\n\n")
        assert len(frame.decode().splitlines()) == 2
        assert json.loads(frame.removeprefix(b"data: ")) == payload
        assert SSE_DONE == b"data: [DONE]\n\n"


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "status", "type", "code"),
        [
            (InvalidRequestError("no", "top_p"), 400, "invalid_request_error", None),
            (RequestTooLongError("no", "prompt"), 400, "invalid_request_error", "context_length_exceeded"),
            (UnknownModelError("no", "model"), 404, "invalid_request_error", "model_not_found"),
            (BodyTooLargeError("no"), 413, "invalid_request_error", None),
            (ContentRefusedError("no", "prompt"), 400, "invalid_request_error", "content_filter"),
            (TimeoutReachedError("no", "timeout_s"), 408, "timeout", "timeout"),
            (AuthenticationError("no"), 401, "authentication_error", "invalid_api_key"),
            (NotPermittedError("no"), 403, "permission_error", "not_permitted"),
            (TooManyRequestsError("no", 3), 429, "rate_limit_error", "rate_limit_exceeded"),
            (NotReadyError("no"), 503, "service_unavailable", "not_ready"),
            (StageFailedError("no"), 503, "service_unavailable", "stage_failed"),
        ],
    )
    def test_every_error_has_its_status(self, error: Exception, status: int, type: str, code: str | None) -> None:
        param = error.param if isinstance(error, InvalidRequestError) else None
        expected = (status, {"error": {"message": "no", "type": type, "param": param, "code": code}})
        assert error_response(error) == expected
        assert error_response(pickle.loads(pickle.dumps(error))) == expected

    @pytest.mark.parametrize("error", [ValueError("/secret"), CheckpointError("/secret"), KeyError(), OSError(2, "x")])
    def test_what_was_not_meant_for_clients_is_a_500_that_says_nothing(self, error: Exception) -> None:
        status, body = error_response(error)
        assert status == 500
        assert body["error"]["type"] == "internal_error"
        assert "secret" not in json.dumps(body)

    def test_an_error_out_of_an_actor_does_not_show_the_remote_traceback(self) -> None:
        class RayTaskErrorLike(StageFailedError):
            """As `RayTaskError.as_instanceof_cause` builds it: args hold the cause, the text is the traceback."""

            def __str__(self) -> str:
                return 'Traceback: File "/secret.py"'

        status, body = error_response(RayTaskErrorLike(StageFailedError("stage 1 died")))
        assert status == 503
        assert body["error"]["message"] == "stage 1 died"

    def test_clients_that_try_again_by_themselves_are_told_when_that_is_in_vain(self) -> None:
        assert response_headers(TooManyRequestsError("no", 3)) == {"Retry-After": "3"}
        assert response_headers(TooManyRequestsError("no")) == {"x-should-retry": "false"}
        assert response_headers(TimeoutReachedError("no")) == {"x-should-retry": "false"}
        assert response_headers(AuthenticationError("no")) == {"WWW-Authenticate": "Bearer"}

    def test_only_what_may_pass_by_itself_is_to_be_retried(self) -> None:
        assert retry_after_s(NotReadyError("no")) is not None
        assert retry_after_s(StageFailedError("no")) is not None
        assert retry_after_s(pickle.loads(pickle.dumps(TooManyRequestsError("no", 3)))) == 3
        assert retry_after_s(TooManyRequestsError("no")) is None
        assert retry_after_s(InvalidRequestError("no")) is None
        assert retry_after_s(ValueError("no")) is None
