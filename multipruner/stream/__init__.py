"""A pruned checkpoint written straight from the dense one's files, tensor by tensor."""
