"""What a pruned model is written as."""
