"""From text to token ids and back, token by token. Knows nothing of models or requests."""
