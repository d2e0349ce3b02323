"""Reference log-probabilities: what the untouched student thinks of every response, computed once."""
