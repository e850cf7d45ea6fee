"""Machines that boot a real kernel and attach our exports with it."""
