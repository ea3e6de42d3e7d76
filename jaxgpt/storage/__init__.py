"""What lies on disk: the run folder and its checkpoints."""
