"""The algorithms of the paper on plain tensors: nothing here knows of PEFT, models or processes."""
