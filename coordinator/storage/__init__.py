"""State that outlives the process: database, migrations, blobs. All SQL stands here.

Each ``*_rows`` module holds what is asked of a table and what is changed in it, as plain functions on a connection.
Whoever calls them decides what is one transaction. A ``find`` gives None where there is nothing, a ``get`` raises.
"""
