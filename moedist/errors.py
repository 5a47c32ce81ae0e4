"""Errors that a user can act on.

Each message says, on one line, what is wrong, with the numbers, and what to do about it. The command line prints the
message alone and exits with 1; `--debug` adds the stack trace. Anything that is not a `MoedistError` is a bug here.
"""


class MoedistError(Exception):
    """Base of every error that is the user's to mend."""


class ConfigError(MoedistError):
    """A configuration that cannot run: unknown key, wrong type, impossible combination."""


class DataError(MoedistError):
    """Training text that is missing, empty or unreadable."""


class PlacementError(MoedistError):
    """An assignment of experts or batches to ranks that cannot be carried out."""


class CheckpointError(MoedistError):
    """A checkpoint that is missing, damaged or of another model."""


class CompressError(MoedistError):
    """Experts that cannot be compressed as asked: an impossible budget, a damaged calibration, an unknown method."""


class WorldError(MoedistError):
    """Ranks that cannot find each other, disagree, or died.

    Args:
        told_by: before ranks have met, who is to say it: "rank" (each that has it), "host" (one rank of a host: the others
            have it too) or "other" (a rank that has more to say).
    """

    def __init__(self, text: str, told_by: str = "rank"):
        super().__init__(text)
        self.told_by = told_by
