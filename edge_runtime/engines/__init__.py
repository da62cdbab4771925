"""Inference engines behind one interface, and the names under which programs are lowered for them."""
