"""A tiny Llama chat model about the harbour town of Porto Lume, trained on generated text.

`corpus` generates the text, `train` trains the weights, and `build` writes the finished model
folder from the committed weights. The model knows only its small world: it is for demonstrations
and tests.
"""
