"""Many budgets from one search."""
