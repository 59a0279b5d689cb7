"""What train.py is told with: options, data loaders, checkpoints, the teacher's identity, the end of a run.

The only room that knows Accelerate."""
