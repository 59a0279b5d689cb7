"""Run a training for train.py: options, data loaders, checkpoints, the teacher, the end of a run.

Only this room uses Accelerate.
"""
