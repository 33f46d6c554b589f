"""Time samplers and weights of FastGen."""

NOT_COVERED = {r"fg_parts": "some of these parts are not in this version"}
