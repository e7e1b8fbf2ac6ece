"""A run for people: pages, figures, cards, summaries. Reads what runs write; no model is loaded."""
