"""Placeholder until the sampling branch is merged."""

from runners.text.samplers import HostSampler


class DeviceSampler(HostSampler):
    def __init__(self, device, vocab_size, max_rows) -> None: ...
