"""From text to token ids and back.

Knows tokenizers, detokenizing, stop strings and chat templates. Knows no models and no requests.
"""

__all__ = ["chat", "detokenizer", "output", "stop_strings", "tokenizer", "tokenizer_info", "vocabulary"]
