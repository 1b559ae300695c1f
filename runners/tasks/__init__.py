"""Models for tasks of one forward, such as fill-mask.

`pipelines` runs the pipelines of transformers; `question_answering` the task that transformers 5
has none for. `program` batches the waiting requests. Imported in rank processes only.
"""
