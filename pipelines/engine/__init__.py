"""Ray itself: its life, voice and metrics, what each stage gets, teams of workers spread over a cluster."""
