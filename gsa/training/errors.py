"""The error of a run that cannot start or go on, for reasons its user can act upon."""


class RunError(RuntimeError):
    """A run folder in use, a damaged checkpoint, a loss that stays NaN: says what to do."""
