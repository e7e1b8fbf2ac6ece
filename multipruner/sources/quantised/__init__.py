"""Quantised checkpoints, read as the numbers that they stand for: a row of a table for each way to pack."""
