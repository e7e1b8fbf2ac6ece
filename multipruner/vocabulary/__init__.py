"""A smaller vocabulary for a model: which tokens stay, the tokenizer without the others, the rows of the embeddings."""
