"""The paged KV cache: which blocks hold what, and their tensors."""
