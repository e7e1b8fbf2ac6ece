"""Values that every floor speaks of. Standard library only."""

__version__ = "0.1.0"
