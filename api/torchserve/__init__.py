"""TorchServe's inference and management routes, for clients that were written for it.

Paths, bodies and fields are those of its documentation (`inference_api.md`, `management_api.md`)
and of its large-model examples' handlers.
"""
