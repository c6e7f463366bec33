"""What one HTTP request may contain: all limits in one place, checked before any work that grows with the input.

`docs/security.md` lists them. Limits of sampling settings are in `params.py`, those of the model in `engine/limits.py`.
"""

from __future__ import annotations

MAX_HEAD_BYTES = 32_768
"""Request line and headers. nginx accepts the same."""

MAX_HEADERS = 128

HEAD_TIMEOUT_S = 10.0
"""From the first byte of a request, or from the connection, to the end of its headers."""

MODERATION_TIMEOUT_S = 10.0
"""For one call of a moderator, unless the server sets another."""

KEEP_ALIVE_S = 75
"""Time for which a connection without a request is kept."""

MAX_CONNECTIONS = 4096
"""Connections of one ingress; fewer if the process may open fewer files."""

MAX_PIPELINED_REQUESTS = 16
"""Requests of a connection that wait for the answer to an earlier one."""

UNREAD_TIMEOUT_S = 60.0
"""Time for which a client may read nothing of an answer that waits for it."""

LINGER_S = 2.0
"""Time in which a client may read why it was refused, before its connection is closed."""

BODY_TIMEOUT_S = 20.0
MIN_BODY_BYTES_PER_S = 10_000
"""A body may take `BODY_TIMEOUT_S`, and a second more for each `MIN_BODY_BYTES_PER_S`."""

MAX_BODY_BYTES = 4_000_000
"""A megabyte of token ids, three times over; prompts have limits of their own."""

MAX_BODIES_BYTES = 256_000_000
"""Bodies that an ingress reads at a time, all together."""

MAX_JSON_VALUES = 500_000
"""Elements of all lists and objects of a body: 240 prompts of 2,048 token ids."""

MAX_JSON_STRINGS = 20_000
"""Strings of a body, names of fields included."""

MAX_JSON_CONTAINERS = 10_000
"""Lists and objects of a body."""

MAX_CHOICES = 1024
"""Completions of one request: prompts times `n` or `best_of`. Also the inputs of a request for embeddings."""

MAX_COMPLETIONS = 8 * MAX_CHOICES
"""Completions that an ingress answers at a time; more if that many may run and wait in a pipeline."""

MAX_MESSAGES = 2048
"""Messages of a conversation: a message has a token or more."""

MAX_TOOLS = 128
"""Tools of a request, as at OpenAI."""

MAX_ARGUMENTS_CHARS = 131_072
"""Characters of the arguments of all calls in a conversation: they are JSON, which is parsed."""

MAX_TEXT_BYTES = 1_000_000
"""UTF-8 bytes of a text to be tokenised where the context window sets no lower limit."""

MAX_STOP_CHARS = 4096
"""Characters of a stop string."""

MAX_BAD_WORDS = 512
MAX_BAD_WORD_CHARS = 256

MAX_LOGPROBS_OF_REQUEST = 2_000_000
"""Log probabilities that one answer may hold."""
