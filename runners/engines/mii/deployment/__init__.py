"""A persistent deployment of DeepSpeed-MII: its plan, its processes, and how it is asked.

Nothing in this package imports MII (which takes seconds and half a gigabyte) but the one process
that holds a model.
"""
