"""What a pruned model is judged on beside one perplexity: a table of suites, and a module for each measure."""
