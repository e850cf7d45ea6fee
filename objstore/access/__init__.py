"""The library: connections to a store in this process or behind a server's control socket, and what they share."""
