"""Patches of DeepSpeed-MII 0.3.3, applied by importing this package.

    import runners.engines.mii.patches
    import mii
    pipe = mii.pipeline("mistralai/Mistral-7B-v0.1")

They fix MII's bugs and run MII on a CPU. MII's scheduler, configuration, gRPC protocol and Python
API stay MII's own. Replaced, each by `apply` and only if its source is the one that the patch was
written for:

- the inference engine where there is no CUDA: `cpu_engine`, over Triptych's ragged engine;
- sampling, the end of requests, and what happens when a step fails: `batching`, `requests`;
- the sockets between ranks: `sockets`; the gRPC servicer of a replica: `servicer`;
- the processes of `mii.serve`: `server`, supervised by `runners.engines.mii.deployment`.
"""

from __future__ import annotations

from runners.engines.mii.patches.apply import apply

apply()
