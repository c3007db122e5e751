"""Reports, figures, tables, and descriptions of folders and recipes."""
