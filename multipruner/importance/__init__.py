"""Orders of the parts of a block, most important first."""
