class CompareError(Exception):
    """Something that the user has to see to; its message says what."""
