"""Families of models, tried: which layers LoQT takes by default, and whether each trains, reloads, merges and exports."""
