"""Tables and files as text: read, the columns that are text told from the others, conversations rendered."""
