"""From traced graphs to the engines' program files, their order and their live sets."""
