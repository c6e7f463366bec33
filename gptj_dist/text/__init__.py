"""From text to token ids and back.

Knows tokenizers, detokenizing, stop strings, grammars, chat templates and calls of tools. Knows no models and no
requests.
"""

__all__ = [
    "chat",
    "detokenizer",
    "grammar",
    "output",
    "stop_strings",
    "tokenizer",
    "tokenizer_info",
    "tool_calls",
    "vocabulary",
]
