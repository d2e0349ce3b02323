"""Calibration: a sample of the prompts through the real pools, and what it says about the whole generation."""
