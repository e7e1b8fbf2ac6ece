"""Search over structures: needs an objective and costs, never torch."""

if __name__ != "multipruner.search":
    raise ImportError("import multipruner.search: a bare `search` would load every class twice")
