"""Dual and adjoint programs from primal graphs: one rule an operator."""
