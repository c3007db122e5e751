"""What a person reads: tables, figures, contexts, descriptions of folders and recipes."""
