"""Recording the model and cutting it into segments."""
