"""A recipe made real: from a TOML file to the files in the folder of a run."""
