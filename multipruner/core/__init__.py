"""Values that every floor speaks of. Standard library only."""
