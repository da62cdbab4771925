"""The process that stays up: it asks for work, decides, fetches, starts workers and delivers results."""
