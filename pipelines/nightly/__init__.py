"""What a nightly stands on: the checkpoints it watches, and what it leaves for people and machines."""
