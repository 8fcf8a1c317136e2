"""The backbone inside other libraries, one module per library, each of which imports it."""
