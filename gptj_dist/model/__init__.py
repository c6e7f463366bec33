"""GPT-J on one device: the layers of a stage, their KV cache, and sampling. Knows no requests, files or Ray."""
