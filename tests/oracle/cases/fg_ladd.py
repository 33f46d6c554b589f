"""LADD of FastGen."""

NOT_COVERED = {r"fg_ladd_.*": "LADD is not an objective of this version"}
