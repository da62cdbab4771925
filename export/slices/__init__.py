"""What each kind of slices computes, a module each, and what becomes of its values."""
