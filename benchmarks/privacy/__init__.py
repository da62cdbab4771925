"""What privacy costs: masked rounds beside plain ones, and learning under noise."""
