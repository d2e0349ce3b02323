"""Models as they lie on a disk: what a folder consists of, what its files hold, and whether that fits a model."""
