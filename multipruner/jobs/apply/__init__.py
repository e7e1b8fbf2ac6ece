"""A plan made into a model from files to files."""
