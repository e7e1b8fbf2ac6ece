"""The catalogue of recipes (YAML files in this folder)."""
