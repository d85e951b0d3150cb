"""What becomes of a model after a repair: the rescan, the attack, what the repair cost, and the page over all."""
