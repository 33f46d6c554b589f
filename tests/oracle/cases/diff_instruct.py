"""Diff-Instruct."""

NOT_COVERED = {r"diff_instruct_.*": "Diff-Instruct is not an objective of this version"}
