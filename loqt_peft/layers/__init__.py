"""The layers that an adapter is made of: what they hold, compute, record, and which modules become one."""
