"""Backends: where one zone keeps its objects (base.py is the contract)."""
