"""Commands beside the server. Each runs in a process of its own."""
