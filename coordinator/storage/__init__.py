"""State that outlives the process: database, migrations, blobs. All SQL stands here.

Each ``*_rows`` module holds the questions and changes of one table or two, as plain functions on a connection; whoever
calls them decides what is one transaction.
"""
