"""What pydicom and its decoders raise on damaged bytes, and how to keep them quiet.

pydicom warns and logs with values from the file, which may hold a name anywhere.
"""

import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from tapct_fast.errors import InputError


def damage() -> tuple[type[Exception], ...]:
    """Return what pydicom, its decoders and number conversion raise on damaged bytes."""
    from pydicom.errors import BytesLengthException, InvalidDicomError

    return (
        *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError),
        *(NameError, OSError, RuntimeError, SystemError, TypeError, ValueError, UserWarning),
        *(struct.error, zlib.error, BytesLengthException, InvalidDicomError),
    )


@contextmanager
def silence_pydicom() -> Iterator[None]:
    """Keep pydicom's warnings and log records, which quote values, from reaching anybody."""

    def drop(_: logging.LogRecord) -> bool:
        return False

    if find_spec("pydicom") is None:
        raise InputError("reading DICOM needs pydicom: pip install 'tapct-fast[dicom]'")
    logger = logging.getLogger("pydicom")
    logger.addFilter(drop)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeFilter(drop)
