"""Schedules that lost data, hung or leaked once."""
