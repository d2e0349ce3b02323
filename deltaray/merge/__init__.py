"""Merging LoRA adapters of one base: linear algebra on their factors, PEFT folders in and out, diagnostics."""
