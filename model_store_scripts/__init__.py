"""Commands that fill the BentoML model store: from a folder, the hub, a TorchServe archive."""
