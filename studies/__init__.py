"""What the project tries out with its own commands: the demos, the ablations, the paper's tables."""
