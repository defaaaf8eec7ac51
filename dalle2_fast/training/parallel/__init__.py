"""Training on many processes: how they agree, share a step, and save one state."""
