"""What turns census files into decisions: judging, and grouping of what was flagged."""
