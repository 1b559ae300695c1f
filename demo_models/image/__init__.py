"""A tiny Stable Diffusion that paints flat shapes, trained from pictures drawn here.

`build` writes the finished pipeline folder from the committed weights; `train` makes those weights
anew. The model knows its small world only (`world`): it is a demonstration and a test model.
"""
