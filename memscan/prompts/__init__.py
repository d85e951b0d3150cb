"""Prompts: `files` reads the rows of each file format, `table` normalises captions, folds duplicates and counts."""
