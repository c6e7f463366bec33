"""The form of OpenAI's responses: a message and calls of tools, whole or as the events that build them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from gptj_dist.answers.completion import TextDelta, TokenCounts
from gptj_dist.answers.error_responses import error_response
from gptj_dist.answers.output_items import CallItem, MessageItem, OutputItem, text_part
from gptj_dist.answers.schema.responses import ResponsesRequest
from gptj_dist.answers.sse import sse_event
from gptj_dist.answers.writers import TokenNames, listed_logprobs
from gptj_dist.engine.request import FinishReason
from gptj_dist.json_types import JsonObject
from gptj_dist.text.tokenizer import Tokenizer
from gptj_dist.text.tool_calls import CallPiece, CallReader, call_id

INCOMPLETE = {FinishReason.LENGTH: "max_output_tokens", FinishReason.CONTENT_FILTER: "content_filter"}
"""OpenAI's words for a text that did not end by itself."""


class _Growth(NamedTuple):
    """What is new of an item: text or arguments.

    Args:
        place: of the item in the output.
        logprobs: of the tokens of new text, if they are wanted.
    """

    place: int
    text: str
    logprobs: list[JsonObject]


class ResponseForm:
    """A `Form` of a message, if there is text or no call, and of calls after it.

    Args:
        request_id: all ids are made of it.
        created: seconds since 1970.
        model: the name that the response has.
        num_prompt_tokens: of the input.
        calls: reads the calls of tools in the text; None if there are none.
    """

    def __init__(
        self,
        request: ResponsesRequest,
        request_id: str,
        created: int,
        model: str,
        tokenizer: Tokenizer,
        num_prompt_tokens: int,
        calls: CallReader | None = None,
    ) -> None:
        self._request = request
        self._request_id = request_id
        self._model = model
        self._tokenizer = tokenizer
        self._names = TokenNames(tokenizer, by_id=False)
        self._num_prompt_tokens = num_prompt_tokens
        self._created = created
        self._calls = calls
        self._items: list[OutputItem] = []
        self._num_added = self._num_closed = 0  # of the items, those with such events
        self._num_events = 0
        self._finish_reason: FinishReason | None = None

    def whole(self, completions: Iterator[TextDelta], counts: TokenCounts) -> JsonObject:
        """The response with its output."""
        self._take(next(completions))
        return self._finished(counts)

    def event(self, index: int, delta: TextDelta) -> bytes:  # noqa: ARG002  # there is one completion
        """What is new; before the first, the events that open the response."""
        frames = b"" if self._num_events else self._opening()
        return frames + b"".join(map(self._grown, self._take(delta)))

    def end(self, counts: TokenCounts) -> bytes:
        """The events that close what is open, and the response."""
        response = self._finished(counts)
        frames = b"".join(map(self._added, range(self._num_added, len(self._items))))
        frames += b"".join(map(self._closed, range(self._num_closed, len(self._items))))
        return frames + self._frame(response["status"], response=response)

    def failure(self, error: Exception) -> bytes:
        """The response, which has failed."""
        message = error_response(error)[1]["error"]["message"]
        failed = {"code": "server_error", "message": message}
        return self._frame("failed", response=self._response("failed") | {"error": failed})

    def renumber(self, num_events: int) -> None:
        """The next event's `sequence_number`."""
        self._num_events = num_events

    def _take(self, delta: TextDelta) -> list[_Growth]:
        """Adds new text to the items."""
        self._finish_reason = delta.finish_reason
        text, pieces = delta.text, list[CallPiece]()
        if self._calls is not None:
            text, pieces = self._calls.push(text, delta.finish_reason is not None)
        logprobs = []
        if self._request.has_logprobs:
            logprobs = [listed_logprobs(token, self._names, self._tokenizer) for token in delta.logprobs]
        grown = [self._grow_message(text, logprobs)] if text or logprobs else []
        return grown + list(map(self._grow_call, pieces))

    def _grow_message(self, text: str, logprobs: list[JsonObject]) -> _Growth:
        if not self._items:
            self._items.append(MessageItem(f"msg_{self._request_id}"))
        message = self._items[-1]
        assert isinstance(message, MessageItem), "text comes before calls"
        message.text += text
        message.logprobs += logprobs
        return _Growth(0, text, logprobs)

    def _grow_call(self, piece: CallPiece) -> _Growth:
        if piece.name is not None:
            if self._items:
                self._items[-1].is_complete = True
            id = f"fc_{self._request_id}_{piece.number}"
            self._items.append(CallItem(id, call_id(self._request_id, 0, piece.number), piece.name))
        call = self._items[-1]
        assert isinstance(call, CallItem), "the first piece of a call has its name"
        call.arguments += piece.arguments
        call.is_complete = piece.is_last
        return _Growth(len(self._items) - 1, piece.arguments, [])

    def _grown(self, growth: _Growth) -> bytes:
        """The events of new text or arguments."""
        place, item, frames = growth.place, self._items[growth.place], b""
        if place == self._num_added:
            frames = b"".join(map(self._closed, range(self._num_closed, place))) + self._added(place)
        if isinstance(item, MessageItem):
            of_text = {**self._place_of_text(item), "delta": growth.text, "logprobs": growth.logprobs}
            return frames + self._frame("output_text.delta", **of_text)
        frames += self._frame("function_call_arguments.delta", item_id=item.id, output_index=place, delta=growth.text)
        return frames + (self._closed(place) if item.is_complete else b"")

    def _added(self, place: int) -> bytes:
        """The events that begin an item."""
        item = self._items[place]
        self._num_added += 1
        frames = self._frame("output_item.added", output_index=place, item=item.beginning())
        if isinstance(item, MessageItem):
            frames += self._frame("content_part.added", **self._place_of_text(item), part=text_part())
        return frames

    def _closed(self, place: int) -> bytes:
        """The events that end an item."""
        item = self._items[place]
        self._num_closed += 1
        if isinstance(item, MessageItem):
            of_text = self._place_of_text(item)
            frames = self._frame("output_text.done", **of_text, text=item.text, logprobs=item.logprobs)
            frames += self._frame("content_part.done", **of_text, part=text_part(item.text, item.logprobs))
        else:
            of_call = {"item_id": item.id, "output_index": place, "arguments": item.arguments}
            frames = self._frame("function_call_arguments.done", **of_call)
        return frames + self._frame("output_item.done", output_index=place, item=item.body())

    def _place_of_text(self, message: MessageItem) -> JsonObject:
        return {"item_id": message.id, "output_index": 0, "content_index": 0}

    def _opening(self) -> bytes:
        response = self._response("in_progress")
        return self._frame("created", response=response) + self._frame("in_progress", response=response)

    def _frame(self, kind: str, **fields: object) -> bytes:
        name = f"response.{kind}"
        payload = {"type": name, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return sse_event(name, payload)

    def _finished(self, counts: TokenCounts) -> JsonObject:
        reason = None if self._finish_reason is None else INCOMPLETE.get(self._finish_reason)
        if not self._items:
            self._grow_message("", [])
        if isinstance(last := self._items[-1], MessageItem):
            last.is_complete = reason is None
        return self._response("completed" if reason is None else "incomplete") | {
            "output": [item.body() for item in self._items],
            "incomplete_details": None if reason is None else {"reason": reason},
            "usage": {
                "input_tokens": self._num_prompt_tokens,
                "input_tokens_details": {"cached_tokens": counts.cached, "cache_write_tokens": 0},
                "output_tokens": counts.output,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": self._num_prompt_tokens + counts.output,
            },
        }

    def _response(self, status: str) -> JsonObject:
        """All fields of a response that has no output yet."""
        request = self._request
        form, choice = request.text_format, request.tool_choice
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
            "parallel_tool_calls": request.parallel_tool_calls,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() | {"strict": True} for tool in request.tools],
            "top_logprobs": request.top_logprobs,
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": request.user,
        }
