"""The real server under kill -9 and power cuts."""
