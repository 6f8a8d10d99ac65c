"""The claims about GPUs, measured in one command: `make gpu`; see docs/gpu.md."""
