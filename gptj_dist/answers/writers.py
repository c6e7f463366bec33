"""One choice as OpenAI's completions and chat write it, whole or piece by piece: text, tokens, log probabilities."""

from __future__ import annotations

from collections.abc import Sequence

from gptj_dist.answers.completion import TextDelta
from gptj_dist.answers.schema.chat import ChatRequest
from gptj_dist.answers.schema.completions import CompletionRequest
from gptj_dist.engine.request import FinishReason
from gptj_dist.json_types import JsonObject
from gptj_dist.params import TokenLogprobs
from gptj_dist.text.detokenizer import Detokenizer
from gptj_dist.text.tokenizer import Tokenizer
from gptj_dist.text.tool_calls import CallReader, call_id


class TokenNames:
    """The names of tokens in log probabilities.

    A token is called by its text; one that is not whole characters by its bytes, such as `bytes:\\xf0\\x9f`.

    Args:
        by_id: every token is called by its id, such as `token_id:198`.
    """

    def __init__(self, tokenizer: Tokenizer, by_id: bool) -> None:
        self._tokenizer = tokenizer
        self._by_id = by_id

    def of(self, token_id: int) -> str:
        """A token's name. Tokens of the same text have the same, unless names are ids."""
        if self._by_id:
            return _id_name(token_id)
        raw = self._tokenizer.token_or_special_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def top(self, token: TokenLogprobs, number: int) -> dict[str, float]:
        """The likeliest tokens and the token itself, by name. A name that is taken gives way to an id."""
        own = self.of(token.token_id)
        named: dict[str, float] = {}
        for token_id, logprob in token.top[:number]:
            name = self.of(token_id)
            is_taken = name in named or (name == own and token_id != token.token_id)
            named[_id_name(token_id) if is_taken else name] = logprob
        return named | {own: token.logprob}


def _id_name(token_id: int) -> str:
    return f"token_id:{token_id}"


class Offsets:
    """Where each token's text begins in the text that is returned, in characters.

    A token that is part of a character begins where that character does; a token without text adds nothing.

    Args:
        start: characters before the first token.

    Attributes:
        end: characters of the text up to the last token; those of an unfinished character are missing.
    """

    def __init__(self, tokenizer: Tokenizer, skips_special: bool, start: int = 0) -> None:
        self._detokenizer = Detokenizer(tokenizer, skips_special)
        self.end = start

    def next(self, token_id: int) -> int:
        """The offset of the next token."""
        offset = self.end
        self.end += len(self._detokenizer.push([token_id]))
        return offset


class CompletionWriter:
    """A `Writer` of completions; the first piece begins with the prompt where `echo` asks for it.

    Args:
        index: the k-th of the n completions of prompt i has i * n + k.
        prompt: its text.
    """

    def __init__(
        self, index: int, request: CompletionRequest, prompt: str, prompt_ids: Sequence[int], tokenizer: Tokenizer
    ) -> None:
        self._index = index
        self._request = request
        self._prompt = prompt
        self._prompt_ids = prompt_ids
        self._tokenizer = tokenizer
        self._names = TokenNames(tokenizer, request.return_tokens_as_token_ids)
        self._num_chars = len(prompt) if request.echo else 0
        self._offsets = Offsets(tokenizer, request.skip_special_tokens, self._num_chars)
        self._is_begun = False

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._prompt_ids)

    def piece(self, delta: TextDelta) -> JsonObject | None:
        request = self._request
        has_tokens = request.logprobs is not None or request.return_token_ids
        is_due = not self._is_begun and (request.echo or request.prompt_logprobs is not None)
        has_news = delta.text or delta.finish_reason or is_due or (has_tokens and delta.token_ids)
        return self.whole(delta) if has_news else None

    def whole(self, delta: TextDelta) -> JsonObject:
        request, is_first = self._request, not self._is_begun
        has_prompt = request.echo and is_first
        self._is_begun = True
        self._num_chars += len(delta.text)
        choice: JsonObject = {
            "index": self._index,
            "text": (self._prompt if has_prompt else "") + delta.text,
            "logprobs": None if request.logprobs is None else self._logprobs(delta, has_prompt, request.logprobs),
            "finish_reason": delta.finish_reason,
        }
        if request.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
            choice["prompt_token_ids"] = list(self._prompt_ids) if is_first else None
        if request.prompt_logprobs is not None and is_first:
            choice["prompt_logprobs"] = self._prompt_logprobs(delta.prompt_logprobs, request.prompt_logprobs)
        return choice

    def _logprobs(self, delta: TextDelta, has_prompt: bool, num_top: int) -> JsonObject:
        """In the legacy shape: four lists, an element a token. The prompt's first token has no log probability."""
        ids = [token.token_id for token in delta.logprobs]
        offsets = [self._offsets.next(token_id) for token_id in ids]
        if delta.finish_reason is not None:  # a stop string may have cut the text of these tokens
            offsets = [min(offset, self._num_chars) for offset in offsets]
        known: list[TokenLogprobs | None] = list(delta.logprobs)
        if has_prompt:
            ids = [*self._prompt_ids, *ids]
            offsets = self._prompt_offsets() + offsets
            known = [None, *delta.prompt_logprobs, *known]
        return {
            "tokens": list(map(self._names.of, ids)),
            "token_logprobs": [None if token is None else token.logprob for token in known],
            "top_logprobs": [None if token is None else self._names.top(token, num_top) for token in known],
            "text_offset": offsets,
        }

    def _prompt_offsets(self) -> list[int]:
        """Of the prompt's tokens. What the tokenizer put before the text, such as a space, counts nothing."""
        offsets = Offsets(self._tokenizer, skips_special=False)
        begins = [offsets.next(token_id) for token_id in self._prompt_ids]
        num_added = max(0, offsets.end - len(self._prompt))
        return [max(0, begin - num_added) for begin in begins]

    def _prompt_logprobs(self, tokens: Sequence[TokenLogprobs], num_top: int) -> list[JsonObject | None]:
        """In vLLM's shape: for each token of the prompt but the first, the likeliest and itself, by token id."""
        return [None, *({str(id_): entry for id_, entry in self._ranked(token, num_top)} for token in tokens)]

    def _ranked(self, token: TokenLogprobs, num_top: int) -> list[tuple[int, JsonObject]]:
        ranked = [(id_, logprob, rank) for rank, (id_, logprob) in enumerate(token.top[:num_top], start=1)]
        if token.token_id not in [id_ for id_, _, _ in ranked]:
            ranked.append((token.token_id, token.logprob, token.rank))
        return [
            (id_, {"logprob": logprob, "rank": rank, "decoded_token": self._tokenizer.token_text(id_)})
            for id_, logprob, rank in ranked
        ]


class ChatWriter:
    """A `Writer` of chat; the first piece names the role.

    Args:
        prompt_ids: the conversation, as the chat template renders it.
        calls: reads the calls of tools in the text; None if there are none.
        request_id: ids of calls are made of it.
    """

    def __init__(
        self,
        index: int,
        request: ChatRequest,
        prompt_ids: Sequence[int],
        tokenizer: Tokenizer,
        calls: CallReader | None = None,
        request_id: str = "",
    ) -> None:
        self._index = index
        self._request = request
        self._prompt_ids = prompt_ids
        self._tokenizer = tokenizer
        self._names = TokenNames(tokenizer, request.return_tokens_as_token_ids)
        self._calls = calls
        self._request_id = request_id
        self._is_begun = False

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._prompt_ids)

    def whole(self, delta: TextDelta) -> JsonObject:
        text, calls = self._read(delta)
        message: JsonObject = {"role": "assistant", "content": text}
        if calls:
            message |= {"content": text or None, "tool_calls": list(calls.values())}
        return self._choice("message", message, delta)

    def piece(self, delta: TextDelta) -> JsonObject | None:
        text, calls = self._read(delta)
        has_tokens = self._request.logprobs or self._request.return_token_ids
        if not (text or calls or delta.finish_reason or not self._is_begun or (has_tokens and delta.token_ids)):
            return None
        content: JsonObject = {} if self._is_begun else {"role": "assistant"}
        if text or not calls:
            content["content"] = text
        if calls:
            content["tool_calls"] = [{"index": number, **call} for number, call in calls.items()]
        return self._choice("delta", content, delta)

    def _read(self, delta: TextDelta) -> tuple[str, dict[int, JsonObject]]:
        """The text outside of calls, and what is new of each call, by its number."""
        if self._calls is None:
            return delta.text, {}
        text, pieces = self._calls.push(delta.text, delta.finish_reason is not None)
        calls: dict[int, JsonObject] = {}
        for piece in pieces:
            id, named = {}, {}
            if piece.name is not None:
                id = {"id": call_id(self._request_id, self._index, piece.number), "type": "function"}
                named = {"name": piece.name}
            calls[piece.number] = {**id, "function": {**named, "arguments": piece.arguments}}
        return text, calls

    def _choice(self, name: str, content: JsonObject, delta: TextDelta) -> JsonObject:
        is_first, self._is_begun = not self._is_begun, True
        logprobs = [listed_logprobs(token, self._names, self._tokenizer) for token in delta.logprobs]
        is_called = self._calls is not None and self._calls.ends_with_call and delta.finish_reason == FinishReason.STOP
        choice: JsonObject = {
            "index": self._index,
            name: content,
            "logprobs": {"content": logprobs} if self._request.logprobs else None,
            "finish_reason": "tool_calls" if is_called else delta.finish_reason,
        }
        if self._request.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
            choice["prompt_token_ids"] = list(self._prompt_ids) if is_first else None
        return choice


def listed_logprobs(token: TokenLogprobs, names: TokenNames, tokenizer: Tokenizer) -> JsonObject:
    """A token's log probabilities in the shape of chat: a list, with the bytes of each token."""

    def entry(token_id: int, logprob: float) -> JsonObject:
        raw = tokenizer.token_or_special_bytes(token_id)
        return {"token": names.of(token_id), "logprob": logprob, "bytes": list(raw)}

    return {**entry(token.token_id, token.logprob), "top_logprobs": [entry(*pair) for pair in token.top]}
