"""Text-to-image: the pipelines of diffusers, many pictures in one denoising loop.

Every picture is painted by the pipeline's own code, unchanged, as a coroutine (`easel`) that stops
wherever that code calls one of its models. The calls that wait there together and fit are run as
one (`calls`): so pictures of different prompts, seeds, guidance, schedulers and numbers of steps
share each forward, and join or leave at any step.
"""
