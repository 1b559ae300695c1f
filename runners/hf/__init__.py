"""Facts about a Hugging Face model folder.

`weights` and `safety` import no torch and are used by the import and deployment commands too; the
other modules are imported in rank processes only.
"""
