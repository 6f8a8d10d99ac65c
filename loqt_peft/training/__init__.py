"""From an optimizer step to an update of the whole model, over all processes."""
