"""SLAM."""

NOT_COVERED = {r"splam_.*": "SLAM is not an objective of this version"}
