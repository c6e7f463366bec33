"""The bodies of requests, OpenAI's and vLLM's: their fields, the types of these, and the errors that name them."""
