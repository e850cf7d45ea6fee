"""Numbers of bytes on the command line of the benchmarks."""


def size(text: str) -> int:
    """A number of bytes, with K, M, G or T."""
    shift = {"K": 10, "M": 20, "G": 30, "T": 40}.get(text[-1:].upper())
    return int(text) if shift is None else int(text[:-1]) << shift
