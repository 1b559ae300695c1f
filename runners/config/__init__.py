"""RunnerConfig, how a model is run, and every file format that becomes one."""
