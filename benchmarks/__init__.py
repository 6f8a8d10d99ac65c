"""The measurements behind figures and defaults."""
