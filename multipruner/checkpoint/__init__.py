"""A pruned model, in memory and on disk."""
