"""Commands that run outside the server, each in a separate process."""
