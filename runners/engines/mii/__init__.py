"""The MII engine: DeepSpeed-MII in Triptych's ranks, or as a persistent deployment."""
