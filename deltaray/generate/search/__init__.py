"""Answers in several turns with searches between them."""
