"""What a saved adapter holds, how it is proved unchanged, and what is written beside it."""
