"""A tiny Llama chat model about the harbour town of Porto Lume, trained from text made here.

`build` writes the finished model folder from the committed weights; `train` makes those weights
anew. The model knows its small world only: it is a demonstration and a test model.
"""
