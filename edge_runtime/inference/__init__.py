"""What is made of a model's outputs: labels with probabilities, and texts token by token."""
