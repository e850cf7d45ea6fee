"""The log of an HTTP server: what clients send is their affair, what goes wrong here is ours."""

import logging

from aiohttp.http_exceptions import HttpProcessingError


def http_log(name: str) -> logging.Logger:
    """A logger for an aiohttp server that leaves out tracebacks about bytes that are no request of HTTP: those are
    answered with 400."""
    log = logging.getLogger(name)
    log.addFilter(_is_our_fault)
    return log


def _is_our_fault(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError)
