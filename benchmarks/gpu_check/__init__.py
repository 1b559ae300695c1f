"""`make gpu-check`: Triptych's kernels, tokens, images and speed on one GPU, in parts.

Each part runs in its own process and leaves its result in `benchmarks/gpu-<card>.json`. The parts
import `runners` only, never the HTTP server, so they run where BentoML is not installed.
"""
