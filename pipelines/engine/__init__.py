"""Ray itself: its life, voice and metrics, what each stage gets, functions and teams of workers spread over a cluster."""
