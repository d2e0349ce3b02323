"""Evaluation: students and teachers answer held-out prompts through vLLM; results carry their standard errors."""
