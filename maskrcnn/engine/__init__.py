"""The training engine: loop, step, optimizer, schedule, checkpoints, metrics and distributed training."""
