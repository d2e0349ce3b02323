"""Training students on pairs: losses, log-probabilities, batches, and the loop in Ray Train with DeepSpeed."""
