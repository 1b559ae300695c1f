"""The rank host: a model in its own supervised processes, driven over a private unix socket.

In the HTTP worker `group` keeps the ranks alive, `life` is one start-to-end of their processes: a
`launcher`, which starts one `worker` per rank through torch's elastic `start_processes`. Every rank
connects back to the group's socket; rank 0 takes the requests. `messages` is the schema, `channel`
the framing, `spec` what the processes are told. Only the launcher and the programs import torch.
"""
