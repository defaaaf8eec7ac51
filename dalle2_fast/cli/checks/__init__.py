"""What a command finds out before or instead of its work: wrong requests, and why a machine is slow."""
