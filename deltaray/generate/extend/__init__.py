"""Prompts of one turn extended to conversations, whose last answer the teachers then give."""
