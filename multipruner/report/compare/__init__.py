"""Several runs against each other: which of them no other beats."""
