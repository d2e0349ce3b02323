"""Runs and tests programs that models wrote, confined."""
