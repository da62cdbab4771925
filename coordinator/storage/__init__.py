"""State that outlives the process: database, migrations, blobs."""
