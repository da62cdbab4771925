"""The coordinator: rounds of federated fine-tuning over HTTP, with its state in SQLite and a blob folder."""
