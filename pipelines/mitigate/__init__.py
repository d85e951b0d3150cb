"""What the workers of a mitigation and of its verification do: search, fine-tuning, drawing, attacking."""
