"""Choices as OpenAI's completions and chat have them, whole or piece by piece: text, tokens, log probabilities."""

from __future__ import annotations

from collections.abc import Sequence

from gptj_dist.answers.completion import TextDelta
from gptj_dist.answers.schema.chat import ChatRequest
from gptj_dist.answers.schema.completions import CompletionRequest
from gptj_dist.json_types import JsonObject
from gptj_dist.params import TokenLogprobs
from gptj_dist.text.tokenizer import Tokenizer


class CompletionWriter:
    """Writes one choice; the first piece begins with the prompt where that is asked for.

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
        self._offset = 0
        self._is_begun = False

    def has_news(self, delta: TextDelta) -> bool:
        """Whether a piece would say anything."""
        request = self._request
        tells = request.logprobs is not None or request.return_token_ids
        is_due = not self._is_begun and (request.echo or request.prompt_logprobs is not None)
        return bool(delta.text or delta.finish_reason or is_due or (tells and delta.token_ids))

    def whole(self, delta: TextDelta) -> JsonObject:
        """The choice, all at once."""
        return self.piece(delta)

    def piece(self, delta: TextDelta) -> JsonObject:
        """The choice's next piece."""
        request, is_first = self._request, not self._is_begun
        echoes = request.echo and is_first
        self._is_begun = True
        choice: JsonObject = {
            "index": self._index,
            "text": (self._prompt if echoes else "") + delta.text,
            "logprobs": None if request.logprobs is None else self._logprobs(delta, echoes),
            "finish_reason": delta.finish_reason,
        }
        if request.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
            choice["prompt_token_ids"] = list(self._prompt_ids) if is_first else None
        if request.prompt_logprobs is not None and is_first:
            choice["prompt_logprobs"] = self._prompt_logprobs(delta.prompt_logprobs, request.prompt_logprobs)
        return choice

    def _logprobs(self, delta: TextDelta, echoes: bool) -> JsonObject:
        """In the legacy shape: four lists, an element a token. Nothing comes before the prompt's first token."""
        told: list[tuple[int, TokenLogprobs | None]] = [(token.token_id, token) for token in delta.logprobs]
        if echoes:
            first: list[tuple[int, TokenLogprobs | None]] = [(self._prompt_ids[0], None)]
            told = first + [(token.token_id, token) for token in delta.prompt_logprobs] + told
        texts = [self._tokenizer.token_text(token_id) for token_id, _ in told]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [None if token is None else token.logprob for _, token in told],
            "top_logprobs": [None if token is None else self._top(token) for _, token in told],
            "text_offset": offsets,
        }

    def _top(self, token: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens by their texts, and the token itself; of tokens with the same text the likeliest."""
        top: dict[str, float] = {}
        for token_id, logprob in (*token.top[: self._request.logprobs], (token.token_id, token.logprob)):
            top.setdefault(self._tokenizer.token_text(token_id), logprob)
        return top

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
    """Writes one choice of a chat; the first piece says who speaks.

    Args:
        prompt_ids: what the chat template made of the conversation.
    """

    def __init__(self, index: int, request: ChatRequest, prompt_ids: Sequence[int], tokenizer: Tokenizer) -> None:
        self._index = index
        self._request = request
        self._prompt_ids = prompt_ids
        self._tokenizer = tokenizer
        self._is_begun = False

    def has_news(self, delta: TextDelta) -> bool:
        """Whether a piece would say anything."""
        tells = self._request.logprobs or self._request.return_token_ids
        return bool(delta.text or delta.finish_reason or not self._is_begun or (tells and delta.token_ids))

    def whole(self, delta: TextDelta) -> JsonObject:
        """The choice, all at once."""
        return self._choice("message", {"role": "assistant", "content": delta.text}, delta)

    def piece(self, delta: TextDelta) -> JsonObject:
        """The choice's next piece."""
        role = {} if self._is_begun else {"role": "assistant"}
        return self._choice("delta", {**role, "content": delta.text}, delta)

    def _choice(self, name: str, content: JsonObject, delta: TextDelta) -> JsonObject:
        is_first, self._is_begun = not self._is_begun, True
        choice: JsonObject = {
            "index": self._index,
            name: content,
            "logprobs": {"content": list(map(self._told, delta.logprobs))} if self._request.logprobs else None,
            "finish_reason": delta.finish_reason,
        }
        if self._request.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
            choice["prompt_token_ids"] = list(self._prompt_ids) if is_first else None
        return choice

    def _told(self, token: TokenLogprobs) -> JsonObject:
        top = [self._entry(*pair) for pair in token.top]
        return {**self._entry(token.token_id, token.logprob), "top_logprobs": top}

    def _entry(self, token_id: int, logprob: float) -> JsonObject:
        raw = self._tokenizer.token_or_special_bytes(token_id)
        return {"token": self._tokenizer.token_text(token_id), "logprob": logprob, "bytes": list(raw)}
