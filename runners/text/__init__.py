"""Continuous batching for any Hugging Face causal LM. Imported in rank processes only.

`program` receives the host's messages in rank 0 and drives `scheduler`, which decides what each
step computes. `engine` keeps the block tables and has a `ModelRunner` compute the step: that of
`model_runner` in one process, that of `lockstep` in several. `paging` has the KV cache, `attention`
and `padded` are the two layouts of a batch, `cpu` has kernels. `loading` builds all of it around a
loaded model, whose layout and kernels `parity` checks.
"""
