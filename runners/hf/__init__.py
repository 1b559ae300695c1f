"""Facts about a Hugging Face model folder. Imported in rank processes only."""
