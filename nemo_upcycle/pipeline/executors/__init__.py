"""The executors that run stages, one file per executor, and the settings of each stage there."""
