"""What every long run needs, a search as well as a training: options, checkpoints, a folder, seeds and the machine."""
