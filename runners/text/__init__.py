"""Continuous batching for any Hugging Face causal LM.

`engine` is the seam: `put(uids, tokens) -> last-token logits` over sequences of any length, with
`kv` holding each sequence's keys and values and `attention` (packed) or `padded` doing the forward.
`scheduler` decides what each step runs; `sampling` picks tokens; `detokenizer` turns them to text;
`tokenization` turns prompts to tokens; `program` ties them to the rank's channel; `loading` builds
all of it around a loaded model.
"""
