"""Base models whose weights are in 4 bits from the start: packed as a checkpoint is read, or out of a model's memory."""
