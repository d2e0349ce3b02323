"""A whole study: what its stages do in which order, what they need, how far they are."""
