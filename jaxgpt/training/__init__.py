"""How parameters change: optimiser, step, devices, metrics, loop. It receives a task and imports none."""
