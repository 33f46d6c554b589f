"""TwinFlow."""

NOT_COVERED = {r"twinflow_.*": "TwinFlow is not an objective of this version"}
