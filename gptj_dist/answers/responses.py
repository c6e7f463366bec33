"""The form of OpenAI's responses, for plain text: one message, whole or as the events that build it."""

from __future__ import annotations

from collections.abc import Iterator

from gptj_dist.answers.completion import TextDelta, TokenCounts
from gptj_dist.answers.error_responses import error_response
from gptj_dist.answers.schema.responses import ResponsesRequest
from gptj_dist.answers.sse import sse_event
from gptj_dist.answers.writers import TokenNames, listed_logprobs
from gptj_dist.engine.request import FinishReason
from gptj_dist.json_types import JsonObject
from gptj_dist.text.tokenizer import Tokenizer

INCOMPLETE = {FinishReason.LENGTH: "max_output_tokens", FinishReason.CONTENT_FILTER: "content_filter"}
"""OpenAI's words for a text that did not end by itself."""


class ResponseForm:
    """A `Form` of one message.

    Args:
        request_id: the ids of the response and of its message are made of it.
        created: seconds since 1970.
        model: the name that the response has.
        num_prompt_tokens: of the input.
    """

    def __init__(
        self,
        request: ResponsesRequest,
        request_id: str,
        created: int,
        model: str,
        tokenizer: Tokenizer,
        num_prompt_tokens: int,
    ) -> None:
        self._request = request
        self._request_id = request_id
        self._model = model
        self._tokenizer = tokenizer
        self._names = TokenNames(tokenizer, by_id=False)
        self._num_prompt_tokens = num_prompt_tokens
        self._created = created
        self._num_events = 0
        self._text = ""
        self._logprobs: list[JsonObject] = []
        self._finish_reason: FinishReason | None = None

    def whole(self, completions: Iterator[TextDelta], counts: TokenCounts) -> JsonObject:
        """The response with its message."""
        self._take(next(completions))
        return self._finished(counts)

    def event(self, index: int, delta: TextDelta) -> bytes:  # noqa: ARG002  # there is one message
        """New text; before the first, the events that open the response and its message."""
        frames = b"" if self._num_events else self._opening()
        logprobs = self._take(delta)
        if delta.text or logprobs:
            frames += self._frame("output_text.delta", **self._place, delta=delta.text, logprobs=logprobs)
        return frames

    def end(self, counts: TokenCounts) -> bytes:
        """The events that close the message and the response."""
        response = self._finished(counts)
        return (
            self._frame("output_text.done", **self._place, text=self._text, logprobs=self._logprobs)
            + self._frame("content_part.done", **self._place, part=self._part())
            + self._frame("output_item.done", output_index=0, item=self._message(response["status"]))
            + self._frame(response["status"], response=response)
        )

    def failure(self, error: Exception) -> bytes:
        """The response, which has failed."""
        message = error_response(error)[1]["error"]["message"]
        failed = {"code": "server_error", "message": message}
        return self._frame("failed", response=self._response("failed") | {"error": failed})

    def renumber(self, num_events: int) -> None:
        """The next event's `sequence_number`."""
        self._num_events = num_events

    @property
    def _place(self) -> JsonObject:
        """Where the text is in the response."""
        return {"item_id": f"msg_{self._request_id}", "output_index": 0, "content_index": 0}

    def _opening(self) -> bytes:
        response = self._response("in_progress")
        return (
            self._frame("created", response=response)
            + self._frame("in_progress", response=response)
            + self._frame("output_item.added", output_index=0, item=self._message("in_progress") | {"content": []})
            + self._frame("content_part.added", **self._place, part=self._part())
        )

    def _frame(self, kind: str, **fields: object) -> bytes:
        name = f"response.{kind}"
        payload = {"type": name, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return sse_event(name, payload)

    def _take(self, delta: TextDelta) -> list[JsonObject]:
        """Adds new text to the message. Returns the log probabilities of its tokens, if they are wanted."""
        logprobs = []
        if self._request.has_logprobs:
            logprobs = [listed_logprobs(token, self._names, self._tokenizer) for token in delta.logprobs]
        self._text += delta.text
        self._logprobs += logprobs
        self._finish_reason = delta.finish_reason
        return logprobs

    def _finished(self, counts: TokenCounts) -> JsonObject:
        reason = None if self._finish_reason is None else INCOMPLETE.get(self._finish_reason)
        status = "completed" if reason is None else "incomplete"
        return self._response(status) | {
            "output": [self._message(status)],
            "incomplete_details": None if reason is None else {"reason": reason},
            "usage": {
                "input_tokens": self._num_prompt_tokens,
                "input_tokens_details": {"cached_tokens": counts.cached, "cache_write_tokens": 0},
                "output_tokens": counts.output,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": self._num_prompt_tokens + counts.output,
            },
        }

    def _message(self, status: str) -> JsonObject:
        return {
            "type": "message",
            "id": self._place["item_id"],
            "status": status,
            "role": "assistant",
            "content": [self._part()],
        }

    def _part(self) -> JsonObject:
        return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": self._logprobs}

    def _response(self, status: str) -> JsonObject:
        """All fields of a response that has no output yet."""
        request = self._request
        form = request.text_format
        return {
            "id": f"resp_{self._request_id}",
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata,
            "model": self._model,
            "output": [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": request.tool_choice,
            "tools": [],
            "top_logprobs": request.top_logprobs,
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": request.user,
        }
