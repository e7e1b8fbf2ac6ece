"""Sharing on the Hugging Face Hub."""
