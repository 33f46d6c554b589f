"""Rectified flow."""

NOT_COVERED = {r"rf_.*": "rectified flow is not an objective of this version"}
