"""Ray itself: its life and voice, what each stage gets, functions and teams of workers spread over a cluster."""
