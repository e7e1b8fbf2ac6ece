"""Measuring the tables of milliseconds."""
