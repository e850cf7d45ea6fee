"""The log of one VDI: records, segments, commit, block map, checkpoints, replay, collection."""
