"""CPU kernels, compiled when a rank starts: linear layers with few rows, and paged attention.

A decoding step multiplies a few rows with every weight of the model. Memory bandwidth bounds it,
and general libraries reach half to three quarters of that bound (`benchmarks/` has the figures).
`parity` installs the kernels in a model: `linear`, then `fusing`, then `decoder`. Without a C++
compiler, and on other devices, torch's operators run instead.
"""

from runners.text.cpu.library import Kernels, load_kernels, switch_off_kernels

__all__ = ["Kernels", "load_kernels", "switch_off_kernels"]
