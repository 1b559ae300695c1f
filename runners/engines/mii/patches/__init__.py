"""DeepSpeed-MII 0.3.3, mended, and on a CPU too: importing this package is all it takes.

    import runners.engines.mii.patches
    import mii
    pipe = mii.pipeline("mistralai/Mistral-7B-v0.1")

MII's scheduler, its configuration, its wire and its API are MII's own. Replaced, each where `apply`
says so and only if it is what it was when the patch was written:

- the engine under it, where there is no CUDA: `stand_in`, over Triptych's ragged engine;
- what it chooses tokens by, ends requests by, and does when something fails: `batching`;
- the sockets between ranks: `sockets`; a replica's gRPC server: `wire`;
- the processes of `mii.serve`: `server`, kept by `runners.engines.mii.deployment`.
"""

from __future__ import annotations

from runners.engines.mii.patches.apply import apply

apply()
