"""Zones of a store: membership, placement, the threads that do their I/O."""
