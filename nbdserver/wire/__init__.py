"""NBD on the wire: bytes to values and back, nothing else (no I/O, no clock)."""
