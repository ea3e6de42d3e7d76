"""What is learned: each task supplies batches, a loss and an evaluation; the loop does the rest."""
