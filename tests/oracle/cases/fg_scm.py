"""sCM of FastGen."""

NOT_COVERED = {r"fg_scm_.*": "sCM is not an objective of this version"}
