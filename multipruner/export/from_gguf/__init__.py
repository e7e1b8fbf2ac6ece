"""A dense GGUF file cut into a smaller one."""
