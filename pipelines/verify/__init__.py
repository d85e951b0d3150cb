"""This package verifies a repair: the rescan, the attack, the cost of the repair, and the page over all repairs."""
