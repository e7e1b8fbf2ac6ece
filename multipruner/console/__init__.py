"""The screen and what is said on it."""
