"""The HTTP worker's side of a model: a client, and the supervision of its rank processes.

`client` is the async facade that the API calls. `group` keeps the ranks alive; a `session` is one
start-to-end of their processes: a `rank.launcher`, which starts one `rank.worker` per rank. Every
rank connects back to the session's socket. Nothing here imports torch.
"""
