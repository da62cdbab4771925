"""The learning bench: how much of backpropagation's gain forward mode keeps, on simulated fleets."""
