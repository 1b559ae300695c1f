"""A persistent deployment of DeepSpeed-MII: its plan, its processes and its client.

Nothing in this package imports MII, which takes seconds and half a gigabyte: only the processes
that hold a model do, through `runners.engines.mii.launch`.
"""
