"""CPU kernels of our own, compiled when a rank starts: skinny linear layers, paged attention.

A decode step multiplies a few rows with every weight of the model, from memory: there the general
libraries reach half to three quarters of what the machine can do (`benchmarks/` has the figures).
A model is fitted with them module by module: `linear`, then `fusing`, then `decoder`.
Nothing depends on them: without a C++ compiler, and on other devices, torch's own operators run.
"""

from runners.text.cpu.library import Kernels, load_kernels, switch_off_kernels

__all__ = ["Kernels", "load_kernels", "switch_off_kernels"]
