"""The DeepSpeed engine: tensor parallelism over supervised ranks."""
