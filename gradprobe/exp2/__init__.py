"""Whether correct and incorrect rollouts of a prompt push the same way."""
