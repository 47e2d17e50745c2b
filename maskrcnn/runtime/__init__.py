"""What the process runs on: files, memory, and the process group of distributed training."""
