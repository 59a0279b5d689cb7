"""Steps of a training: the loop, its checks, meters, validation, and how it stops."""
