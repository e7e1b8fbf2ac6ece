"""Programs that serve what was exported, and how long they take."""
