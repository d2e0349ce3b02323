"""The files of a study and what is in them: tables and records, prompts, tokens of a chat."""
