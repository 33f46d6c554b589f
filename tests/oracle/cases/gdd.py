"""GDD."""

NOT_COVERED = {r"gdd_.*": "GDD is not an objective of this version"}
