"""Generation: prompts stream through vLLM pools into Parquet, one unit of work at a time, each exactly once."""
