"""What runs in a rank process whatever the model: the loop, the launcher, the process group."""
