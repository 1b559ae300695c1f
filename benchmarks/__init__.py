"""Benchmarks of Triptych against its peers, its engine and its machine; see README.md."""
