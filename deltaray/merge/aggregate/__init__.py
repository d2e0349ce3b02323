"""Preference Delta Aggregation (arXiv 2606.00357): the adapters of several deltas, ranked, merged and compared."""
