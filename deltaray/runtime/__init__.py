"""Where a study runs and how it speaks: the Ray session, the terminal, progress, logs, metrics, watchdogs."""
