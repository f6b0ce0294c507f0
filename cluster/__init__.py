"""A run as processes: Ray actors, DeepSpeed ranks, releases on disk, the driver of the run's machine, the command
line.
"""
