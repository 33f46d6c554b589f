"""DMD."""

NOT_COVERED = {r"dmd3p_.*": "DMD with regression is not an objective of this version"}
