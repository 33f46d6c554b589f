"""DDPO."""

NOT_COVERED = {r"ddpo_.*": "policy gradients on rewards are no distillation and not an objective of this version"}
