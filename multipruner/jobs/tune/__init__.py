"""A little training after pruning."""
