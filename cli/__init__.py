"""Commands besides the server."""
