"""Writers of checkpoints, after the published descriptions of their formats. They share nothing with the importers."""
