"""Consistency models of FastGen."""

NOT_COVERED = {r"fg_cm_.*": "ECT-style consistency is not an objective of this version"}
