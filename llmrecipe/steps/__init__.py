"""Steps: what a pipeline does between trainings, one kind a file."""
