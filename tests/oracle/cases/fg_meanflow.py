"""MeanFlow of FastGen."""

NOT_COVERED = {r"fg_meanflow_.*": "MeanFlow is not an objective of this version"}
