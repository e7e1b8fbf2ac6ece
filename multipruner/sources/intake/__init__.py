"""What a model's files are, and whether all of them are accounted for, before any weight is loaded."""
