"""VDIs and the store that holds them: catalog, volumes, what the network side may call."""
