"""The OpenAI-compatible routes, mounted under `/v1`."""
