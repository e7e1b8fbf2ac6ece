"""Judge a model: perplexity and lm-eval tasks, dense against pruned."""

if __name__ != "multipruner.eval":
    raise ImportError("import multipruner.eval: a bare `eval` would load every class twice")
