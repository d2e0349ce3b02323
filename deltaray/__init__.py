"""deltaray: delta learning at cluster scale on Ray, vLLM and DeepSpeed."""
