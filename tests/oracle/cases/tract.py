"""TRACT."""

NOT_COVERED = {r"tract_.*": "TRACT is not an objective of this version"}
