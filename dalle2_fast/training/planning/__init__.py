"""What is decided before a run starts: its configuration, what it needs, its learning rate."""
