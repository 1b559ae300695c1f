"""The paged KV cache: allocation of its blocks, their memory, and the batches that use it."""
