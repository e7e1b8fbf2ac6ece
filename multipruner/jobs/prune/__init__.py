"""The pruning run, and how it finds a structure."""
