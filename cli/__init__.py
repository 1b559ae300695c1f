"""Commands besides the server, each a separate process."""
