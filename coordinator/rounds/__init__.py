"""Rounds: the state machine, tasks, results, selection, assignment, evaluation."""
