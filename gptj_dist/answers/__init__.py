"""From a request to its answer.

Knows the shapes of OpenAI's and vLLM's requests and responses, prompts, stop strings, moderation and log
probabilities. Takes tokens from a `TokenSource` and does not know where they are computed. Knows no Ray and no HTTP.
"""

__all__ = [
    "adapters",
    "answer",
    "beams",
    "chat_defaults",
    "completion",
    "embedding",
    "error_responses",
    "json_writing",
    "local",
    "moderation",
    "request_limits",
    "resumable",
    "schema",
    "served_model",
    "service",
    "work",
]
