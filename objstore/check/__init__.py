"""The offline check: a second reader of FORMAT.md, which shares no decoder with the store."""
