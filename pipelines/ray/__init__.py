"""Ray itself: its life, voice and metrics, what each stage gets, functions and teams spread over a cluster."""
