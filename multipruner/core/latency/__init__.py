"""What a latency table is made of: measured times, and what lies between them."""
