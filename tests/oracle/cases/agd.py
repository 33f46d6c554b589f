"""Adapter guidance distillation."""

NOT_COVERED = {r"agd_.*": "adapter guidance distillation is not an objective of this version"}
