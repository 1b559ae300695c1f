"""The GPU path of text models: attention over paged KV, linear layers, sampling on the device."""
