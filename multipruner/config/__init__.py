"""What is asked: the recipe, what overrides what, amounts and ranges of it."""
