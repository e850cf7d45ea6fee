"""The on-disk format (FORMAT.md) and its encoders: pure functions of bytes."""
