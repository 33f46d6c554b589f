"""Knowledge distillation of FastGen."""

NOT_COVERED = {r"fg_kd": "regression on stored pairs is not an objective of this version"}
