"""The sweep over checkpoints, the trajectory table and the figures."""
