"""Files in the folder of a run that belong to all its stages: the lock, and what defines the run."""
