"""A tiny Stable Diffusion model that generates flat shapes, trained on images drawn by `drawing`.

`build` writes the finished pipeline folder from the committed weights; `train` trains those weights
again. The model knows only the small world of `world`: it is for demonstrations and tests.
"""
