"""Consistency trajectory models."""

NOT_COVERED = {r"ctm_.*": "consistency trajectory models are not an objective of this version"}
