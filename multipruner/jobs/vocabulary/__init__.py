"""A dense model with fewer tokens, from a text that says which."""
