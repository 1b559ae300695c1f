"""Filling the BentoML model store: from a folder, from the hub, with the demo models."""
