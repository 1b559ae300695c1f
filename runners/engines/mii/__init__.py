"""The MII engine: DeepSpeed-MII in our ranks, or as a persistent deployment."""
