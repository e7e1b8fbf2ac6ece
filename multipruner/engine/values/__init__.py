"""Values of attention that are fewer than the dense model's, or in other bases."""
