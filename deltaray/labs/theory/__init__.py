"""Delta learning where it can be computed: logistic regression on Gaussian inputs (arXiv 2507.06187, section 6)."""
