"""Read and write CT volumes and the training store; imports no torch."""

try:
    from tapct_fast import _native as _native
except ImportError as error:
    raise ImportError(
        "tapct_fast._native is not built: run 'pip install -e .' in the repository (after a plain "
        "install, python started in the repository finds the source folder, which has no _native)"
    ) from error
