"""The bodies of requests, OpenAI's and vLLM's: what a field may be, and what is refused by which name."""
