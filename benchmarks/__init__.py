"""Triptych measured against its peers, its engine and its machine; see README.md."""
