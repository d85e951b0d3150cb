"""What the actors of a census do: stages, the work of one worker, waves of parts, the ways to an index."""
