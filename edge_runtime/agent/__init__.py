"""The process that stays up: checks in, decides, fetches, hands tasks to a worker, delivers results."""
