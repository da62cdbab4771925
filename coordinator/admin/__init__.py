"""The operator's side of the admin API: client, watch, report."""
