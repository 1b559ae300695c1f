"""Tasks of one forward: `transformers` pipelines, and what it no longer has, question answering.

`program` gathers the inputs that wait and runs them together. Imported in rank processes only.
"""
