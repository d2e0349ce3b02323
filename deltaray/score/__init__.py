"""Scores of responses, each made once per response and stored beside it."""
