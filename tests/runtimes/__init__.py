"""Finished models in the programs that serve them."""
