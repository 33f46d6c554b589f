"""The networks of EDM."""

NOT_COVERED = {r"edm_net_.*": "the EDM networks are not models of this version"}
