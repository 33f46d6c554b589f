"""DMD2 and f-distill of FastGen."""

NOT_COVERED = {r"fg_(dmd2|fdistill)_.*": "f-distill is not an objective of this version"}
