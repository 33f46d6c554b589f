"""TCM of FastGen."""

NOT_COVERED = {r"fg_tcm_.*": "TCM is not an objective of this version"}
