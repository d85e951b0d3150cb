"""This package turns census files into verdicts, and groups the flagged prompts."""
