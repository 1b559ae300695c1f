"""The two demo models: their corpora, training and weights."""
