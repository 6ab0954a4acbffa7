"""What the commands run on, over mmengine's Runner: configuration, processes, checkpoints, checks of the data."""
