"""Moment matching."""

NOT_COVERED = {r"moment_matching_.*": "moment matching is not an objective of this version"}
