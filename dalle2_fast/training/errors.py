"""The error of training that the user can put right."""


class TrainingError(RuntimeError):
    """Something the user can put right; its text is the one line shown on the command line (exit code 2)."""
