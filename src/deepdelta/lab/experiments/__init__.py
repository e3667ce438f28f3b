"""Studies: from a typed file to the runs that it consists of, their processes and their records."""
