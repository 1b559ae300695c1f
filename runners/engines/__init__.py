"""How weights get into the ranks, one module or package for each engine."""
